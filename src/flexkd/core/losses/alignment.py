"""Losses from the alignment of whole states, whose widths may differ."""

from collections.abc import Callable
from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flexkd.core.checks import state_loss
from flexkd.core.losses.moments import centre, count_positions, float32_product, largest_sizes, sum_over_processes
from flexkd.core.tensors import DEAD_FACTOR, select_positions

__all__ = ["cka", "functional_cka", "gram", "procrustes"]

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


@state_loss
def procrustes(
    student: Float[Tensor, "*positions student_units"],
    teacher: Float[Tensor, "*positions teacher_units"],
    mask: Bool[Tensor, "*positions"] | None = None,
    *,
    across_processes: bool = False,
) -> Float[Tensor, " 1"]:
    """Squared distance of the two sets of states after the rotation that brings them nearest, from 0 to 2.

    Both are centred and brought to Frobenius norm 1, the narrower one is filled up with zeros: `2 - 2 ||X'Y||_*`, with
    the nuclear norm over the cross-covariances. Rotations, shifts and one factor for all units change nothing, but
    other linear maps do. The gradient at singular values of 0 is the smallest of all that there are.

    Source:
        Bhattarai et al., 2025, arXiv:2509.25253; Schoenemann, A Generalized Solution of the Orthogonal Procrustes
        Problem, 1966, Psychometrika 31(1), 1-10.
    """
    (x, x_live), (y, y_live) = _unit_states(student, teacher, mask, across_processes)
    cross = sum_over_processes(float32_product(x.T, y), across_processes)
    # A decomposition raises where a state is not finite; the loss is to say so, like any other.
    is_finite = cross.isfinite().all()
    singular_values = torch.linalg.svdvals(torch.where(is_finite, cross, 0.0))
    rounding = max(cross.shape) * torch.finfo(cross.dtype).eps * singular_values.detach().amax()
    nuclear_norm = torch.where(singular_values > rounding, singular_values, 0.0).sum()
    nuclear_norm = torch.where(is_finite, nuclear_norm, cross.sum())
    return torch.where(x_live & y_live, 2 - 2 * nuclear_norm, 0.0 * nuclear_norm).unsqueeze(0)


@state_loss
def gram(
    student: Float[Tensor, "*positions student_units"],
    teacher: Float[Tensor, "*positions teacher_units"],
    mask: Bool[Tensor, "*positions"] | None = None,
    *,
    across_processes: bool = False,
) -> Float[Tensor, " 1"]:
    """Squared Frobenius distance of the two Gram matrices of the positions, in units of the teacher's squared norm.

    States are centred and brought to Frobenius norm 1, so that both matrices have trace 1: the products of each two
    positions are compared. 1 is a student whose products are all 0; computed from the units' products, which are fewer.

    Source:
        Bhattarai et al., 2025, arXiv:2509.25253.
    """
    (x, x_live), (y, y_live) = _unit_states(student, teacher, mask, across_processes)
    student_norm, cross_norm, teacher_norm = (
        sum_over_processes(float32_product(first.T, second), across_processes).square().sum()
        for first, second in ((x, x), (x, y), (y, y))
    )
    live = x_live & y_live
    distance = (student_norm - 2 * cross_norm + teacher_norm) / torch.where(live, teacher_norm, 1.0)
    return torch.where(live, distance, 0.0 * distance).unsqueeze(0)


def _unit_states(
    student: Tensor, teacher: Tensor, mask: Tensor | None, across_processes: bool
) -> list[tuple[Tensor, Tensor]]:
    """Centred states of both sides, divided by a norm that the gradient goes through, and whether they vary."""
    sides = []
    for states in (select_positions(student, mask), select_positions(teacher, mask).detach()):
        count = count_positions(states, across_processes)
        largest = largest_sizes(states, across_processes).amax()
        centred = centre(states, count, across_processes) / torch.where(largest > 0, largest, 1.0)
        energy = sum_over_processes(centred.square().sum(), across_processes)
        live = energy.detach() > DEAD_FACTOR**2 * count * states.shape[1]
        sides.append((centred / torch.where(live, energy, 1.0).sqrt(), live))
    return sides


LOSSES: Final[dict[str, Callable[..., Tensor]]] = {
    "cka": cka,
    "functional_cka": functional_cka,
    "gram": gram,
    "procrustes": procrustes,
}
"""By name."""
