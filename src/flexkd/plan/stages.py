"""Memory of a run, stage by stage, and with other settings."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.plan.memory import PlannedStep, StepBytes, step_bytes, teacher_bytes
from flexkd.plan.result import Knob, StageMemory
from flexkd.plan.rows import RowLengths
from flexkd.plan.steps import chunk_of, fine_tuning_step, rival_step
from flexkd.recipe import Recipe
from flexkd.teacher.cache.writer import TEACHER_BATCH_SIZE

EVALUATION_ROWS: Final = 32
"""Smallest batch of an evaluation, in rows."""

_PACKED: Final = {"8bit": 1.0, "4bit": 0.52}
"""Bytes of a quantized weight, with its share of the scales."""

_ADAM: Final = 8
"""Bytes of AdamW's two moments of a weight, in float32."""


@dataclass(frozen=True)
class Memory:
    """Memory during the stages of one run.

    Attributes:
        step: A step of the student's training, with the teacher if it runs on every batch.
        teacher: Loaded even where it does not run in a step.
        lengths: How long the rows are.
        besides: Bytes of whatever else is kept in memory on a machine without an accelerator, by name.
        teacher_goes: Whether the teacher's weights leave the device where it does not run in a step.
        rivals: Models off the shelf that are fine-tuned after the student, by name.
    """

    recipe: Recipe
    step: PlannedStep
    teacher: PreTrainedModel
    lengths: RowLengths
    besides: Mapping[str, int]
    teacher_goes: bool
    rivals: Mapping[str, PreTrainedModel] = field(default_factory=dict)

    def stages(self) -> tuple[StageMemory, ...]:
        """The teacher's fine-tuning, its answers to all rows, the student's training and its evaluations."""
        stages = [self.training(), self._evaluation(), *self._rivals()]
        if self.step.teacher is None and self.step.objective.needs_teacher:
            stages.insert(0, self._answering())
        if self.recipe.teacher.fine_tune is not None:
            stages.insert(0, self._fine_tuning())
        return tuple(stages)

    def training(self) -> StageMemory:
        """The student's training."""
        return self._training(self.step)

    def _training(self, step: PlannedStep) -> StageMemory:
        return _stage("training", self._standing(step), step_bytes(step))

    def _evaluation(self) -> StageMemory:
        step = self._with_rows(self.step, "validation", max(self.step.batch.num_rows, EVALUATION_ROWS))
        return _stage("evaluation", self._standing(step), step_bytes(step, training=False))

    def _answering(self) -> StageMemory:
        step = self._with_rows(replace(self.step, teacher=self.teacher), "train", TEACHER_BATCH_SIZE)
        forward, weights = teacher_bytes(step), self._teacher_weights()
        parts = {"teacher's weights": weights, "teacher's forward": forward}
        return StageMemory("teacher's answers", parts, weights + forward)

    def _fine_tuning(self) -> StageMemory:
        step = fine_tuning_step(self.recipe, self.step, self.teacher, self.lengths)
        standing = _learning("teacher", self.teacher, step.objective)
        return _stage("teacher's fine-tuning", standing, step_bytes(step))

    def _rivals(self) -> Iterator[StageMemory]:
        """The largest rival's fine-tuning, beside the student and the teacher where these stay."""
        if not self.rivals:
            return
        rival = max(self.rivals.values(), key=weight_bytes)
        step = rival_step(self.recipe, self.step, rival)
        stays = {} if self.teacher_goes else {"teacher's weights": self._teacher_weights()}
        beside = {"student's weights": weight_bytes(self.step.student)}
        standing = {**stays, **beside, **_learning("rival", rival, step.objective)}
        yield _stage("rival's fine-tuning", standing, step_bytes(step))

    def _with_rows(self, step: PlannedStep, split: str, count: int) -> PlannedStep:
        return replace(step, batch=self.lengths.splits[split].heaviest(count))

    def _standing(self, step: PlannedStep) -> dict[str, int]:
        """Bytes that are held throughout the student's training, by name."""
        is_away = step.teacher is None and self.teacher_goes
        teacher = {} if is_away else {"teacher's weights": self._teacher_weights()}
        return {**teacher, **_learning("student", step.student, step.objective), **self.besides}

    def knobs(self) -> Iterator[Knob]:
        """Other settings of training, changed one at a time."""
        step, section = self.step, self.recipe.training
        if not section.gradient_checkpointing:
            yield self._knob("training.gradient_checkpointing=true", replace(step, checkpointing=True))
        else:
            yield self._knob("training.gradient_checkpointing=false", replace(step, checkpointing=False))
        half = step.batch.num_rows // 2
        if half and section.batch_size % half == 0:
            smaller = self._with_rows(replace(step, accumulates=True), "train", half)
            yield self._knob(f"training.per_device_batch_size={half}", smaller)
        chunks = {name: chunk_of(step.student, step.batch, name) for name in (step.logit_chunk, "auto", "off")}
        for setting in ("auto", "off"):
            if chunks[setting] != chunks[step.logit_chunk]:
                yield self._knob(f"training.logit_chunk={setting}", replace(step, logit_chunk=setting))
        if step.teacher is not None:
            yield self._knob("teacher.cache=always", replace(step, teacher=None))

    def _knob(self, setting: str, step: PlannedStep) -> Knob:
        return Knob(setting, self._training(step).peak)

    def _teacher_weights(self) -> int:
        """Bytes of the teacher's weights; quantization packs the matrices below the head."""
        total = weight_bytes(self.teacher)
        packing = self.recipe.teacher.quantization
        if packing is None:
            return total
        outside = {id(module.weight) for module in _outside(self.teacher)}
        packed = [p for p in self.teacher.parameters() if p.ndim > 1 and id(p) not in outside]
        return total - sum(p.nbytes for p in packed) + round(_PACKED[packing] * sum(p.numel() for p in packed))


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers; tied ones count once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _outside(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Modules that quantization leaves as they are."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if module is head or isinstance(module, torch.nn.Embedding)]


def _learning(role: str, model: PreTrainedModel, objective: Objective) -> dict[str, int]:
    """Bytes that a model in training holds throughout, by name."""
    projector_weights = list(objective.parameters())
    trained = [parameter for parameter in (*model.parameters(), *projector_weights) if parameter.requires_grad]
    return {
        f"{role}'s weights": weight_bytes(model) + sum(parameter.nbytes for parameter in projector_weights),
        "optimizer": sum(_ADAM * parameter.numel() for parameter in trained),
    }


def _stage(name: str, standing: Mapping[str, int], size: StepBytes) -> StageMemory:
    moving = {
        "gradients": size.gradients,
        "teacher's forward": size.teacher,
        "activations": size.activations,
        "logits and losses": size.outputs,
    }
    return StageMemory(name, {**standing, **moving}, sum(standing.values()) + size.peak)
