"""Divergences between the teacher's and the student's distributions, one value per prediction."""

import math
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexkd.core.checks import class_loss, output_loss
from flexkd.core.tensors import Number
from flexkd.errors import RecipeError

__all__ = [
    "BERNOULLI_LOSSES",
    "LOGIT_LOSSES",
    "REGRESSION_LOSSES",
    "bernoulli_kl",
    "forward_kl",
    "jensen_shannon",
    "mean_squared_error",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
]

_FLOOR: Final = -1e30
"""Replaces log 0 where a distribution is compared with a mixture, which has mass wherever its parts have some."""


def _scaled(logits: Tensor, temperature: Number) -> Tensor:
    """Float32 logits divided by a checked temperature, as a tensor of its own."""
    if not 0 < temperature < math.inf:
        raise RecipeError(f"temperature: must be above 0, was {temperature}. 1 leaves the logits as they are.")
    logits = logits.float()
    return logits.view_as(logits) if temperature == 1 else logits / temperature


def _log(scaled: Tensor) -> Tensor:
    """Log-probabilities, -inf where there is no mass, `[*rows, classes]`."""
    return F.log_softmax(scaled, dim=-1)


def _floored(scaled: Tensor) -> Tensor:
    """Log-probabilities with a finite number in the place of -inf, so that 0 * log 0 is 0 in value and gradient."""
    return _log(scaled).clamp(min=_FLOOR)


def _no_nan(values: Tensor, student: Tensor) -> Tensor:
    """Values of predictions with inf in the place of NaN, and no gradient to a prediction whose value is not finite.

    NaN comes from logits that are no distribution: one of them NaN or inf, or all of them -inf.
    """
    is_finite = values.detach().isfinite()
    if student.requires_grad:
        student.register_hook(lambda gradient: torch.where(is_finite[..., None], gradient, 0))
    return torch.where(values.isnan(), math.inf, values)


def _kl(log_first: Tensor, log_second: Tensor) -> Tensor:
    """KL(first || second) of float32 log-probabilities, `[*rows, classes] -> [*rows]`.

    Both sum to one, so that adding `second - first` changes nothing but rounding: an error in either normaliser then
    enters squared, and a divergence of 1e-5 over a large vocabulary keeps its digits.
    """
    first, second = log_first.exp(), log_second.exp()
    # 0 log 0 is 0, whatever the second has there.
    difference = (log_first - log_second).masked_fill_(first == 0, 0)
    return (first * difference + (second - first)).sum(-1)


def _kl_to_mixture(log_first: Tensor, log_mixture: Tensor) -> Tensor:
    """`_kl` of floored log-probabilities, where the mixture has mass wherever the first has."""
    first, mixture = log_first.exp(), log_mixture.exp()
    return (first * (log_first - log_mixture) + (mixture - first)).sum(-1)


