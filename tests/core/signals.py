"""What an objective is given in the tests: random signals of a student and a teacher."""

from typing import Any

import torch
from torch import Tensor

from flexkd.core.losses import Projector
from flexkd.core.losses.lens import Lens
from flexkd.core.objective import Objective, Signal
from flexkd.core.outputs import Head
from flexkd.core.terms import FeatureTerm
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from tests.references.draws import classes, normal

UNITS = 4


def feature_term(name: str, student_units: int = UNITS, teacher_units: int = UNITS, **options: Any) -> FeatureTerm:
    """A feature term with what its loss needs: a projector, or heads of four outputs behind no norm."""
    facts = FEATURE_LOSS_FACTS[name]
    widths = student_units, teacher_units
    projectors = (Projector(*widths),) if facts.needs_projector else ()
    lenses = tuple(_lens_of(width) for width in widths) if facts.needs_heads else ()
    return FeatureTerm(name, projectors=projectors, lenses=lenses, **options)


def _lens_of(width: int) -> Lens:
    return Lens(lambda states: states, lambda: Head(lambda states: states @ torch.eye(width, 4)), 4)


def signals(rows: int, *, num_classes: int = 5, units: int = UNITS, seed: int = 1) -> tuple[Signal, Signal, Tensor]:
    """Student with gradients, teacher, labels; one state for each prediction."""
    student = Signal(
        normal(rows, num_classes, seed=seed).requires_grad_(), (normal(rows, units, seed=seed + 1).requires_grad_(),)
    )
    teacher = Signal(normal(rows, num_classes, seed=seed + 2), (normal(rows, units, seed=seed + 3),))
    return student, teacher, classes(rows, num_classes=num_classes, seed=seed + 4)


def part_of(signal: Signal, rows: slice) -> Signal:
    return Signal(None if signal.logits is None else signal.logits[rows], tuple(f[rows] for f in signal.features))


def gradients(loss: Tensor, student: Signal, objective: Objective | None = None) -> list[Tensor]:
    """Of the student's logits, of its features, and of the objective's own parameters."""
    assert student.logits is not None
    own = [] if objective is None else list(objective.parameters())
    return list(torch.autograd.grad(loss, [student.logits, *student.features, *own], retain_graph=True))
