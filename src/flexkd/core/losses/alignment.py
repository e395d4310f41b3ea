"""Losses from the alignment of whole states, whose widths may differ."""

from collections.abc import Callable
from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flexkd.core.checks import state_loss
from flexkd.core.losses.moments import centre, count_positions, float32_product, largest_sizes, sum_over_processes
from flexkd.core.tensors import select_positions

__all__ = ["cka", "functional_cka"]

_EPSILON: Final = 1e-12


@state_loss
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
    count = count_positions(x, across_processes)
    # Unlike a correlation, the centred form is not shift-invariant by itself: the gradient goes through the mean.
    x, y = (_unit_energy(centre(side, count, across_processes), count, across_processes) for side in (x, y))
    if count < (4 if unbiased else 2):
        return sum_over_processes(x.flatten()[:0].sum(), across_processes).unsqueeze(0)
    cross = _hsic(x, y, count, unbiased, across_processes)
    norms = _hsic(x, x, count, unbiased, across_processes) * _hsic(y, y, count, unbiased, across_processes)
    live = norms.detach() > _EPSILON
    return torch.where(live, 1 - cross / torch.where(live, norms, 1.0).sqrt(), 0.0 * cross).unsqueeze(0)


def _unit_energy(centred: Tensor, count: Tensor, across_processes: bool) -> Tensor:
    """Centred states scaled to a mean squared length of 1, which keeps squares in range and changes no loss."""
    scale = largest_sizes(centred, across_processes).amax()
    scale = torch.where(scale > 0, scale, 1.0)
    shares = sum_over_processes((centred.detach() / scale).square().sum(), across_processes) / count.clamp(min=1)
    return centred / (scale * torch.where(shares > 0, shares, 1.0).sqrt())


def _hsic(x: Tensor, y: Tensor, count: Tensor, unbiased: bool, across_processes: bool) -> Tensor:
    """HSIC of linear kernels from centred features, up to the factor that cancels in CKA."""
    squared = sum_over_processes(float32_product(x.T, y), across_processes).square().sum()
    if not unbiased:
        return squared / count.clamp(min=1).square()
    x_norms, y_norms = x.square().sum(-1), y.square().sum(-1)
    diagonal = sum_over_processes((x_norms * y_norms).sum(), across_processes)
    traces = sum_over_processes(x_norms.sum(), across_processes) * sum_over_processes(y_norms.sum(), across_processes)
    estimate = squared - diagonal + traces / ((count - 1) * (count - 2)) - 2 * diagonal / (count - 2)
    return estimate / (count * (count - 3))


@state_loss
def functional_cka(
    student: Float[Tensor, "*positions student_units"],
    teacher: Float[Tensor, "*positions teacher_units"],
    mask: Bool[Tensor, "*positions"] | None = None,
    *,
    across_processes: bool = False,
) -> Float[Tensor, " 1"]:
    """`cka` with teacher states that were multiplied by the root of the functional geometry, `h G^(1/2)`.

    The kernel of those features weighs each direction by how far the teacher's output moves along it; neither a
    selection nor a mapping is needed.
    """
    return cka(student, teacher, mask, across_processes=across_processes)


LOSSES: Final[dict[str, Callable[..., Tensor]]] = {"cka": cka, "functional_cka": functional_cka}
"""By name."""
