"""Memory of a run stage by stage, and what it would be with other settings."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.plan.memory import Lesson, StepBytes, step_bytes
from flexkd.plan.result import Knob, StageMemory
from flexkd.plan.rows import Rows
from flexkd.plan.teaching import chunk_of, fine_tuning_lesson
from flexkd.recipe import Recipe

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
    """

    recipe: Recipe
    lesson: Lesson
    teacher: PreTrainedModel
    rows: Rows
    besides: Mapping[str, int]

    def stages(self) -> tuple[StageMemory, ...]:
        """The teacher's fine-tuning, the student's training and its evaluations."""
        found = [self.training(), self._evaluation()]
        return tuple(found if self.recipe.teacher.fine_tune is None else [self._fine_tuning(), *found])

    def training(self) -> StageMemory:
        """The student's training."""
        return self._training("training", self.lesson)

    def _training(self, name: str, lesson: Lesson, teacher_weights: int | None = None) -> StageMemory:
        weights = self._teacher_weights() if teacher_weights is None else teacher_weights
        return _stage(name, self._standing(weights), step_bytes(lesson))

    def _evaluation(self) -> StageMemory:
        count = max(self.lesson.batch.rows, EVALUATION_ROWS)
        batch = self.rows.splits["validation"].heaviest(count)
        chunk = chunk_of(self.recipe, self.lesson.student, batch)
        lesson = replace(self.lesson, batch=batch, chunk_size=chunk)
        return _stage("evaluation", self._standing(self._teacher_weights()), step_bytes(lesson, training=False))

    def _fine_tuning(self) -> StageMemory:
        lesson = fine_tuning_lesson(self.recipe, self.lesson, self.teacher, self.rows)
        return _stage("teacher's fine-tuning", _learning("teacher", self.teacher, lesson.objective), step_bytes(lesson))

    def _standing(self, teacher_weights: int) -> dict[str, int]:
        student = _learning("student", self.lesson.student, self.lesson.objective)
        return {"teacher's weights": teacher_weights, **student, **self.besides}

    def knobs(self) -> Iterator[Knob]:
        """Settings of training that are not in use, each by itself."""
        lesson, section = self.lesson, self.recipe.training
        if not section.gradient_checkpointing:
            yield self._knob("training.gradient_checkpointing=true", replace(lesson, checkpointing=True))
        else:
            yield self._knob("training.gradient_checkpointing=false", replace(lesson, checkpointing=False))
        half = lesson.batch.rows // 2
        if half and section.batch_size % half == 0:
            batch = self.rows.splits["train"].heaviest(half)
            chunk = chunk_of(self.recipe, lesson.student, batch)
            smaller = replace(lesson, batch=batch, chunk_size=chunk, accumulates=True)
            yield self._knob(f"training.per_device_batch_size={half}", smaller)
        if lesson.chunk_size is not None:
            yield self._knob("whole logits, not chunks of them", replace(lesson, chunk_size=None))
        if lesson.objective.needs_teacher:
            cached = self._training("", replace(lesson, teacher=None), teacher_weights=0)
            yield Knob("the teacher's answers from a cache", cached.peak)

    def _knob(self, setting: str, lesson: Lesson) -> Knob:
        return Knob(setting, self._training("", lesson).peak)

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