class _ForwardKL(torch.autograd.Function):
    """`_kl` from logits, which stores its gradient `(q - p) / temperature` and no intermediate tensor."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor, temperature: Number) -> Tensor:
        log_p, log_q = (_log(_scaled(logits, temperature)) for logits in (teacher_logits, student_logits))
        p, difference = log_p.exp(), log_q.exp()
        difference -= p
        # 0 log 0 is 0. Where a row is no distribution, `difference` is NaN too, and stays so.
        parts = log_p.sub_(log_q).mul_(p).nan_to_num_(0, math.inf, -math.inf)
        values = parts.add_(difference).sum(-1)
        ctx.save_for_backward(difference.masked_fill_(~values.isfinite()[..., None], 0))
        ctx.temperature, ctx.dtype = temperature, student_logits.dtype
        return values.masked_fill_(values.isnan(), math.inf)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (grad_value[..., None] / ctx.temperature)).to(ctx.dtype), None, None


def _log_mixture(log_first: Tensor, log_second: Tensor, share: Number) -> Tensor:
    """Log of `share * first + (1 - share) * second` for `0 < share < 1`."""
    return torch.logaddexp(log_first + math.log(share), log_second + math.log1p(-share))


def _check_share(name: str, value: Number) -> None:
    if not 0 <= value <= 1:
        raise RecipeError(f"{name}: must be between 0 and 1 (inclusive), was {value}. Choose a mixing share.")


@class_loss
def forward_kl(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Number = 1.0,
) -> Float[Tensor, "*rows"]:
    """KL(teacher || student) of every prediction, in nats, unreduced.

    Mode-covering: the student pays for each class the teacher would have said. Computed in float32, not multiplied
    by temperature ** 2 (`Objective` does that).

    A logit of -inf is a class without mass: inf where the student has one and the teacher has mass there; a class
    without mass on both sides, or for the teacher alone, adds nothing. Logits that are no distribution (NaN or inf
    among them, or all -inf) are infinitely far from any. Nothing flows back from an infinite value.

    Args:
        student_logits: Same classes in the same order as the teacher's.
        teacher_logits: No gradient flows here.
        temperature: Divides both logits; above 1 shows more of the teacher's ranking.

    Raises:
        ShapeError: Both are not of the same shape, or of one class.
        RecipeError: The temperature is not above 0.

    Source:
        Hinton et al., 2015, arXiv:1503.02531, sec. 2.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0, -1.0]]])
        >>> forward_kl(logits, logits)
        tensor([[0.]])
    """
    values: Tensor = _ForwardKL.apply(student_logits, teacher_logits.detach(), temperature)  # type: ignore[no-untyped-call]
    return values


@class_loss
def reverse_kl(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Number = 1.0,
) -> Float[Tensor, "*rows"]:
    """KL(student || teacher) of every prediction, in nats, unreduced.

    Mode-seeking: the student pays for mass where the teacher has little, with inf where the teacher's logit is -inf.
    Arguments, and all else about -inf, as in `forward_kl`.

    Source:
        Gu et al., MiniLLM, 2023, arXiv:2306.08543, sec. 2.1.
    """
    student, teacher = _scaled(student_logits, temperature), _scaled(teacher_logits.detach(), temperature)
    return _no_nan(_kl(_log(student), _log(teacher)), student)


@class_loss
def jensen_shannon(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Number = 1.0,
    *,
    beta: Number = 0.5,
) -> Float[Tensor, "*rows"]:
    """Generalised Jensen-Shannon divergence `b KL(p || m) + (1 - b) KL(q || m)` with `m = b p + (1 - b) q`, in nats.

    Finite where either side has a logit of -inf, but for the ends.

    Args:
        student_logits: As in `forward_kl`.
        teacher_logits: As in `forward_kl`.
        temperature: As in `forward_kl`.
        beta: 0.5 is the symmetric divergence. The ends are the limits of `value / b` and `value / (1 - b)`, as exact
            branches: 0 is `forward_kl`, 1 is `reverse_kl`.

    Raises:
        RecipeError: Beta is outside of 0 to 1, or the temperature is not above 0.

    Source:
        Agarwal et al., GKD, 2023, arXiv:2306.13649, the generalized JSD.
    """
    _check_share("beta", beta)
    if beta == 0:
        return forward_kl(student_logits, teacher_logits, temperature)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits, temperature)
    student = _scaled(student_logits, temperature)
    log_p, log_q = _floored(_scaled(teacher_logits.detach(), temperature)), _floored(student)
    log_m = _log_mixture(log_p, log_q, beta)
    return _no_nan(beta * _kl_to_mixture(log_p, log_m) + (1 - beta) * _kl_to_mixture(log_q, log_m), student)


@class_loss
def skew_kl(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Number = 1.0,
    *,
    alpha: Number = 0.1,
) -> Float[Tensor, "*rows"]:
    """KL(p || a p + (1 - a) q): forward KL whose gradient stays bounded where the student has no mass, in nats.

    Finite where either side has a logit of -inf, but for an alpha of 0.

    Args:
        student_logits: As in `forward_kl`.
        teacher_logits: As in `forward_kl`.
        temperature: As in `forward_kl`.
        alpha: Share of the teacher in the mixture; 0 is `forward_kl`, 1 is 0 everywhere.

    Raises:
        RecipeError: Alpha is outside of 0 to 1, or the temperature is not above 0.

    Source:
        Ko et al., DistiLLM, 2024, arXiv:2402.03898, sec. 3.1.
    """
    _check_share("alpha", alpha)
    if alpha == 0:
        return forward_kl(student_logits, teacher_logits, temperature)
    student = _scaled(student_logits, temperature)
    return _no_nan(_skewed(_floored(_scaled(teacher_logits.detach(), temperature)), _floored(student), alpha), student)


@class_loss
def skew_reverse_kl(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Number = 1.0,
    *,
    alpha: Number = 0.1,
) -> Float[Tensor, "*rows"]:
    """KL(q || a q + (1 - a) p): reverse KL with the student mixed into the teacher, in nats.

    Finite where either side has a logit of -inf, but for an alpha of 0.

    Args:
        student_logits: As in `forward_kl`.
        teacher_logits: As in `forward_kl`.
        temperature: As in `forward_kl`.
        alpha: Share of the student in the mixture; 0 is `reverse_kl`, 1 is 0 everywhere.

    Raises:
        RecipeError: Alpha is outside of 0 to 1, or the temperature is not above 0.

    Source:
        Ko et al., DistiLLM, 2024, arXiv:2402.03898, sec. 3.1.
    """
    _check_share("alpha", alpha)
    if alpha == 0:
        return reverse_kl(student_logits, teacher_logits, temperature)
    student = _scaled(student_logits, temperature)
    return _no_nan(_skewed(_floored(student), _floored(_scaled(teacher_logits.detach(), temperature)), alpha), student)


def _skewed(log_first: Tensor, log_second: Tensor, alpha: Number) -> Tensor:
    if alpha == 1:
        return 0.0 * (log_first + log_second).sum(-1)
    return _kl_to_mixture(log_first, _log_mixture(log_first, log_second, alpha))


@class_loss
def total_variation(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Number = 1.0,
) -> Float[Tensor, "*rows"]:
    """Total variation distance `sum |p - q| / 2` of every prediction, between 0 and 1, unreduced.

    A logit of -inf is a class without mass, and the distance stays finite. Arguments as in `forward_kl`. Its gradient
    shrinks with the temperature once, not twice, so that `Objective` multiplies it by the temperature and not by its
    square.

    Source:
        Wen et al., f-distill, 2023, arXiv:2307.15190, sec. 3.
    """
    student = _scaled(student_logits, temperature)
    p, q = _scaled(teacher_logits.detach(), temperature).softmax(-1), student.softmax(-1)
    return _no_nan(0.5 * (p - q).abs().sum(-1), student)


@output_loss
def bernoulli_kl(
    student_logits: Float[Tensor, "*rows labels"],
    teacher_logits: Float[Tensor, "*rows labels"],
    temperature: Number = 1.0,
) -> Float[Tensor, "*rows"]:
    """KL(teacher || student) of independent labels, summed over the labels of a row, in nats.

    For multi-label tasks, where each logit is a sigmoid of its own. A logit of -inf says that a label is surely absent,
    inf that it is present: inf where the student is sure of what the teacher is not, 0 where both are sure of the
    same. Arguments as in `forward_kl`.

    Raises:
        RecipeError: The temperature is not above 0.
    """
    teacher = _scaled(teacher_logits.detach(), temperature)
    student = _scaled(student_logits, temperature)
    parts = []
    for sign in (1, -1):
        log_p, log_q = F.logsigmoid(sign * teacher), F.logsigmoid(sign * student)
        p = log_p.exp()
        parts.append(p * (log_p - log_q).masked_fill_(p == 0, 0))
    return _no_nan((parts[0] + parts[1]).sum(-1), student)


@output_loss
def mean_squared_error(
    student_logits: Float[Tensor, "*rows outputs"],
    teacher_logits: Float[Tensor, "*rows outputs"],
    temperature: Number = 1.0,
) -> Float[Tensor, "*rows"]:
    """Squared difference of the predicted values, mean over the outputs of a row, for regression.

    The temperature has no meaning for a value and is accepted, at 1, so that all logit losses are called alike.
    A value that is not finite is no prediction: the loss is inf.

    Raises:
        RecipeError: The temperature is not 1.
    """
    if temperature != 1:
        raise RecipeError(f"temperature: has no meaning for regression, was {temperature}. Leave it at 1.")
    student = _scaled(student_logits, 1)
    return _no_nan((student - teacher_logits.detach().float()).square().mean(-1), student)


LogitLoss = Callable[..., Tensor]

LOGIT_LOSSES: Final[dict[str, LogitLoss]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}
"""For one label of several classes, or one token of a vocabulary."""

BERNOULLI_LOSSES: Final[dict[str, LogitLoss]] = {"forward_kl": bernoulli_kl}
"""For multi-label tasks."""

REGRESSION_LOSSES: Final[dict[str, LogitLoss]] = {"mse": mean_squared_error}
"""For regression."""

LOGIT_LOSSES_BY_TASK: Final[dict[str, dict[str, LogitLoss]]] = {
    "cross_entropy": LOGIT_LOSSES,
    "binary_cross_entropy": BERNOULLI_LOSSES,
    "mse": REGRESSION_LOSSES,
}
"""By the name of the loss against labels."""
