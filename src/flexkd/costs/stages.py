"""Memory of a run, stage by stage, and with other settings."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.costs.memory import PlannedStep, StepBytes, step_bytes, teacher_bytes
from flexkd.costs.result import Knob, StageMemory
from flexkd.costs.rows import RowLengths
from flexkd.costs.steps import chunk_of, fine_tuning_step, rival_step
from flexkd.models.forward.families import family_of
from flexkd.models.forward.hidden import model_blocks
from flexkd.models.slicing.calibration import stream_norms
from flexkd.models.slicing.rotation import is_tied
from flexkd.recipe import Recipe
from flexkd.teacher.cache.writer import TEACHER_BATCH_SIZE

EVALUATION_ROWS: Final = 32
"""Smallest batch of an evaluation, in rows."""

_PACKED: Final = {"8bit": 1.0, "4bit": 0.52}
"""Bytes of a quantized weight, with its share of the scales."""

_KEPT_SHARE: Final = 0.4
_KEPT_MOST: Final = 300_000_000
"""Gaps between blocks in use, which the allocator of a CPU cannot hand back: a share of what comes and goes, and at
most so many bytes, as large blocks are mapped by themselves; fitted to measured runs (docs/log.md, 2026-11-30)."""

_FLOAT32: Final = 4
_TWICE_FLOAT64: Final = 16
_NORM_BYTES: Final = 12
"""Bytes of an entry of a norm's second moment, added up in float64 and then kept in float32."""

MEASURING_BYTES: Final = 410_000_000
"""Resident memory of a process that measures a model, with its libraries and before the model."""

_MEASURED_ROWS: Final = 32
_ANSWERED_ROWS: Final = 16
"""Rows of one batch of a measurement: classified, or answered."""

CLASSIFIED_ROWS: Final = 64
"""Test rows of one batch of a classifier."""

_ADAM: Final = 8
"""Bytes of AdamW's two moments of a weight, in float32."""


@dataclass(frozen=True)
class HostWork:
    """Bytes of what a run does besides training, in the memory of a machine without an accelerator.

    Attributes:
        turned: The teacher in another basis, its head untied; 0: there is none.
        statistics: What calibration rows show of each norm, and the head twice in float64, for the geometry.
        test_rows: Test rows of one batch.
        answers: Keys and values of the teacher while it writes a batch, and logits of the references.
    """

    turned: int
    statistics: int
    test_rows: int
    answers: int

    @classmethod
    def of(cls, recipe: Recipe, teacher: PreTrainedModel, lengths: RowLengths, *, is_rotated: bool) -> "HostWork":
        """From the models without storage."""
        head: Any = teacher.get_output_embeddings()
        if head is None:
            return cls(weight_bytes(teacher) if is_rotated else 0, 0, CLASSIFIED_ROWS, 0)
        section, config = recipe.generation, teacher.config.get_text_config(decoder=True)
        assert section is not None, "filled in where text is written"
        vocab, width = head.weight.shape
        turned = weight_bytes(teacher) + (head.weight.nbytes if is_tied(teacher) else 0)
        norms = len(stream_norms(teacher, family_of(teacher))) if is_rotated else 0
        statistics = _NORM_BYTES * norms * width**2 + _TWICE_FLOAT64 * vocab * width
        batch = lengths.splits["test"].heaviest(min(section.batch_size, section.rows or section.batch_size))
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        tokens = batch.num_rows * (batch.source + (section.max_new_tokens or recipe.data.max_answer_length))
        # A token is appended by a copy of all before it.
        cache = 2 * 2 * tokens * config.num_hidden_layers * kv_heads * head_dim * _FLOAT32
        logits = 2 * batch.predictions * vocab * _FLOAT32
        return cls(turned if is_rotated else 0, statistics, batch.num_rows, cache + logits)


def _gathered(model: PreTrainedModel, *, training: bool) -> int:
    """Weights, in training with their gradients, that FSDP2 holds whole at a time: two blocks, embeddings and head."""
    blocks = [sum(weight.nbytes for weight in block.parameters()) for block in model_blocks(model)]
    weights = 2 * max(blocks) + sum(weight.nbytes for weight in model.parameters()) - sum(blocks)
    return 2 * weights if training else weights


