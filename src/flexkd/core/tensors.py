"""Selected positions, sums over processes, and whether a tensor holds numbers."""

from collections.abc import Iterable
from typing import Any, Final

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Number = int | float
"""A setting; both types, since run-time type checks do not accept an int where a float is expected."""

IGNORE_INDEX: Final = -100
"""A label with this value is not supervised."""

DEAD_FACTOR: Final = 8 * torch.finfo(torch.float32).eps
"""A unit whose deviation is at most this multiple of its largest size does not vary: the rest is rounding."""


def has_storage(values: Tensor) -> bool:
    """Whether there are numbers in a tensor; the planner computes with tensors that have none."""
    return not isinstance(values, FakeTensor)


def can_be_read(values: Tensor) -> bool:
    """Whether a number can be read from a tensor at once: it is on the CPU and has storage."""
    return values.device.type == "cpu" and has_storage(values)


def select_positions(states: Float[Tensor, "*positions units"], mask: Bool[Tensor, "*positions"] | None) -> Tensor:
    """States at the positions where the mask is True, as float32 `[selected, units]`; all of them without a mask.

    The others are indexed away, never multiplied by zero, so that a NaN there does not spread.
    """
    selected = states.flatten(0, -2) if mask is None else states[mask]
    return selected.float()


def graph_zero(outputs: Iterable[Tensor]) -> Tensor | float:
    """A zero that keeps every output of the student in the graph, so that no process waits for a gradient."""
    zeros = [output.flatten()[:0].float().sum() for output in outputs]
    return torch.stack(zeros).sum() if zeros else 0.0


def num_processes() -> int:
    """Processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _AllReduceSum(torch.autograd.Function):
    """A sum over processes, forward and backward."""

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
