"""Divergences between the teacher's and the student's distributions, one value per prediction."""

import math
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexkd.core.tensors import Number
from flexkd.errors import RecipeError

_FLOOR: Final = -1e30
"""Stands for log 0: finite, so that 0 * log 0 is 0 in value and gradient."""


def _scaled(logits: Tensor, temperature: Number) -> Tensor:
    """Float32 logits divided by a checked temperature."""
    if not temperature > 0:
        raise RecipeError(f"temperature: must be above 0, was {temperature}. 1 leaves the logits as they are.")
    logits = logits.float()
    return logits if temperature == 1 else logits / temperature


def _log_probabilities(logits: Tensor, temperature: Number) -> Tensor:
    """Float32 log-softmax with -inf replaced by a finite floor, `[*rows, classes]`."""
    return F.log_softmax(_scaled(logits, temperature), dim=-1).clamp(min=_FLOOR)


def _log_sigmoid(logits: Tensor) -> Tensor:
    return F.logsigmoid(logits).clamp(min=_FLOOR)


def _kl(log_first: Tensor, log_second: Tensor) -> Tensor:
    """KL(first || second) of float32 log-probabilities, `[*rows, classes] -> [*rows]`.

    Both sum to one, so that adding `second - first` changes nothing but rounding: an error in either normaliser then
    enters squared, and a divergence of 1e-5 over a large vocabulary keeps its digits.
    """
    first, second = log_first.exp(), log_second.exp()
    return (first * (log_first - log_second) + (second - first)).sum(-1)


class _ForwardKL(torch.autograd.Function):
    """`_kl` from logits, with its gradient `(q - p) / temperature` kept in the place of all that leads to it."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor, temperature: Number) -> Tensor:
        log_p, log_q = (_log_probabilities(logits, temperature) for logits in (teacher_logits, student_logits))
        p, difference = log_p.exp(), log_q.exp()
        difference -= p
        ctx.save_for_backward(difference)
        ctx.temperature, ctx.dtype = temperature, student_logits.dtype
        return log_p.sub_(log_q).mul_(p).add_(difference).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_value: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (by_value[..., None] / ctx.temperature)).to(ctx.dtype), None, None


def _log_mixture(log_first: Tensor, log_second: Tensor, share: Number) -> Tensor:
    """Log of `share * first + (1 - share) * second` for `0 < share < 1`."""
    return torch.logaddexp(log_first + math.log(share), log_second + math.log1p(-share))


def _check_share(name: str, value: Number) -> None:
    if not 0 <= value <= 1:
        raise RecipeError(f"{name}: must be between 0 and 1 (inclusive), was {value}. Choose a mixing share.")


def forward_kl(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Number = 1.0,
) -> Float[Tensor, "*rows"]:
    """KL(teacher || student) of every prediction, in nats, unreduced.

    Mode-covering: the student pays for each class the teacher would have said. Computed in float32, not multiplied
    by temperature ** 2 (`Objective` does that).

    Args:
        student_logits: Same classes in the same order as the teacher's.
        teacher_logits: No gradient flows here.
        temperature: Divides both logits; above 1 shows more of the teacher's ranking.

    Raises:
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


def reverse_kl(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Number = 1.0,
) -> Float[Tensor, "*rows"]:
    """KL(student || teacher) of every prediction, in nats, unreduced.

    Mode-seeking: the student pays for mass where the teacher has none. Arguments as in `forward_kl`.

    Source:
        Gu et al., MiniLLM, 2023, arXiv:2306.08543, sec. 2.1.
    """
    return _kl(
        _log_probabilities(student_logits, temperature), _log_probabilities(teacher_logits.detach(), temperature)
    )


def jensen_shannon(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Number = 1.0,
    *,
    beta: Number = 0.5,
) -> Float[Tensor, "*rows"]:
    """Generalised Jensen-Shannon divergence `b KL(p || m) + (1 - b) KL(q || m)` with `m = b p + (1 - b) q`, in nats.

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
    log_p = _log_probabilities(teacher_logits.detach(), temperature)
    log_q = _log_probabilities(student_logits, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_kl(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Number = 1.0,
    *,
    alpha: Number = 0.1,
) -> Float[Tensor, "*rows"]:
    """KL(p || a p + (1 - a) q): forward KL whose gradient stays bounded where the student has no mass, in nats.

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
    return _skewed(
        _log_probabilities(teacher_logits.detach(), temperature),
        _log_probabilities(student_logits, temperature),
        alpha,
    )


def skew_reverse_kl(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Number = 1.0,
    *,
    alpha: Number = 0.1,
) -> Float[Tensor, "*rows"]:
    """KL(q || a q + (1 - a) p): reverse KL with the student mixed into the teacher, in nats.

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
    return _skewed(
        _log_probabilities(student_logits, temperature),
        _log_probabilities(teacher_logits.detach(), temperature),
        alpha,
    )


def _skewed(log_first: Tensor, log_second: Tensor, alpha: Number) -> Tensor:
    _check_share("alpha", alpha)
    if alpha == 0:
        return _kl(log_first, log_second)
    if alpha == 1:
        return 0.0 * (log_first + log_second).sum(-1)
    return _kl(log_first, _log_mixture(log_first, log_second, alpha))


def total_variation(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Number = 1.0,
) -> Float[Tensor, "*rows"]:
    """Total variation distance `sum |p - q| / 2` of every prediction, between 0 and 1, unreduced.

    Arguments as in `forward_kl`. Its gradient shrinks with the temperature once, not twice, so that `Objective`
    multiplies it by the temperature and not by its square.

    Source:
        Wen et al., f-distill, 2023, arXiv:2307.15190, sec. 3.
    """
    p = _log_probabilities(teacher_logits.detach(), temperature).exp()
    q = _log_probabilities(student_logits, temperature).exp()
    return 0.5 * (p - q).abs().sum(-1)


def bernoulli_kl(
    student_logits: Float[Tensor, "*rows labels"],
    teacher_logits: Float[Tensor, "*rows labels"],
    temperature: Number = 1.0,
) -> Float[Tensor, "*rows"]:
    """KL(teacher || student) of independent labels, summed over the labels of a row, in nats.

    For multi-label tasks, where each logit is a sigmoid of its own. Arguments as in `forward_kl`.

    Raises:
        RecipeError: The temperature is not above 0.
    """
    teacher = _scaled(teacher_logits.detach(), temperature)
    student = _scaled(student_logits, temperature)
    present = _log_sigmoid(teacher).exp() * (_log_sigmoid(teacher) - _log_sigmoid(student))
    absent = _log_sigmoid(-teacher).exp() * (_log_sigmoid(-teacher) - _log_sigmoid(-student))
    return (present + absent).sum(-1)


def mean_squared_error(
    student_logits: Float[Tensor, "*rows outputs"],
    teacher_logits: Float[Tensor, "*rows outputs"],
    temperature: Number = 1.0,
) -> Float[Tensor, "*rows"]:
    """Squared difference of the predicted values, mean over the outputs of a row, for regression.

    The temperature has no meaning for a value and is accepted, at 1, so that all logit losses are called alike.

    Raises:
        RecipeError: The temperature is not 1.
    """
    if temperature != 1:
        raise RecipeError(f"temperature: has no meaning for regression, was {temperature}. Leave it at 1.")
    return (student_logits.float() - teacher_logits.detach().float()).square().mean(-1)


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
