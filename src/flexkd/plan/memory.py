"""Memory of a step, counted: it runs on tensors without storage, and the bytes that they would hold are added up."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from flexkd.core.objective import Objective, PredictionValue, Signal, StepCounts
from flexkd.core.outputs import Head, HeadOutputs, Outputs, TopOutputs
from flexkd.models.forward.head import head_of
from flexkd.models.forward.hidden import hooked_states, is_encoder_decoder, is_generative
from flexkd.plan.rows import Batch
from flexkd.teacher.live import student_columns, teacher_columns


class LiveBytes(TorchDispatchMode):
    """Within it, counts the storage of everything that is computed, until it is let go.

    Args:
        known: Tensors that are counted elsewhere, as weights.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it makes."""
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
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, size)

    def _let_go(self, size: int) -> None:
        self.now -= size

    def rise(self, work: Callable[[], Any]) -> tuple[Any, int]:
        """The result of some work, and how far memory rose above where it began."""
        before, highest = self.now, self.peak
        self.peak = self.now
        result = work()
        rise, self.peak = self.peak - before, max(self.peak, highest)
        return result, rise


@dataclass(frozen=True)
class Lesson:
    """One forward and backward of a student, and what it is taught.

    Attributes:
        mode: What the tensors of both models belong to.
        student: With low-rank updates in it, where it learns by those.
        objective: What is minimised.
        teacher: None: it does not run in the step.
        batch: What is read.
        labels: Those of a classifier for a batch.
        autocast: Type of the student's forward; None: as its weights are.
        teacher_autocast: Likewise of the teacher's.
        checkpointing: Activations are computed again in the backward.
        chunk_size: Predictions whose logits stand in memory together; None: all.
        accumulates: Gradients of earlier batches of the same step are there.
    """

    mode: FakeTensorMode
    student: PreTrainedModel
    objective: Objective
    teacher: PreTrainedModel | None
    batch: Batch
    labels: Callable[[Batch], Tensor]
    autocast: torch.dtype | None = None
    teacher_autocast: torch.dtype | None = None
    checkpointing: bool = False
    chunk_size: int | None = None
    accumulates: bool = False


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step beside weights and the states of the optimizer.

    Attributes:
        teacher: How far memory rises while the teacher runs.
        activations: What the student's body leaves for the backward.
        outputs: How far memory rises while logits and losses are made.
        gradients: Of all weights that are trained.
        peak: The highest that all of these reach together; gradients grow while activations go.
    """

    teacher: int
    activations: int
    outputs: int
    gradients: int
    peak: int


def step_bytes(lesson: Lesson, *, training: bool = True) -> StepBytes:
    """Memory of one step of a lesson, or of one batch of an evaluation under its objective."""
    student, objective = lesson.student, lesson.objective
    trained = [p for p in (*student.parameters(), *objective.parameters()) if p.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained) if training else 0
    with lesson.mode, _mode_of(student, lesson, training=training), torch.set_grad_enabled(training):
        known: list[Tensor] = [*_tensors(student), *objective.parameters()]
        if lesson.teacher is not None:
            known += _tensors(lesson.teacher)
        if lesson.accumulates and training:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                known.append(parameter.grad)
        with LiveBytes(known) as live:
            taught, teacher = live.rise(lambda: _teacher_signal(lesson))
            before = live.now
            value, activations, outputs = _value(lesson, taught, live)
            activations -= before
            if training:
                value.backward()
            del value, taught
        for parameter in trained:
            parameter.grad = None
    extra = gradients if lesson.accumulates and training else 0
    return StepBytes(teacher, activations, outputs, gradients, live.peak + extra)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@contextmanager
def _mode_of(student: PreTrainedModel, lesson: Lesson, *, training: bool) -> Iterator[None]:
    student.train(training)
    if lesson.checkpointing and training:
        _switch(student, "enable")({"use_reentrant": False})
    try:
        yield
    finally:
        student.train(False)
        if lesson.checkpointing and training:
            _switch(student, "disable")()


def _switch(model: PreTrainedModel, direction: str) -> Any:
    """What turns gradient checkpointing on or off, under the name that this version of transformers has for it."""
    name = f"activation_checkpointing_{direction}"
    return getattr(model, name if hasattr(model, name) else f"gradient_checkpointing_{direction}")


