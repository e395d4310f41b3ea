"""Sides of ratios, each with its own models and one unit of work: flexkd's trainings, scoring, and plain loops."""

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
    """The trainer of flexkd with the settings that all sides share."""
    return DistillationTrainer(
        model=student,
        teacher=teacher,
        objective=objective,
        args=arguments(TrainingArguments, setting.rows, **more),
        train_dataset=rows_of(setting),
        data_collator=collate,
    )


@contextmanager
def our_step(setting: Setting, make_objective: MakeObjective) -> Iterator[Work]:
    """An optimizer step of `DistillationTrainer` with a teacher that runs on every batch."""
    objective = make_objective(setting)
    teacher = teacher_of(setting) if objective.needs_teacher else None
    with stepwise(our_trainer(setting, student_of(setting), objective, teacher)) as step:
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
def bare_step(setting: Setting, make_objective: MakeObjective) -> Iterator[Work]:
    """The same losses in a loop of a few lines: no trainer, no hooks, no checks."""
    student, teacher, objective = student_of(setting).train(), teacher_of(setting), make_objective(setting)
    assert objective.features is not None
    (pair,) = objective.features.layers
    units = pair.units.teacher if pair.units is not None else torch.arange(setting.teacher.hidden_size)
    weight = teacher.get_output_embeddings().weight.to(torch.bfloat16)
    teacher_head = Head(lambda states: F.linear(states.to(weight.dtype), weight))
    optimizer, batches = bare_optimizer([*student.parameters(), *objective.parameters()]), cycle(batches_of(setting))
    chunks = LogitChunks(student, "auto")

    def work() -> None:
        batch = next(batches)
        supervised, labels = _supervised(batch)
        with bfloat16():
            teacher_states = _body(teacher, batch)[supervised]
            states = _body(student, batch)[supervised]
            counts = StepCounts(len(labels), len(labels), len(labels))
            size = chunks.size(batch, len(labels))
            outputs = HeadOutputs(states, head_of(student)) if size else head_of(student)(states)
            teacher_outputs = HeadOutputs(teacher_states, teacher_head)
            predictions = objective.predictions(outputs, teacher_outputs, labels, counts, chunk_size=size)
            signal = Signal(None, (teacher_states[:, units],))
            value = objective(Signal(None, (states,)), signal, labels, counts, predictions)
        finish_step(value.loss, optimizer)

    yield work


@contextmanager
def plain_step(setting: Setting) -> Iterator[Work]:
    """Flex-KD and KD as in a plain script: all hidden states and logits of both models, and the formulas spelt out."""
    student, teacher, units = student_of(setting).train(), teacher_of(setting), taught_units(setting)
    optimizer, batches = bare_optimizer(list(student.parameters())), cycle(batches_of(setting))

    def work() -> None:
        batch = next(batches)
        supervised, labels = _supervised(batch)
        with bfloat16():
            with torch.no_grad():
                teacher_outputs = _run(teacher, batch, output_hidden_states=True)
            outputs = _run(student, batch, output_hidden_states=True)
        p, q = (F.log_softmax(part.logits.float(), -1) for part in (teacher_outputs, outputs))
        divergence = F.kl_div(q[supervised], p[supervised], reduction="sum", log_target=True) / len(labels)
        x = outputs.hidden_states[-1][supervised].float()
        y = teacher_outputs.hidden_states[-1][supervised][:, units].float()
        correlation = F.cosine_similarity(x - x.mean(0), y - y.mean(0), dim=0)
        finish_step(divergence + (1 - correlation).square().mean(), optimizer)

    yield work


def _run(model: PreTrainedModel, batch: Batch, **more: Any) -> Any:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **more)


def _body(model: PreTrainedModel, batch: Batch) -> Tensor:
    states: Tensor = _run(model.base_model, batch).last_hidden_state
    return states


def _supervised(batch: Batch) -> tuple[Tensor, Tensor]:
    """Mask of the positions whose next token is a label, and these labels."""
    next_labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    return next_labels != IGNORE_INDEX, next_labels[next_labels != IGNORE_INDEX]


def bare_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the Trainer, with the same settings."""
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)


def finish_step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Backward, clipping, and the optimizer."""
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
