"""Losses from the correlation of units over the positions of a batch; `correlation` is the method's own."""

from collections.abc import Callable
from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flexkd.core.checks import unit_loss
from flexkd.core.losses.moments import PairedMoments, float32_product, paired_moments, sum_over_processes
from flexkd.core.tensors import Number
from flexkd.errors import RecipeError

__all__ = ["correlation", "cross_correlation"]


def correlation_from(moments: PairedMoments, *, across_processes: bool = False) -> Float[Tensor, " units"]:
    """`(1 - C_i)^2` of every unit from `PairedMoments`; 0 for dead units."""
    products = sum_over_processes((moments.student * moments.teacher).sum(0), across_processes)
    covariance = products / moments.num_positions.clamp(min=1)
    coefficient = (covariance / (moments.student_std * moments.teacher_std)).clamp(-1.0, 1.0)
    return torch.where(moments.live, (1 - coefficient).square(), 0.0)


@unit_loss
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
        mask: Which positions count; the others are left out. None: all.
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
    """`cross_correlation` from `PairedMoments`."""
    products = sum_over_processes(float32_product(moments.student.T, moments.teacher), across_processes)
    covariances = products / moments.num_positions.clamp(min=1)
    matrix = covariances / (moments.student_std[:, None] * moments.teacher_std[None, :])
    live_pairs = moments.live[:, None] & moments.live[None, :]
    matrix = torch.where(live_pairs, matrix.clamp(-1.0, 1.0), 0.0)
    squares = matrix.square()
    others = squares.sum(1) - squares.diagonal()
    return torch.where(moments.live, (1 - matrix.diagonal()).square() + off_diagonal * others, 0.0)


@unit_loss
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


LOSSES: Final[dict[str, Callable[..., Tensor]]] = {"correlation": correlation, "cross_correlation": cross_correlation}
"""By name."""

FROM_MOMENTS: Final[dict[str, Callable[..., Tensor]]] = {
    "correlation": correlation_from,
    "cross_correlation": cross_correlation_from,
}
"""The same from `PairedMoments`, which also say which units are dead."""
