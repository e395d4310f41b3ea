"""Losses between hidden states of student and teacher, one value per unit; the correlation loss is the method's own."""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from flexkd.core.checks import of_states, of_units
from flexkd.core.tensors import Number, all_reduce_sum, num_processes, select_positions
from flexkd.errors import RecipeError

MINIMUM_POSITIONS: Final = 8
"""A correlation over fewer positions says nothing: over two it is always 1 or -1."""

_DEAD_FACTOR: Final = 8 * torch.finfo(torch.float32).eps
_EPSILON: Final = 1e-12


class PairedMoments(NamedTuple):
    """Centred rows of both sides with the statistics of all positions, over all processes when asked."""

    student: Float[Tensor, "positions units"]
    teacher: Float[Tensor, "positions units"]
    num_positions: Float[Tensor, ""]
    student_std: Float[Tensor, " units"]
    teacher_std: Float[Tensor, " units"]
    student_live: Bool[Tensor, " units"]
    teacher_live: Bool[Tensor, " units"]

    @property
    def live(self) -> Bool[Tensor, " units"]:
        """Units that vary on both sides."""
        return self.student_live & self.teacher_live


def _summed(values: Tensor, across_processes: bool) -> Tensor:
    return all_reduce_sum(values) if across_processes else values


def _product(first: Tensor, second: Tensor) -> Tensor:
    """Matrix product in float32, whatever autocast says."""
    with torch.autocast(first.device.type, enabled=False):
        return first @ second


def _count(rows: Tensor, across_processes: bool) -> Tensor:
    return _summed(torch.full((), float(rows.shape[0]), device=rows.device), across_processes)


def _centred(rows: Tensor, count: Tensor, across_processes: bool) -> Tensor:
    return rows - _summed(rows.sum(0), across_processes) / count.clamp(min=1)


def _largest(rows: Tensor, across_processes: bool) -> Tensor:
    largest = torch.cat([rows.detach().abs(), rows.new_zeros(1, rows.shape[1])]).amax(0)
    if across_processes and num_processes() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def _deviation(
    centred: Tensor, largest: Tensor, count: Tensor, across_processes: bool
) -> tuple[Float[Tensor, " units"], Bool[Tensor, " units"]]:
    """Standard deviation with divisor N, 1 where the unit is dead, and which units are live."""
    variance = _summed(centred.square().sum(0), across_processes) / count.clamp(min=1)
    # Asked this way round, a unit that is not finite is not dead: its NaN must be seen.
    live = ~(variance.detach().sqrt() <= _DEAD_FACTOR * largest)
    return torch.where(live, variance, 1.0).sqrt(), live


def paired_moments(
    student: Float[Tensor, "*positions student_units"],
    teacher: Float[Tensor, "*positions teacher_units"],
    mask: Bool[Tensor, "*positions"] | None = None,
    *,
    across_processes: bool = False,
) -> PairedMoments:
    """Select, centre, then measure both sides in float32.

    The means are exact over all processes and carry no gradient: a correlation does not change when a unit is
    shifted, so that the gradient through them is zero.
    """
    x = select_positions(student, mask)
    y = select_positions(teacher, mask).detach()
    count = _count(x, across_processes)
    x_largest, y_largest = _largest(x, across_processes), _largest(y, across_processes)
    x_mean = _summed(x.detach().sum(0), across_processes) / count.clamp(min=1)
    x, y = x - x_mean, _centred(y, count, across_processes)
    x_std, x_live = _deviation(x, x_largest, count, across_processes)
    y_std, y_live = _deviation(y, y_largest, count, across_processes)
    return PairedMoments(x, y, count, x_std, y_std, x_live, y_live)


def correlation_from(moments: PairedMoments, *, across_processes: bool = False) -> Float[Tensor, " units"]:
    """`(1 - C_i)^2` of every unit from moments already taken; 0 for dead units."""
    covariance = _summed((moments.student * moments.teacher).sum(0), across_processes) / moments.num_positions.clamp(
        min=1
    )
    coefficient = (covariance / (moments.student_std * moments.teacher_std)).clamp(-1.0, 1.0)
    return torch.where(moments.live, (1 - coefficient).square(), 0.0)


