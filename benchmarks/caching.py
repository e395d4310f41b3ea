"""Sides whose teacher ran before: students that learn from stored answers, and whole runs that store them first."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from transformers import PreTrainedModel, PrinterCallback

from benchmarks.objectives import cached
from benchmarks.pairs import Work
from benchmarks.setting import Setting, batches_of, student_of, teacher_of
from benchmarks.sides import our_trainer
from benchmarks.stepping import stepwise
from flexkd.core.objective import Objective, Signal
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest

EPOCHS: Final = 3


class StoredTeacher:
    """Answers by the ids of a whole batch, from memory."""

    def __init__(self, signals: Mapping[tuple[str, ...], Signal]) -> None:
        self.signals = signals

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        """What was stored."""
        return self.signals[tuple(batch["example_id"])]


@contextmanager
def cached_step(setting: Setting) -> Iterator[Work]:
    """An optimizer step of a student with labels and stored answers."""
    objective = cached(setting)
    stored = _stored(setting, _live(setting), objective)
    with stepwise(our_trainer(setting, student_of(setting), objective, stored)) as step:
        yield step


@contextmanager
def cached_run(setting: Setting) -> Iterator[Work]:
    """A whole run: every answer stored, then epochs of the student that read them."""
    objective, live, student = cached(setting), _live(setting), student_of(setting)

    def work() -> None:
        stored = _stored(setting, live, objective)
        _epochs(setting, student, objective, stored)

    yield work


@contextmanager
def separate_run(setting: Setting) -> Iterator[Work]:
    """The two parts of that run: a pass of the teacher whose answers are dropped, and epochs with answers at hand."""
    objective, live, student = cached(setting), _live(setting), student_of(setting)
    stored, request = _stored(setting, live, objective), SignalRequest.of(objective)

    def work() -> None:
        for batch in batches_of(setting):
            live.signal(batch, request)
        _epochs(setting, student, objective, stored)

    yield work


def _live(setting: Setting) -> LiveTeacher:
    return LiveTeacher(teacher_of(setting), precision=torch.bfloat16)


def _stored(setting: Setting, live: LiveTeacher, objective: Objective) -> StoredTeacher:
    request = SignalRequest.of(objective)
    return StoredTeacher({tuple(batch["example_id"]): live.signal(batch, request) for batch in batches_of(setting)})


def _epochs(setting: Setting, student: PreTrainedModel, objective: Objective, teacher: StoredTeacher) -> None:
    trainer = our_trainer(setting, student, objective, teacher, max_steps=EPOCHS * setting.num_batches)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