@dataclass(frozen=True)
class Memory:
    """Memory during the stages of one run.

    Attributes:
        step: A step of the student's training, with the teacher if it runs on every batch.
        teacher: Loaded even where it does not run in a step.
        lengths: How long the rows are.
        besides: Bytes of whatever else is kept in memory in every stage, by name.
        teacher_goes: Whether the teacher's weights leave the device where it does not run in a step.
        rivals: Models off the shelf that are fine-tuned after the student, by name.
        host: What a run does in the memory of a machine without an accelerator besides training; None: with one.
        processes: Processes that divide the rows of a step; the figures are those of one of them.
        is_divided: Whether they divide weights, gradients and optimizer of a model that trains, too (FSDP2).
    """

    recipe: Recipe
    step: PlannedStep
    teacher: PreTrainedModel
    lengths: RowLengths
    besides: Mapping[str, int]
    teacher_goes: bool
    rivals: Mapping[str, PreTrainedModel] = field(default_factory=dict)
    host: "HostWork | None" = None
    processes: int = 1
    is_divided: bool = False

    def stages(self) -> tuple[StageMemory, ...]:
        """The teacher's fine-tuning, its answers to all rows, the student's training and its evaluations.

        On a machine without an accelerator the student's start and the test rows as well, which lie in its memory too.
        """
        stages = [self.training(), self._evaluation(), *self._rivals()]
        if self.step.teacher is None and self.step.objective.needs_teacher:
            stages.insert(0, self._answering())
        if self.host is not None and self.host.turned:
            stages.insert(0, self._cutting(self.host))
        if self.recipe.teacher.fine_tune is not None:
            stages.insert(0, self._fine_tuning())
        if self.host is not None:
            stages += [self._testing(self.host), self._measuring(self.host)]
        return tuple(stages)

    def _cutting(self, host: "HostWork") -> StageMemory:
        """The teacher beside the same in another basis, and matrices in float64 that find the basis."""
        standing = {"teacher's weights": self._teacher_weights(), "rotated teacher": host.turned, **self.besides}
        return self._stage("student's start", standing, {"statistics and geometry": host.statistics})

    def _testing(self, host: "HostWork") -> StageMemory:
        """Teacher and student answer the test rows, and follow the references."""
        step = self._with_rows(replace(self.step, teacher=self.teacher), "test", host.test_rows)
        weights = {"teacher's weights": self._teacher_weights(), "student's weights": weight_bytes(step.student)}
        moving = {"teacher's forward": teacher_bytes(step), "answers": host.answers}
        return self._stage("test rows", {**weights, **self.besides}, moving)

    def _measuring(self, host: "HostWork") -> StageMemory:
        """Every model in a process of its own, all at the same time, beside the run with its teacher and its student.

        Each is taken to need for a batch what the teacher needs, whose copy in int8 to be as large as itself.
        """
        models = [self.teacher, self.step.student, *self.rivals.values()]
        if self.recipe.rivals is not None and self.recipe.rivals.int8_teacher:
            models.append(self.teacher)
        rows = min(_MEASURED_ROWS if self.recipe.generation is None else _ANSWERED_ROWS, host.test_rows)
        forward = teacher_bytes(self._with_rows(replace(self.step, teacher=self.teacher), "test", rows))
        copies = _FLOAT32 * sum(parameter.numel() for model in models for parameter in model.parameters())
        standing = {
            "teacher's weights": self._teacher_weights(),
            "student's weights": weight_bytes(self.step.student),
            **self.besides,
            "processes that measure": len(models) * MEASURING_BYTES,
            "models in them": copies,
        }
        answers = round(host.answers * rows / host.test_rows)
        moving = {"forwards in them": len(models) * forward, "answers": len(models) * answers}
        return self._stage("speed and memory", standing, moving)

    def _stage(
        self, name: str, standing: Mapping[str, int], moving: Mapping[str, int], highest: int | None = None
    ) -> StageMemory:
        """A stage of what is held throughout and what comes and goes.

        Args:
            highest: Most bytes of what comes and goes at the same moment; None: of all of it together.
        """
        highest = sum(moving.values()) if highest is None else highest
        gaps = min(round(_KEPT_SHARE * highest), _KEPT_MOST) if self.host is not None else 0
        parts = {**standing, **moving, **({"gaps between freed blocks": gaps} if gaps else {})}
        return StageMemory(name, parts, sum(standing.values()) + highest + gaps)

    def _stepping(self, name: str, standing: Mapping[str, int], size: StepBytes, model: PreTrainedModel) -> StageMemory:
        moving = {
            "gradients": size.gradients,
            "teacher's forward": size.teacher,
            "activations": size.activations,
            "logits and losses": size.outputs,
        }
        if not self.is_divided:
            return self._stage(name, standing, moving, size.peak)
        # Not measured: the most of each part, as if all came at the same moment.
        moving["gradients"] //= self.processes
        return self._stage(name, standing, {**moving, "gathered blocks": _gathered(model, training=size.gradients > 0)})

    @property
    def network(self) -> int:
        """Bytes that a process sends in a step, in a ring that adds up the gradients of all trained weights.

        Where weights are divided they are gathered twice, for forward and backward, and gradients are scattered.
        """
        gradients = step_bytes(self.step).gradients
        rounds = 3 if self.is_divided else 2
        return round(rounds * (self.processes - 1) / self.processes * gradients)

    def training(self) -> StageMemory:
        """The student's training."""
        return self._training(self.step)

    def _training(self, step: PlannedStep) -> StageMemory:
        return self._stepping("training", self._standing(step), step_bytes(step), step.student)

    def _evaluation(self) -> StageMemory:
        step = self._with_rows(self.step, "validation", max(self.step.batch.num_rows, EVALUATION_ROWS))
        return self._stepping("evaluation", self._standing(step), step_bytes(step, training=False), step.student)

    def _answering(self) -> StageMemory:
        step = self._with_rows(replace(self.step, teacher=self.teacher), "train", TEACHER_BATCH_SIZE)
        standing = {"teacher's weights": self._teacher_weights(), **self.besides}
        return self._stage("teacher's answers", standing, {"teacher's forward": teacher_bytes(step)})

    def _fine_tuning(self) -> StageMemory:
        step = fine_tuning_step(self.recipe, self.step, self.teacher, self.lengths, processes=self.processes)
        standing = {**self._learning("teacher", self.teacher, step.objective), **self.besides}
        return self._stepping("teacher's fine-tuning", standing, step_bytes(step), self.teacher)

    def _rivals(self) -> Iterator[StageMemory]:
        """The largest rival's fine-tuning, beside the student and the teacher where these stay."""
        if not self.rivals:
            return
        rival = max(self.rivals.values(), key=weight_bytes)
        step = rival_step(self.recipe, self.step, rival)
        stays = {} if self.teacher_goes else {"teacher's weights": self._teacher_weights()}
        beside = {"student's weights": weight_bytes(self.step.student)}
        standing = {**stays, **beside, **self._learning("rival", rival, step.objective), **self.besides}
        yield self._stepping("rival's fine-tuning", standing, step_bytes(step), rival)

    def _with_rows(self, step: PlannedStep, split: str, count: int) -> PlannedStep:
        return replace(step, batch=self.lengths.splits[split].heaviest(count))

    def _standing(self, step: PlannedStep) -> dict[str, int]:
        """Bytes that are held throughout the student's training, by name."""
        is_away = step.teacher is None and self.teacher_goes
        teacher = {} if is_away else {"teacher's weights": self._teacher_weights()}
        return {**teacher, **self._learning("student", step.student, step.objective), **self.besides}

    def _learning(self, role: str, model: PreTrainedModel, objective: Objective) -> dict[str, int]:
        """Bytes that a model in training holds throughout, by name."""
        projector_weights = list(objective.parameters())
        trained = [parameter for parameter in (*model.parameters(), *projector_weights) if parameter.requires_grad]
        gradients = sum(parameter.nbytes for parameter in trained)
        weights = weight_bytes(model) + sum(parameter.nbytes for parameter in projector_weights)
        optimizer = sum(_ADAM * parameter.numel() for parameter in trained)
        if self.is_divided:
            return {f"{role}'s weights": weights // self.processes, "optimizer": optimizer // self.processes}
        return {
            f"{role}'s weights": weights,
            "optimizer": optimizer,
            # DistributedDataParallel keeps the gradients a second time, in the buckets in which they travel.
            **({"gradients on the way": gradients} if self.processes > 1 else {}),
        }

    def knobs(self) -> Iterator[Knob]:
        """Other settings of training, changed one at a time."""
        step, section = self.step, self.recipe.training
        if not section.gradient_checkpointing:
            yield self._knob("training.gradient_checkpointing=true", replace(step, checkpointing=True))
        else:
            yield self._knob("training.gradient_checkpointing=false", replace(step, checkpointing=False))
        half = step.batch.num_rows // 2
        if half and section.batch_size % (half * self.processes) == 0:
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