@of_units
def correlation(
    student: Float[Tensor, "*positions units"],
    teacher: Float[Tensor, "*positions units"],
    mask: Bool[Tensor, "*positions"] | None = None,
    *,
    across_processes: bool = False,
) -> Float[Tensor, " units"]:
    """`(1 - C_i)^2` of every unit, `C_i` the Pearson correlation of student and teacher over the positions.

    It is a statistic of one batch: not additive over micro-batches, which is why the log names the number of
    positions behind it. Centred first, then normalised, in float32, with one divisor N for covariance and deviation.

    Args:
        student: Unit i is compared with the teacher's unit i. Positive affine maps of a unit change nothing.
        teacher: No gradient flows here.
        mask: Which positions count; the others are selected away. None: all.
        across_processes: Take the statistics over the positions of all processes; each of them must call it.

    Returns:
        0 with zero gradient for a dead unit, one whose deviation is at most `8 eps max|x|` on either side. The mean
        over live units belongs to `Objective`.

    Source:
        Saadi and Wang, Flex-KD, 2025, arXiv:2507.10155, feature distillation loss; first author's earlier code divides
        by N * d, which we do not.

    Example:
        >>> states = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 5.0]])
        >>> correlation(3 * states + 1, states) < 1e-9
        tensor([True, True])
    """
    moments = paired_moments(student, teacher, mask, across_processes=across_processes)
    return correlation_from(moments, across_processes=across_processes)


def cross_correlation_from(
    moments: PairedMoments, *, off_diagonal: Number = 5e-3, across_processes: bool = False
) -> Float[Tensor, " units"]:
    """`cross_correlation` from moments already taken."""
    products = _summed(_product(moments.student.T, moments.teacher), across_processes) / moments.num_positions.clamp(
        min=1
    )
    matrix = products / (moments.student_std[:, None] * moments.teacher_std[None, :])
    both = moments.live[:, None] & moments.live[None, :]
    matrix = torch.where(both, matrix.clamp(-1.0, 1.0), 0.0)
    squares = matrix.square()
    others = squares.sum(1) - squares.diagonal()
    return torch.where(moments.live, (1 - matrix.diagonal()).square() + off_diagonal * others, 0.0)


@of_units
def cross_correlation(
    student: Float[Tensor, "*positions units"],
    teacher: Float[Tensor, "*positions units"],
    mask: Bool[Tensor, "*positions"] | None = None,
    *,
    off_diagonal: Number = 5e-3,
    across_processes: bool = False,
) -> Float[Tensor, " units"]:
    """`correlation` plus `off_diagonal` times the squared correlations with all other live teacher units.

    The second part has a noise floor of about `(units - 1) / N` per unit for unrelated features, and a student that
    copies a correlated teacher exactly still pays for it.

    Source:
        Zbontar et al., Barlow Twins, 2021, arXiv:2103.03230, eq. 1.
    """
    if not 0 <= off_diagonal < float("inf"):
        raise RecipeError(f"off_diagonal: must be 0 or above, was {off_diagonal}. 0 is 'correlation'.")
    moments = paired_moments(student, teacher, mask, across_processes=across_processes)
    return cross_correlation_from(moments, off_diagonal=off_diagonal, across_processes=across_processes)


@of_units
def mse(
    student: Float[Tensor, "*positions units"],
    teacher: Float[Tensor, "*positions units"],
    mask: Bool[Tensor, "*positions"] | None = None,
    *,
    across_processes: bool = False,
) -> Float[Tensor, " units"]:
    """Mean squared difference of every unit over the positions; additive over micro-batches."""
    x, y = select_positions(student, mask), select_positions(teacher, mask).detach()
    return _summed((x - y).square().sum(0), across_processes) / _count(x, across_processes).clamp(min=1)


@of_units
def cosine(
    student: Float[Tensor, "*positions units"],
    teacher: Float[Tensor, "*positions units"],
    mask: Bool[Tensor, "*positions"] | None = None,
    *,
    across_processes: bool = False,
) -> Float[Tensor, " 1"]:
    """1 - cosine of the angle between both states, mean over the positions; additive over micro-batches.

    A position where either state is zero has no angle and counts as 0.

    Source:
        Sanh et al., DistilBERT, 2019, arXiv:1910.01108, the training loss.
    """
    x, y = select_positions(student, mask), select_positions(teacher, mask).detach()
    count = _count(x, across_processes)
    directed = (x.detach() != 0).any(-1) & (y != 0).any(-1)
    distance = 1 - F.cosine_similarity(x[directed], y[directed], dim=-1)
    return (_summed(distance.sum(), across_processes) / count.clamp(min=1)).unsqueeze(0)


