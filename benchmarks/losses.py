"""Sides that are only a logit loss, forward and backward, from the states before the two heads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.objectives import kd
from benchmarks.pairs import Work
from benchmarks.setting import Setting, bfloat16
from flexkd.core.objective import StepCounts
from flexkd.core.outputs import Head, HeadOutputs
from flexkd.models.forward.chunks import CHUNK_BYTES

Loss = Callable[[Tensor, nn.Linear, Tensor, nn.Linear], Tensor]
"""From the student's states and head, and the teacher's states and head, to the mean divergence."""


@contextmanager
def loss_work(setting: Setting, make: Callable[[Setting], Loss]) -> Iterator[Work]:
    """The loss and its gradients by the student's states and head, under autocast."""
    generator = torch.Generator().manual_seed(4)
    num_states = max(round(setting.rows * setting.length * setting.share), 1)
    widths = setting.student.hidden_size, setting.teacher.hidden_size
    states = [torch.randn(num_states, width, generator=generator) for width in widths]
    torch.manual_seed(5)
    student, teacher = (nn.Linear(width, setting.vocabulary, bias=False) for width in widths)
    teacher.requires_grad_(False)
    loss = make(setting)

    def work() -> None:
        leaf = states[0].clone().requires_grad_()
        with bfloat16():
            value = loss(leaf, student, states[1], teacher)
        value.backward()  # type: ignore[no-untyped-call]
        student.zero_grad()

    yield work


def chunked(setting: Setting) -> Loss:
    """The loss of flexkd, with logits computed in chunks."""
    objective, chunk_size = kd(setting), max(CHUNK_BYTES // (4 * setting.vocabulary), 1)
    cast: dict[nn.Linear, Tensor] = {}

    def loss(states: Tensor, head: nn.Linear, teacher_states: Tensor, teacher_head: nn.Linear) -> Tensor:
        # As in `LiveTeacher`, whose head is cast once, not in every step.
        if teacher_head not in cast:
            cast[teacher_head] = teacher_head.weight.to(torch.bfloat16)
        weight = cast[teacher_head]
        teacher_outputs = HeadOutputs(teacher_states, Head(lambda part: F.linear(part.to(weight.dtype), weight)))
        outputs, labels = HeadOutputs(states, Head(head, weight=head.weight)), _unused_labels(states)
        return objective.predictions(outputs, teacher_outputs, labels, _counts(states), chunk_size=chunk_size).loss

    return loss


def whole(setting: Setting) -> Loss:
    """The loss of flexkd, with all logits in memory."""
    objective = kd(setting)

    def loss(states: Tensor, head: nn.Linear, teacher_states: Tensor, teacher_head: nn.Linear) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_states)
        return objective.predictions(head(states), teacher_logits, _unused_labels(states), _counts(states)).loss

    return loss


def _unused_labels(states: Tensor) -> Tensor:
    return torch.zeros(len(states), dtype=torch.long)


def _counts(states: Tensor) -> StepCounts:
    return StepCounts(len(states), 0, 0)
