"""Distances between states, position by position: means over the positions that add up over micro-batches."""

from collections.abc import Callable
from typing import Final

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from flexkd.core.checks import unit_loss
from flexkd.core.losses.moments import count_positions, sum_over_processes
from flexkd.core.tensors import select_positions

__all__ = ["cosine", "mse"]


@unit_loss
def mse(
    student: Float[Tensor, "*positions units"],
    teacher: Float[Tensor, "*positions units"],
    mask: Bool[Tensor, "*positions"] | None = None,
    *,
    across_processes: bool = False,
) -> Float[Tensor, " units"]:
    """Mean squared difference of every unit over the positions; additive over micro-batches."""
    x, y = select_positions(student, mask), select_positions(teacher, mask).detach()
    return sum_over_processes((x - y).square().sum(0), across_processes) / count_positions(x, across_processes).clamp(
        min=1
    )


@unit_loss
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
    count = count_positions(x, across_processes)
    directed = (x.detach() != 0).any(-1) & (y != 0).any(-1)
    distance = 1 - F.cosine_similarity(x[directed], y[directed], dim=-1)
    return (sum_over_processes(distance.sum(), across_processes) / count.clamp(min=1)).unsqueeze(0)


LOSSES: Final[dict[str, Callable[..., Tensor]]] = {
    "cosine": cosine,
    "mse": mse,
    "projector": mse,
}
"""By name; `projector` is `mse` after a `Projector` that the objective owns."""
