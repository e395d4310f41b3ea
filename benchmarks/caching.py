"""Sides with a cached teacher: training steps that read a cache, and whole runs that build it first."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from transformers import PreTrainedModel, PrinterCallback

from benchmarks.objectives import cached
from benchmarks.pairs import Work
from benchmarks.setting import Setting, batches_of, collate, rows_of, student_of, teacher_of
from benchmarks.sides import our_trainer
from benchmarks.stepping import stepwise
from flexkd.core.objective import Objective, Signal
from flexkd.teacher.cache.columns import merged
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.cache.writer import TEACHER_BATCH_SIZE, CachePlan
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest, Teacher

EPOCHS: Final = 3


@contextmanager
def cached_step(setting: Setting) -> Iterator[Work]:
    """An optimizer step with labels and a cached teacher."""
    objective = cached(setting)
    with TemporaryDirectory() as folder:
        teacher = _built(setting, _live(setting), objective, folder)
        with stepwise(our_trainer(setting, student_of(setting), objective, teacher)) as step:
            yield step


@contextmanager
def cached_run(setting: Setting) -> Iterator[Work]:
    """A whole run: building the cache, then epochs of the student that read it."""
    objective, live, student = cached(setting), _live(setting), student_of(setting)

    def work() -> None:
        with TemporaryDirectory() as folder:
            _epochs(setting, student, objective, _built(setting, live, objective, folder))

    yield work


@contextmanager
def separate_run(setting: Setting) -> Iterator[Work]:
    """The parts of such a run without the cache: a pass of the teacher, and epochs with its signals in memory."""
    objective, live, student = cached(setting), _live(setting), student_of(setting)
    request = SignalRequest.of(objective)
    teacher = _InMemory({tuple(batch["example_id"]): live.signal(batch, request) for batch in batches_of(setting)})

    def work() -> None:
        for batch in batches_of(setting, TEACHER_BATCH_SIZE):
            live.signal(batch, request)
        _epochs(setting, student, objective, teacher)

    yield work


def bytes_a_token(setting: Setting, _: int, *, storage: str) -> list[float]:
    """Bytes for each supervised token, of a cache with units and the 32 likeliest outputs; always the same."""
    with TemporaryDirectory() as folder:
        teacher = _built(setting, _live(setting), cached(setting), folder, storage)
        return [teacher.bytes / sum(entry.positions for entry in teacher.manifest.written)]


class _InMemory:
    """A teacher that costs nothing: its signals are in memory, by the ids of the batch."""

    def __init__(self, signals: Mapping[tuple[str, ...], Signal]) -> None:
        self.signals = signals

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        return self.signals[tuple(batch["example_id"])]


def _live(setting: Setting) -> LiveTeacher:
    return LiveTeacher(teacher_of(setting), precision=torch.bfloat16)


def _built(
    setting: Setting, live: LiveTeacher, objective: Objective, folder: str, storage: str = "float16"
) -> CachedTeacher:
    request = merged([SignalRequest.of(objective)])[0]
    return CachePlan(live, request, rows_of(setting), collate, storage).build(Path(folder), {})


def _epochs(setting: Setting, student: PreTrainedModel, objective: Objective, teacher: Teacher) -> None:
    trainer = our_trainer(setting, student, objective, teacher, max_steps=EPOCHS * setting.num_batches)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
