"""Sides of ratios: each makes its own models and gives one unit of work; our trainings, scoring and plain loops."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from benchmarks.pairs import Work
from benchmarks.setting import (
    Batch,
    Setting,
    batches_of,
    bfloat16,
    collate,
    rows_of,
    student_of,
    taught_units,
    teacher_of,
)
from benchmarks.stepping import arguments, stepwise
from flexkd import DistillationTrainer, score_units
from flexkd.core.objective import Objective, Signal, StepCounts
from flexkd.core.outputs import Head, HeadOutputs
from flexkd.core.tensors import IGNORE_INDEX
from flexkd.models.forward.chunks import LogitChunks
from flexkd.models.forward.head import head_of
from flexkd.teacher.signal import Teacher

MakeObjective = Callable[[Setting], Objective]


def our_trainer(
    setting: Setting, student: PreTrainedModel, objective: Objective, teacher: nn.Module | Teacher | None, **more: Any
) -> DistillationTrainer:
    """Our trainer with the settings that every side has."""
    return DistillationTrainer(
        model=student,
        teacher=teacher,
        objective=objective,
        args=arguments(TrainingArguments, setting.rows, **more),
        train_dataset=rows_of(setting),
        data_collator=collate,
    )


@contextmanager
def our_step(setting: Setting, objective: MakeObjective) -> Iterator[Work]:
    """An optimizer step of `DistillationTrainer` with a teacher that runs on every batch."""
    wanted = objective(setting)
    teacher = teacher_of(setting) if wanted.needs_teacher else None
    with stepwise(our_trainer(setting, student_of(setting), wanted, teacher)) as step:
        yield step


@contextmanager
def scoring(setting: Setting) -> Iterator[Work]:
    """A pass that scores all units of the teacher."""
    teacher, batches = teacher_of(setting), batches_of(setting)
    yield lambda: score_units(teacher, batches, precision=torch.bfloat16)


@contextmanager
def teacher_pass(setting: Setting) -> Iterator[Work]:
    """The teacher's logits of the same batches."""
    teacher, batches = teacher_of(setting), batches_of(setting)

    def work() -> None:
        with torch.no_grad(), bfloat16():
            for batch in batches:
                _run(teacher, batch)

    yield work


@contextmanager
def bare_step(setting: Setting, objective: MakeObjective) -> Iterator[Work]:
    """The same losses in a loop of a few lines: no trainer, no hooks, no checks."""
    student, teacher, wanted = student_of(setting).train(), teacher_of(setting), objective(setting)
    assert wanted.features is not None
    (pair,) = wanted.features.layers
    units = pair.units.teacher if pair.units is not None else torch.arange(setting.teacher.hidden_size)
    weight = teacher.get_output_embeddings().weight.to(torch.bfloat16)
    teacher_head = Head(lambda states: F.linear(states.to(weight.dtype), weight))
    optimizer, batches = bare_optimizer([*student.parameters(), *wanted.parameters()]), cycle(batches_of(setting))
    chunks = LogitChunks(student, "auto")

    def work() -> None:
        batch = next(batches)
        kept, labels = _supervised(batch)
        with bfloat16():
            theirs = _body(teacher, batch)[kept]
            ours = _body(student, batch)[kept]
            counts = StepCounts(len(labels), len(labels), len(labels))
            size = chunks.size(batch, len(labels))
            outputs = HeadOutputs(ours, head_of(student)) if size else head_of(student)(ours)
            found = wanted.predictions(outputs, HeadOutputs(theirs, teacher_head), labels, counts, chunk_size=size)
            signal = Signal(None, (theirs[:, units],))
            value = wanted(Signal(None, (ours,)), signal, labels, counts, found)
        finish_step(value.loss, optimizer)

    yield work


@contextmanager
def plain_step(setting: Setting) -> Iterator[Work]:
    """Flex-KD and KD as a script has them: all hidden states, all logits of both models, formulas written down."""
    student, teacher, units = student_of(setting).train(), teacher_of(setting), taught_units(setting)
    optimizer, batches = bare_optimizer(list(student.parameters())), cycle(batches_of(setting))

    def work() -> None:
        batch = next(batches)
        kept, labels = _supervised(batch)
        with bfloat16():
            with torch.no_grad():
                theirs = _run(teacher, batch, output_hidden_states=True)
            ours = _run(student, batch, output_hidden_states=True)
        p, q = (F.log_softmax(one.logits.float(), -1) for one in (theirs, ours))
        divergence = F.kl_div(q[kept], p[kept], reduction="sum", log_target=True) / len(labels)
        x, y = ours.hidden_states[-1][kept].float(), theirs.hidden_states[-1][kept][:, units].float()
        correlation = F.cosine_similarity(x - x.mean(0), y - y.mean(0), dim=0)
        finish_step(divergence + (1 - correlation).square().mean(), optimizer)

    yield work


def _run(model: PreTrainedModel, batch: Batch, **more: Any) -> Any:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **more)


def _body(model: PreTrainedModel, batch: Batch) -> Tensor:
    states: Tensor = _run(model.base_model, batch).last_hidden_state
    return states


def _supervised(batch: Batch) -> tuple[Tensor, Tensor]:
    """Positions whose next token is a label, and these labels."""
    following = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    return following != IGNORE_INDEX, following[following != IGNORE_INDEX]


def bare_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Of the kind and with the settings that the Trainer has."""
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)


def finish_step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Backward, clipping, and the optimizer."""
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([one for group in optimizer.param_groups for one in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
