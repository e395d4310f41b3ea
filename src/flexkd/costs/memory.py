"""Memory of a step: it runs on tensors without storage, and the bytes that they would hold are added up."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from flexkd.core.objective import Objective, Signal, StepCounts
from flexkd.core.outputs import Outputs, TopOutputs
from flexkd.costs.rows import Batch
from flexkd.costs.skeletons import outputs_of
from flexkd.models.forward.hidden import is_encoder_decoder, is_generative
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import PREFETCHED, BatchPositions, SignalRequest, Teacher
from flexkd.training.arguments import CHECKPOINTING
from flexkd.training.micro_batches import MICRO_BATCH, MicroBatch
from flexkd.training.step import DistillationStep

_BATCH: Final = "batch"
_TEACHER: Final = "teacher"
_BODY: Final = "student's body"
_LOSSES: Final = "logits and losses"
_BACKWARD: Final = "backward"


@dataclass(frozen=True)
class Phase:
    """Bytes in use before, during and after a part of a step."""

    before: int
    highest: int
    after: int

    @property
    def rise(self) -> int:
        """How far memory rises above where the phase began."""
        return self.highest - self.before


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor computed within it, until the tensor is freed.

    Attributes:
        now: Bytes in use.
        phases: Phases closed by `end_phase`, by name.

    Args:
        elsewhere: Tensors that are counted elsewhere, such as weights.
    """

    def __init__(self, elsewhere: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.phases: dict[str, Phase] = {}
        self._before = self._highest = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in elsewhere:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the tensors that it creates."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.now += size
        self._highest = max(self._highest, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size

    def end_phase(self, name: str) -> None:
        """Close the phase that began with the end of the last one, and begin the next."""
        self.phases[name] = Phase(self._before, self._highest, self.now)
        self._before = self._highest = self.now

    @property
    def peak(self) -> int:
        """The highest of all phases."""
        return max([self._highest, *(phase.highest for phase in self.phases.values())])


@dataclass(frozen=True)
class PlannedStep:
    """A training step on tensors without storage: one forward and backward of a student, and what it is taught.

    Attributes:
        mode: The mode that the tensors of both models belong to.
        student: With its low-rank updates, if it has any.
        objective: What is minimised.
        teacher: None: it does not run in the step.
        batch: Shape of the batch.
        teacher_widths: Units of the teacher's state of each pair of layers that the feature term compares.
        autocast: Type of the student's forward; None: that of its weights.
        teacher_autocast: Type of the teacher's forward, likewise.
        checkpointing: Whether activations are recomputed in the backward.
        logit_chunk: As in `DistillationTrainer`.
        accumulates: Whether gradients of earlier batches of the same step are in memory.
    """

    mode: FakeTensorMode
    student: PreTrainedModel
    objective: Objective
    teacher: PreTrainedModel | None
    batch: Batch
    teacher_widths: tuple[int, ...] = ()
    autocast: torch.dtype | None = None
    teacher_autocast: torch.dtype | None = None
    checkpointing: bool = False
    logit_chunk: int | str = "auto"
    accumulates: bool = False


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step besides weights and optimizer states.

    Attributes:
        teacher: How far memory rises while the teacher runs.
        activations: What the student's body keeps for the backward.
        outputs: How far memory rises while logits and losses are computed.
        gradients: Gradients of all trained weights.
        peak: Most bytes of all of these at the same moment; gradients grow while activations are freed.
    """

    teacher: int
    activations: int
    outputs: int
    gradients: int
    peak: int


def step_bytes(step: PlannedStep, *, training: bool = True) -> StepBytes:
    """Memory of one training step, or of one batch of an evaluation under its objective."""
    student, objective = step.student, step.objective
    trained = [p for p in (*student.parameters(), *objective.parameters()) if p.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained) if training else 0
    with step.mode, _training_mode(step, training=training), torch.set_grad_enabled(training):
        weights: list[Tensor] = [*_tensors(student), *objective.parameters()]
        if step.teacher is not None:
            weights += _tensors(step.teacher)
        if step.accumulates and training:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                weights.append(parameter.grad)
        with LiveBytes(weights) as live:
            _run(step, live, training=training)
        for parameter in trained:
            parameter.grad = None
    extra = gradients if step.accumulates and training else 0
    teacher, body, losses = (live.phases[name] for name in (_TEACHER, _BODY, _LOSSES))
    return StepBytes(teacher.rise, body.after - body.before, losses.rise, gradients, live.peak + extra)


def teacher_bytes(step: PlannedStep) -> int:
    """How far memory rises while the teacher answers the batch of a step."""
    assert step.teacher is not None, "a teacher runs in this step"
    live = LiveBytes(_tensors(step.teacher))
    with step.mode, live:
        batch = _batch(step)
        live.end_phase(_BATCH)
        LiveTeacher(step.teacher, precision=step.teacher_autocast).signal(batch, SignalRequest.of(step.objective))
        live.end_phase(_TEACHER)
    return live.phases[_TEACHER].rise


def _run(step: PlannedStep, live: LiveBytes, *, training: bool) -> None:
    # The phases are ended by whoever is called last in each, not here:
    #
    #   DistillationStep     teacher.signal     student's blocks     head, logits, losses     backward
    #   ended by             _WatchedTeacher    _watched_body        this function            this function
    #   memory               rises and falls    rises: activations   highest without chunks   activations are freed,
    #                                                                                         gradients grow
    batch = _batch(step)
    live.end_phase(_BATCH)
    teacher: Teacher = _StoredAnswers(step)
    if step.teacher is not None:
        teacher = LiveTeacher(step.teacher, precision=step.teacher_autocast)
    distillation_step = DistillationStep(
        step.student, _WatchedTeacher(teacher, live), step.objective, logit_chunk=step.logit_chunk
    )
    if not step.objective.needs_teacher:
        live.end_phase(_TEACHER)
    with _watched_body(step, live) as forward:
        loss = distillation_step(batch, is_training=training, forward=forward)
    live.end_phase(_LOSSES)
    if training:
        loss.value.loss.backward()
    live.end_phase(_BACKWARD)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@contextmanager
def _training_mode(step: PlannedStep, *, training: bool) -> Iterator[None]:
    """Within it the student is in train mode, with gradient checkpointing if the step says so."""
    student, is_checkpointed = step.student, step.checkpointing and training
    student.train(training)
    if is_checkpointed:
        _switch(student, "enable")(CHECKPOINTING)
    try:
        yield
    finally:
        student.train(False)
        if is_checkpointed:
            _switch(student, "disable")()


def _switch(model: PreTrainedModel, direction: str) -> Any:
    """The method that enables or disables gradient checkpointing, by its name in this version of transformers."""
    name = f"activation_checkpointing_{direction}"
    return getattr(model, name if hasattr(model, name) else f"gradient_checkpointing_{direction}")


@contextmanager
def _watched_body(step: PlannedStep, live: LiveBytes) -> Iterator[Callable[..., Any]]:
    """The student's forward in the precision of the step; it ends a phase where the head begins."""
    student = step.student

    def run(**inputs: Any) -> Any:
        with torch.autocast("cpu", step.autocast, enabled=step.autocast is not None):
            return student(**inputs)

    # As accelerate wraps the forward of a model that trains in autocast.
    forward: Callable[..., Any] = run if step.autocast is None else convert_outputs_to_fp32(run)

    def classify(**inputs: Any) -> Any:
        output = forward(**inputs)
        live.end_phase(_BODY)
        return output

    def before_head(*_: Any) -> None:
        # Only the first call ends a phase: with chunks the head is called again.
        hook.remove()
        live.end_phase(_BODY)

    if not is_generative(student):
        yield classify
        return
    hook = student.get_output_embeddings().register_forward_pre_hook(before_head)
    try:
        yield forward
    finally:
        hook.remove()


@dataclass(frozen=True)
class _WatchedTeacher:
    """A teacher whose signal ends a phase."""

    teacher: Teacher
    live: LiveBytes

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        signal = self.teacher.signal(batch, request)
        self.live.end_phase(_TEACHER)
        return signal


@dataclass(frozen=True)
class _StoredAnswers:
    """A teacher that does not run in the step, because a cache holds its answers."""

    step: PlannedStep

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        term, micro = self.step.objective.features, batch[MICRO_BATCH]
        widths: list[int] = []
        if term is not None:
            widths = [
                width if pair.units is None else len(pair.units.teacher)
                for pair, width in zip(term.layers, self.step.teacher_widths, strict=True)
            ]
        features = tuple(torch.zeros(micro.counts.positions, width) for width in widths)
        return Signal(self._outputs(len(micro.labels), request), features)

    def _outputs(self, predictions: int, request: SignalRequest) -> Outputs | None:
        top, student = request.top, self.step.student
        if top is not None:
            shape = predictions, top.k
            tail = torch.zeros(predictions)
            return TopOutputs(torch.zeros(shape), torch.zeros(shape, dtype=torch.int), tail, top.temperature)
        head: Any = student.get_output_embeddings()
        if not request.logits:
            return None
        if head is None:
            return torch.zeros(predictions, outputs_of(student))
        # As a cache holds the many outputs of a language model.
        return torch.zeros(predictions, head.weight.shape[0], dtype=torch.float16)


def _batch(step: PlannedStep) -> dict[str, Any]:
    """A batch as `prepare_step` would make it; of the positions that are read, only the number matters here."""
    shape, student = step.batch, step.student
    ids = torch.zeros(shape.num_rows, shape.source, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_encoder_decoder(student):
        target = torch.zeros(shape.num_rows, shape.target, dtype=torch.long)
        inputs |= {"decoder_input_ids": target, "decoder_attention_mask": torch.ones_like(target)}
    num_positions = _num_positions(step)
    positions = BatchPositions(
        None if step.objective.features is None else torch.zeros(num_positions, dtype=torch.long),
        torch.zeros(shape.predictions, dtype=torch.long) if is_generative(student) else None,
    )
    labels = _labels(step)
    counts = StepCounts(len(labels), num_positions, num_positions)
    return {**inputs, "labels": labels, MICRO_BATCH: MicroBatch(positions, labels, counts), PREFETCHED: positions}


def _labels(step: PlannedStep) -> Tensor:
    """One label for each prediction, or for each output where outputs are values or independent labels."""
    shape, student = step.batch, step.student
    if is_generative(student):
        return torch.zeros(shape.predictions, dtype=torch.long)
    if step.objective.task_loss == "cross_entropy":
        return torch.zeros(shape.num_rows, dtype=torch.long)
    return torch.zeros(shape.num_rows, outputs_of(student))


def _num_positions(step: PlannedStep) -> int:
    """Positions that the feature term reads."""
    shape, term = step.batch, step.objective.features
    if term is not None and term.positions == "supervised":
        return shape.predictions
    return shape.num_rows * (shape.target or shape.source)
