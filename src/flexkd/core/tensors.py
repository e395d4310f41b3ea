"""Masked reductions and the sum over processes that every loss shares."""

from typing import Any, Final

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Number = int | float
"""A setting: both kinds on purpose, since run-time type checks do not take an int for a float."""

IGNORE_INDEX: Final = -100
"""A label with this value is not supervised."""


def can_be_read(values: Tensor) -> bool:
    """Whether a number can be taken from a tensor without waiting: it is on the CPU, and has storage.

    What plans a run computes with tensors that have none.
    """
    return values.device.type == "cpu" and not isinstance(values, FakeTensor)


def masked_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean of the values where the mask is True.

    Values outside the mask are selected away, never multiplied by zero, so that a NaN there does not leak.

    Returns:
        0 with zero gradient, still connected to the graph, when the mask is empty.
    """
    kept = values[mask]
    return kept.sum() / max(kept.numel(), 1)


def select_positions(states: Float[Tensor, "*positions units"], mask: Bool[Tensor, "*positions"] | None) -> Tensor:
    """Rows of the states where the mask is True, as float32 `[selected, units]`; all rows without a mask."""
    rows = states.flatten(0, -2) if mask is None else states[mask]
    return rows.float()


def num_processes() -> int:
    """Processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum of a tensor over all processes; its backward sums the gradients over all processes.

    Every process must call it, in the same order, in forward and in backward. Each process then holds the same loss
    F, and each adds its own dF to every other's gradient: a local gradient is W times the gradient of F, which is
    what DistributedDataParallel divides by W. Without a process group this is the identity.
    """
    if num_processes() == 1:
        return values
    reduced: Tensor = _AllReduceSum.apply(values)  # type: ignore[no-untyped-call]
    return reduced
