"""Means and deviations of paired states, over the positions of one process or of all."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from flexkd.core.tensors import DEAD_FACTOR, all_reduce_sum, num_processes, select_positions


class PairedMoments(NamedTuple):
    """Centred states of both sides, with the statistics of each unit over the positions."""

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


def sum_over_processes(values: Tensor, across_processes: bool) -> Tensor:
    """The values as they are, or their sum over all processes."""
    return all_reduce_sum(values) if across_processes else values


def float32_product(first: Tensor, second: Tensor) -> Tensor:
    """Matrix product in float32, whatever autocast says."""
    with torch.autocast(first.device.type, enabled=False):
        return first @ second


def count_positions(states: Float[Tensor, "positions units"], across_processes: bool) -> Float[Tensor, ""]:
    """Number of positions as a tensor on the device of the states."""
    return sum_over_processes(torch.full((), float(states.shape[0]), device=states.device), across_processes)


def centre(states: Tensor, count: Tensor, across_processes: bool) -> Tensor:
    """States without the mean of each unit over the `count` positions; the gradient goes through the mean."""
    return states - sum_over_processes(states.sum(0), across_processes) / count.clamp(min=1)


def largest_sizes(states: Float[Tensor, "positions units"], across_processes: bool) -> Float[Tensor, " units"]:
    """Largest absolute value of each unit, without a gradient; 0 where there are no positions."""
    largest = torch.cat([states.detach().abs(), states.new_zeros(1, states.shape[1])]).amax(0)
    if across_processes and num_processes() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def _deviation(
    centred: Tensor, largest: Tensor, count: Tensor, across_processes: bool
) -> tuple[Float[Tensor, " units"], Bool[Tensor, " units"]]:
    """Standard deviation with divisor N, 1 where the unit is dead, and which units are live."""
    variance = sum_over_processes(centred.square().sum(0), across_processes) / count.clamp(min=1)
    # Compared this way round, a unit with NaN counts as live, so that the NaN reaches the loss.
    live = ~(variance.detach().sqrt() <= DEAD_FACTOR * largest)
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
    count = count_positions(x, across_processes)
    x_largest, y_largest = largest_sizes(x, across_processes), largest_sizes(y, across_processes)
    x_mean = sum_over_processes(x.detach().sum(0), across_processes) / count.clamp(min=1)
    x, y = x - x_mean, centre(y, count, across_processes)
    x_std, x_live = _deviation(x, x_largest, count, across_processes)
    y_std, y_live = _deviation(y, y_largest, count, across_processes)
    return PairedMoments(x, y, count, x_std, y_std, x_live, y_live)
