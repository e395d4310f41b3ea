"""Memory of a run stage by stage, and what it would be with other settings."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.plan.memory import Lesson, StepBytes, step_bytes
from flexkd.plan.result import Knob, StageMemory
from flexkd.plan.rows import Rows
from flexkd.plan.steps import chunk_of, fine_tuning_lesson
from flexkd.recipe import Recipe
from flexkd.teacher.cache.writer import TEACHER_BATCH_SIZE

EVALUATION_ROWS: Final = 32
"""Rows of an evaluation's batch, at least."""

_PACKED: Final = {"8bit": 1.0, "4bit": 0.52}
"""Bytes of a packed weight, its share of the scales among them."""

_ADAM: Final = 8
"""Bytes of AdamW's two moments of a weight, in float32."""


@dataclass(frozen=True)
class Memory:
    """What stands in memory during the stages of one run.

    Attributes:
        recipe: Of the run.
        lesson: A step of the student's training, the teacher in it where it runs.
        teacher: It is loaded even where it does not run.
        rows: In tokens.
        besides: Bytes of what else is kept on a machine without a device of its own, by name.
        teacher_goes: Where it does not run in a step, its weights leave the device.
    """

    recipe: Recipe
    lesson: Lesson
    teacher: PreTrainedModel
    rows: Rows
    besides: Mapping[str, int]
    teacher_goes: bool

    def stages(self) -> tuple[StageMemory, ...]:
        """The teacher's fine-tuning, its answers to all rows, the student's training and its evaluations."""
        found = [self.training(), self._evaluation()]
        if self.lesson.teacher is None and self.lesson.objective.needs_teacher:
            found.insert(0, self._answering())
        if self.recipe.teacher.fine_tune is not None:
            found.insert(0, self._fine_tuning())
        return tuple(found)

    def training(self) -> StageMemory:
        """The student's training."""
        return self._training(self.lesson)

    def _training(self, lesson: Lesson) -> StageMemory:
        return _stage("training", self._standing(lesson), step_bytes(lesson))

    def _evaluation(self) -> StageMemory:
        lesson = self._with_rows(self.lesson, "validation", max(self.lesson.batch.rows, EVALUATION_ROWS))
        return _stage("evaluation", self._standing(lesson), step_bytes(lesson, training=False))

    def _answering(self) -> StageMemory:
        lesson = self._with_rows(replace(self.lesson, teacher=self.teacher), "train", TEACHER_BATCH_SIZE)
        read = step_bytes(lesson, training=False).teacher
        weights = self._teacher_weights()
        return StageMemory(
            "teacher's answers", {"teacher's weights": weights, "teacher's forward": read}, weights + read
        )

    def _fine_tuning(self) -> StageMemory:
        lesson = fine_tuning_lesson(self.recipe, self.lesson, self.teacher, self.rows)
        standing = _learning("teacher", self.teacher, lesson.objective)
        return _stage("teacher's fine-tuning", standing, step_bytes(lesson))

    def _with_rows(self, lesson: Lesson, split: str, count: int) -> Lesson:
        batch = self.rows.splits[split].heaviest(count)
        return replace(
            lesson, batch=batch, chunk_size=chunk_of(lesson.student, batch, self.recipe.training.logit_chunk)
        )

    def _standing(self, lesson: Lesson) -> dict[str, int]:
        """What the student's training holds all the time."""
        away = lesson.teacher is None and self.teacher_goes
        teacher = {} if away else {"teacher's weights": self._teacher_weights()}
        head: Any = self.teacher.get_output_embeddings()
        if lesson.teacher is not None and lesson.teacher_autocast is not None and head is not None:
            # Cast once, not for each chunk of predictions.
            teacher["teacher's weights"] += head.weight.numel() * lesson.teacher_autocast.itemsize
        return {**teacher, **_learning("student", lesson.student, lesson.objective), **self.besides}

    def knobs(self) -> Iterator[Knob]:
        """Settings of training that are not in use, each by itself."""
        lesson, section = self.lesson, self.recipe.training
        if not section.gradient_checkpointing:
            yield self._knob("training.gradient_checkpointing=true", replace(lesson, checkpointing=True))
        else:
            yield self._knob("training.gradient_checkpointing=false", replace(lesson, checkpointing=False))
        half = lesson.batch.rows // 2
        if half and section.batch_size % half == 0:
            smaller = self._with_rows(replace(lesson, accumulates=True), "train", half)
            yield self._knob(f"training.per_device_batch_size={half}", smaller)
        for setting in ("auto", "off"):
            chunk = chunk_of(lesson.student, lesson.batch, setting)
            if section.logit_chunk != setting and chunk != lesson.chunk_size:
                yield self._knob(f"training.logit_chunk={setting}", replace(lesson, chunk_size=chunk))
        if lesson.teacher is not None:
            yield self._knob("teacher.cache=always", replace(lesson, teacher=None))

    def _knob(self, setting: str, lesson: Lesson) -> Knob:
        return Knob(setting, self._training(lesson).peak)

    def _teacher_weights(self) -> int:
        """As they are held; of quantised ones the matrices below the head are packed."""
        total = weight_bytes(self.teacher)
        packing = self.recipe.teacher.quantization
        if packing is None:
            return total
        outside = {id(module.weight) for module in _outside(self.teacher)}
        packed = [p for p in self.teacher.parameters() if p.ndim > 1 and id(p) not in outside]
        return total - sum(p.nbytes for p in packed) + round(_PACKED[packing] * sum(p.numel() for p in packed))


def weight_bytes(model: torch.nn.Module) -> int:
    """Of all parameters and buffers, tied ones once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _outside(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Modules that quantization leaves as they are."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if module is head or isinstance(module, torch.nn.Embedding)]


def _learning(role: str, model: PreTrainedModel, objective: Objective) -> dict[str, int]:
    """What a model that learns holds all the time."""
    own = list(objective.parameters())
    trained = [parameter for parameter in (*model.parameters(), *own) if parameter.requires_grad]
    return {
        f"{role}'s weights": weight_bytes(model) + sum(parameter.nbytes for parameter in own),
        "optimizer": sum(_ADAM * parameter.numel() for parameter in trained),
    }


def _stage(name: str, standing: Mapping[str, int], step: StepBytes) -> StageMemory:
    moving = {
        "gradients": step.gradients,
        "teacher's forward": step.teacher,
        "activations": step.activations,
        "logits and losses": step.outputs,
    }
    return StageMemory(name, {**standing, **moving}, sum(standing.values()) + step.peak)
