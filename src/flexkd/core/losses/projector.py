"""The learned map between two widths, the baseline that Flex-KD does without."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from flexkd.core.projection import LinearMap
from flexkd.core.tensors import num_processes
from flexkd.errors import ShapeError


class _SharedParameter(torch.autograd.Function):
    """A parameter whose gradient is the mean over processes."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        if num_processes() > 1:
            dist.all_reduce(total)
            total /= num_processes()
        return total


class Projector(nn.Module):
    """Learned linear map from student to teacher width, for the loss `projector`.

    It lives in the objective, never in the student. Its gradients are averaged over processes here, since no
    DistributedDataParallel wraps it.

    Source:
        Romero et al., FitNets, 2014, arXiv:1412.6550, sec. 2.2.
    """

    def __init__(self, student_size: int, teacher_size: int) -> None:
        super().__init__()
        if min(student_size, teacher_size) < 1:
            raise ShapeError(f"Projector: from {student_size} to {teacher_size} units. Give both widths, 1 or more.")
        self.map = nn.Linear(student_size, teacher_size)

    def begin_with(self, linear_map: LinearMap) -> None:
        """Replace the random weights by a map of the same widths."""
        with torch.no_grad():
            self.map.weight.copy_(linear_map.weight)
            self.map.bias.copy_(linear_map.bias)

    def forward(self, states: Float[Tensor, "positions student_units"]) -> Float[Tensor, "positions teacher_units"]:
        """Project states of the student to the teacher's width.

        Raises:
            ShapeError: The states are of another width.
        """
        if states.shape[-1] != self.map.in_features:
            raise ShapeError(
                f"features: {states.shape[-1]} units of the student for a Projector from {self.map.in_features} to "
                f"{self.map.out_features}. Make it for the widths of both models."
            )
        weight: Tensor = _SharedParameter.apply(self.map.weight)  # type: ignore[no-untyped-call]
        bias: Tensor = _SharedParameter.apply(self.map.bias)  # type: ignore[no-untyped-call]
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.float(), weight, bias)