def _inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    ids = torch.zeros(batch.rows, batch.source, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_encoder_decoder(model):
        target = torch.zeros(batch.rows, batch.target, dtype=torch.long)
        inputs |= {"decoder_input_ids": target, "decoder_attention_mask": torch.ones_like(target)}
    return inputs


def _autocast(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def _read(
    model: PreTrainedModel, batch: Batch, layers: Iterable[int], use: Callable[[HeadOutputs], Any]
) -> tuple[Any, dict[int, Tensor]]:
    """A forward as a signal reads it; of a language model, what `use` makes of the states before its head."""
    inputs = _inputs(model, batch)
    wanted = dict.fromkeys(layers)
    if not is_generative(model):
        with hooked_states(model, wanted) as states:
            return model(**inputs).logits, states
    picked: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        picked.append(args[0].flatten(0, 1)[: batch.predictions])
        return (args[0][:1, :1], *args[1:])

    with ExitStack() as hooks, hooked_states(model, wanted) as states:
        hooks.callback(model.get_output_embeddings().register_forward_pre_hook(before).remove)
        model(**inputs, use_cache=False)
    return use(HeadOutputs(picked[0], head_of(model))), states


def _positions(lesson: Lesson) -> int:
    """Positions that the feature term reads."""
    batch, term = lesson.batch, lesson.objective.features
    if term is not None and term.positions == "supervised":
        return batch.predictions
    return batch.rows * (batch.target or batch.source)


def _teacher_signal(lesson: Lesson) -> Signal | None:
    teacher, objective = lesson.teacher, lesson.objective
    if teacher is None or not objective.needs_teacher:
        return _kept_signal(lesson) if objective.needs_teacher else None
    pairs = objective.features.layers if objective.features is not None else ()

    def use(outputs: HeadOutputs) -> Outputs:
        head = outputs.head

        def run(states: Tensor) -> Tensor:
            with torch.no_grad(), _autocast(lesson.teacher_autocast):
                return head(states)

        return HeadOutputs(outputs.states, Head(run))

    with torch.no_grad(), _autocast(lesson.teacher_autocast):
        logits, states = _read(teacher, lesson.batch, {pair.teacher_layer for pair in pairs}, use)
        rows = _positions(lesson)
        features = tuple(teacher_columns(p)(states[p.teacher_layer].flatten(0, 1)[:rows]) for p in pairs)
    return Signal(_kept_outputs(lesson, logits), features)


def _kept_signal(lesson: Lesson) -> Signal:
    """What a teacher that does not run in the step said before."""
    term, rows = lesson.objective.features, _positions(lesson)
    pairs, projectors = ((), ()) if term is None else (term.layers, term.projectors)
    widths = [projector.map.out_features for projector in projectors]
    widths = widths or [len(pair.units.teacher) for pair in pairs if pair.units is not None]
    head: Any = lesson.student.get_output_embeddings()
    outputs: Any = lesson.student.config.num_labels if head is None else head.weight.shape[0]
    # As a cache holds them.
    logits = torch.zeros(lesson.batch.predictions, outputs, dtype=None if head is None else torch.float16)
    return Signal(_kept_outputs(lesson, logits), tuple(torch.zeros(rows, width) for width in widths))


def _kept_outputs(lesson: Lesson, outputs: Outputs) -> Outputs | None:
    """The part of a teacher's outputs that the objective reads."""
    term = lesson.objective.logits
    if term is None or term.top_k is None:
        return None if term is None else outputs
    shape = len(outputs), term.top_k
    return TopOutputs(torch.zeros(shape), torch.zeros(shape, dtype=torch.int), torch.zeros(shape[0]), term.temperature)


def _value(lesson: Lesson, taught: Signal | None, live: LiveBytes) -> tuple[Tensor, int, int]:
    """The loss, memory after the student's body, and how far it rose for logits and losses."""
    objective, student, batch = lesson.objective, lesson.student, lesson.batch
    labels = torch.zeros(batch.predictions, dtype=torch.long) if is_generative(student) else lesson.labels(batch)
    rows = _positions(lesson)
    counts = StepCounts(len(labels), rows, rows)
    theirs = None if taught is None else taught.logits
    pairs = objective.features.layers if objective.features is not None else ()
    after_body: list[int] = []
    chunked: list[tuple[PredictionValue, int]] = []

    def use(outputs: HeadOutputs) -> Tensor | None:
        after_body.append(live.now)
        if lesson.chunk_size is None:
            return outputs[slice(None)].float()
        size = lesson.chunk_size
        chunked.append(live.rise(lambda: objective.predictions(outputs, theirs, labels, counts, chunk_size=size)))
        return None

    with _autocast(lesson.autocast):
        logits, states = _read(student, batch, {pair.student_layer for pair in pairs}, use)
    if not is_generative(student):
        after_body.append(live.now)
        logits = logits.float()
    columns = tuple(student_columns(p)(states[p.student_layer].flatten(0, 1)[:rows]) for p in pairs)
    del states
    found = chunked.pop() if chunked else live.rise(lambda: objective.predictions(logits, theirs, labels, counts))
    value, rise = live.rise(lambda: objective(Signal(logits, columns), taught, labels, counts, found[0]).loss)
    return value, after_body[0], max(found[1], rise, live.now - after_body[0])