@of_states
def cka(
    student: Float[Tensor, "*positions student_units"],
    teacher: Float[Tensor, "*positions teacher_units"],
    mask: Bool[Tensor, "*positions"] | None = None,
    *,
    unbiased: bool = True,
    across_processes: bool = False,
) -> Float[Tensor, " 1"]:
    """1 - linear centred kernel alignment between the two sets of states, in feature form.

    Widths may differ. The biased form reads 0.8 on 256 independent units at 64 positions, which is why the unbiased
    HSIC is the default; it needs 4 positions.

    Source:
        Kornblith et al., 2019, arXiv:1905.00414, sec. 3; Song et al., 2012, JMLR 13, the unbiased estimator of HSIC.
    """
    x, y = select_positions(student, mask), select_positions(teacher, mask).detach()
    count = _count(x, across_processes)
    # Unlike a correlation, the centred form is not shift-invariant by itself: the gradient goes through the mean.
    x, y = (_unit_energy(_centred(side, count, across_processes), count, across_processes) for side in (x, y))
    if count < (4 if unbiased else 2):
        return _summed(x.flatten()[:0].sum(), across_processes).unsqueeze(0)
    cross = _hsic(x, y, count, unbiased, across_processes)
    own = _hsic(x, x, count, unbiased, across_processes) * _hsic(y, y, count, unbiased, across_processes)
    live = own.detach() > _EPSILON
    return torch.where(live, 1 - cross / torch.where(live, own, 1.0).sqrt(), 0.0 * cross).unsqueeze(0)


def _unit_energy(centred: Tensor, count: Tensor, across_processes: bool) -> Tensor:
    """Rows scaled to a mean squared length of 1, for range: the alignment does not change, nor its gradient."""
    scale = _largest(centred, across_processes).amax()
    scale = torch.where(scale > 0, scale, 1.0)
    shares = _summed((centred.detach() / scale).square().sum(), across_processes) / count.clamp(min=1)
    return centred / (scale * torch.where(shares > 0, shares, 1.0).sqrt())


def _hsic(x: Tensor, y: Tensor, count: Tensor, unbiased: bool, across_processes: bool) -> Tensor:
    """HSIC of linear kernels from centred features, up to the factor that cancels in CKA."""
    squared = _summed(_product(x.T, y), across_processes).square().sum()
    if not unbiased:
        return squared / count.clamp(min=1).square()
    x_norms, y_norms = x.square().sum(-1), y.square().sum(-1)
    diagonal = _summed((x_norms * y_norms).sum(), across_processes)
    traces = _summed(x_norms.sum(), across_processes) * _summed(y_norms.sum(), across_processes)
    estimate = squared - diagonal + traces / ((count - 1) * (count - 2)) - 2 * diagonal / (count - 2)
    return estimate / (count * (count - 3))


@of_states
def functional_cka(
    student: Float[Tensor, "*positions student_units"],
    teacher: Float[Tensor, "*positions teacher_units"],
    mask: Bool[Tensor, "*positions"] | None = None,
    *,
    across_processes: bool = False,
) -> Float[Tensor, " 1"]:
    """`cka` against teacher states already turned by the root of the functional geometry, `h G^(1/2)`.

    The kernel of those features weighs each direction by how far the teacher's output moves along it; neither a
    selection nor a mapping is needed.
    """
    return cka(student, teacher, mask, across_processes=across_processes)


FeatureLoss = Callable[..., Tensor]

FEATURE_LOSSES: Final[dict[str, FeatureLoss]] = {
    "correlation": correlation,
    "cross_correlation": cross_correlation,
    "projector": mse,
    "cka": cka,
    "functional_cka": functional_cka,
    "mse": mse,
    "cosine": cosine,
}
"""By name; `projector` is `mse` after a `Projector` that the objective owns."""

STATISTICS: Final = frozenset({"correlation", "cross_correlation", "cka", "functional_cka"})
"""Losses that say nothing of a few positions; the others are means over positions."""

UNIT_STATISTICS: Final[dict[str, FeatureLoss]] = {
    "correlation": correlation_from,
    "cross_correlation": cross_correlation_from,
}
"""Losses over units that can be dead, from `PairedMoments`; their mean is over live units."""
