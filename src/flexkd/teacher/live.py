"""Signals of a model that runs on each batch; the same code reads the teacher's and the student's."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.core.objective import Signal
from flexkd.core.outputs import Head, HeadOutputs, Outputs, TopOutputs
from flexkd.core.tensors import can_be_read
from flexkd.core.terms import LayerPair
from flexkd.data.encoding.vocabulary import one_tokenizer_error
from flexkd.errors import ShapeError
from flexkd.facts.names import TEACHER_PREFIX
from flexkd.models.forward.head import head_is_known, head_of, states_before_head
from flexkd.models.forward.hidden import (
    is_generative,
    model_inputs,
    states_and_logits,
    states_at,
    supervised_mask,
    token_mask,
)
from flexkd.models.forward.modes import eval_mode
from flexkd.models.loading.adapters import unwrapped
from flexkd.models.loading.shared import check_adapter_names, use_adapters, without_wrapper
from flexkd.teacher.signal import PREFETCHED, BatchPositions, Extents, SignalRequest

logger = logging.getLogger(__name__)

_TOP_CHUNK: Final = 256
"""Predictions whose logits are in memory at the same time while their largest ones are picked."""

_UNKNOWN_HEAD: Final = Head(lambda states: states)
"""Marks a head that cannot be run outside of the model."""


def batch_positions(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], labels: Tensor | None, request: SignalRequest
) -> BatchPositions:
    """The positions of a batch at which a request reads this model."""
    reads_supervised = bool(request.layers) and request.positions == "supervised"
    supervised = supervised_mask(model, inputs, labels) if reads_supervised or is_generative(model) else None
    if not request.layers:
        return BatchPositions(None, supervised)
    return BatchPositions(token_mask(inputs) if request.positions == "tokens" else supervised, supervised)


def read_signal(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    positions: BatchPositions,
    reads: tuple[tuple[int, Callable[[Tensor], Tensor]], ...],
    *,
    forward: Callable[..., Any] | None = None,
    use: Callable[[HeadOutputs], Outputs | None] | None = None,
) -> Signal:
    """One forward of a model as a signal.

    Args:
        model: Holds the modules that are read.
        inputs: From `model_inputs`.
        positions: From `batch_positions`.
        reads: For each pair of layers, this model's layer and a function from its states `[positions, hidden]`.
        forward: What to call instead of the model, such as a DistributedDataParallel around it.
        use: Called during the forward with the states before a language model's head; its result replaces the logits
            in the signal. None: the signal has the logits themselves.
    """
    layers = dict.fromkeys(layer for layer, _ in reads)
    logits: Outputs | None
    if use is None:
        states, logits = states_and_logits(model, inputs, layers, positions=positions.supervised, forward=forward)
    else:
        assert positions.supervised is not None, "a language model predicts at its supervised positions"
        states, logits = states_before_head(
            model, inputs, layers, positions=positions.supervised, use=use, forward=forward
        )
    features = []
    for layer, columns in reads:
        assert positions.features is not None, "features are read at positions"
        # States are picked by index, not multiplied by the mask, which would let a NaN at a padding position through.
        features.append(columns(states_at(states[layer], positions.features)))
    return Signal(logits, tuple(features))


def student_columns(pair: LayerPair) -> Callable[[Tensor], Tensor]:
    """A function from the student's states `[positions, hidden]` to the columns that are taught."""
    if pair.units is None:
        return lambda states: states
    units, largest = cache(pair.units.student.to), _largest(pair.units.student)

    def columns(states: Tensor) -> Tensor:
        _check_units("student", largest, states.shape[-1], "units")
        return states.index_select(-1, units(states.device))

    return columns


def _largest(units: Tensor) -> int:
    return int(units.max()) if can_be_read(units) else -1


def _check_units(name: str, largest: int, width: int, kind: str) -> None:
    if largest >= width:
        raise ShapeError(
            f"units: unit {largest} of the {name}, which has {width} {kind} there. Choose from 0 to {width - 1}."
        )


def teacher_columns(pair: LayerPair) -> Callable[[Tensor], Tensor]:
    """A function from the teacher's states `[positions, hidden]` to the columns that it teaches."""
    # Cached, so that units and basis are moved to a device once, not for every batch.
    units = None if pair.units is None else cache(pair.units.teacher.to)
    largest = -1 if pair.units is None else _largest(pair.units.teacher)
    basis = None if pair.teacher_basis is None else cache(pair.teacher_basis.to)
    height = None if pair.teacher_basis is None else pair.teacher_basis.shape[0]

    def columns(states: Tensor) -> Tensor:
        if basis is not None:
            if states.shape[-1] != height:
                raise ShapeError(
                    f"teacher_basis: is made for {height} units, but the teacher has {states.shape[-1]} in layer "
                    f"{pair.teacher_layer}. Measure it at this layer."
                )
            with torch.autocast(states.device.type, enabled=False):
                states = states.float() @ basis(states.device)
        _check_units("teacher", largest, states.shape[-1], "units" if basis is None else "directions")
        return states if units is None else states.index_select(-1, units(states.device))

    return columns


class LiveTeacher:
    """A frozen model that runs on each batch in eval mode, without gradients.

    It is not a module, so that `train()` of the student cannot reach it and no checkpoint contains it. Modules that it
    shares with the student are in eval mode and use the teacher's adapters only while the teacher runs.

    Args:
        model: A model of transformers, or one with adapters of PEFT, wrapped for several processes or not. Its
            parameters, buffers, modes and `requires_grad` stay as they are.
        precision: Autocast to this type while it runs; None: no autocast.
        adapters: Names of the adapters that the teacher uses, for a student that is another adapter of the same base
            model; an empty list: the base model alone. None: the adapters that are active in the model.

    Raises:
        UnsupportedModelError: Not a model of transformers, or it has no such adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: torch.dtype | None = None,
        adapters: Sequence[str] | None = None,
    ) -> None:
        self.model: PreTrainedModel = unwrapped(without_wrapper(model))
        self.precision = precision
        self.adapters = None if adapters is None else tuple(adapters)
        check_adapter_names(self.model, self.adapters or ())
        self._head: Head | None = None
        self._columns = cache(teacher_columns)

    def prefetch(self, batch: Mapping[str, Any], request: SignalRequest) -> BatchPositions:
        """The positions that the request reads, as indices; on the CPU, their number is known at once."""
        return self.positions(batch, request).indices()

    def positions(self, batch: Mapping[str, Any], request: SignalRequest) -> BatchPositions:
        """Positions that the request reads, in the teacher's own encoding of a batch."""
        inputs = model_inputs(self.model, batch, as_teacher=True)
        return batch_positions(self.model, inputs, batch["labels"], request)

    def extents(self, batch: Mapping[str, Any], request: SignalRequest) -> Extents:
        """Number of entries of a signal that belong to each row of the batch."""
        positions = self.positions(batch, request)
        num_rows = len(batch["example_id"])
        features = [0] * num_rows if positions.features is None else counts_of_rows(positions.features, batch)
        if not is_generative(self.model):
            return Extents(features, [1] * num_rows)
        assert positions.supervised is not None, "a language model predicts at its supervised positions"
        return Extents(features, counts_of_rows(positions.supervised, batch))

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        """Run the model on its own encoding of the batch.

        Raises:
            VocabularyError: `tokens` positions are requested while the two encodings differ.
        """
        if request.layers and request.positions == "tokens" and f"{TEACHER_PREFIX}input_ids" in batch:
            raise one_tokenizer_error()
        target = batch["input_ids"].device
        prefetched: BatchPositions | None = batch.get(PREFETCHED)
        positions = self.positions(batch, request) if prefetched is None else prefetched
        positions = positions.to(self.model.device, non_blocking=True)
        inputs = {
            key: value.to(self.model.device) for key, value in model_inputs(self.model, batch, as_teacher=True).items()
        }
        reads = tuple((pair.teacher_layer, self._columns(pair)) for pair in request.layers)
        with self._as_teacher(self.model):
            use = self._head_use(inputs, request, target)
            signal = read_signal(self.model, inputs, positions, reads, use=use)
            logits = signal.logits if request.logits else None
            if isinstance(logits, Tensor):
                top = request.top if is_generative(self.model) else None
                logits = logits.to(target) if top is None else _joined([top(logits)], target)
        return Signal(logits, tuple(feature.to(target) for feature in signal.features))

    @contextmanager
    def _as_teacher(self, part: nn.Module) -> Iterator[None]:
        """Run a part of the model as the teacher: eval mode, the teacher's adapters and precision, no gradients."""
        autocast = torch.autocast(self.model.device.type, self.precision, enabled=self.precision is not None)
        # no_grad, not inference_mode: an inference tensor cannot take part in the student's backward.
        with eval_mode(part), use_adapters(part, self.adapters), torch.no_grad(), autocast:
            yield

    def _head_use(
        self, inputs: Mapping[str, Tensor], request: SignalRequest, target: torch.device
    ) -> Callable[[HeadOutputs], Outputs | None] | None:
        """The `use` of `read_signal`: keeps nothing, states and head, or the top outputs; None: whole logits."""
        if not is_generative(self.model):
            return None
        if not request.logits:
            return lambda _: None
        if self._head is None:
            self._head = self._separate_head(inputs)
        if self._head is _UNKNOWN_HEAD:
            return None
        head, top = self._head, request.top

        def use(outputs: HeadOutputs) -> Outputs:
            if top is None:
                return HeadOutputs(outputs.states, Head(lambda states: head(states).to(target)))
            parts = [top(head(part)) for part in outputs.states.split(_TOP_CHUNK)]
            return _joined(parts, target)

        return use

    def _separate_head(self, inputs: Mapping[str, Tensor]) -> Head:
        """The head as a function that runs after the model's forward, without gradients, in the teacher's precision."""
        if not head_is_known(self.model, inputs, who="teacher"):
            return _UNKNOWN_HEAD
        head, module = head_of(self.model), self.model.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if weight is not None and self.precision is not None:
            # Cast once, not for each chunk of predictions, as the teacher is frozen.
            weight, bias = (None if part is None else part.detach().to(self.precision) for part in (weight, bias))

        def run(states: Tensor) -> Tensor:
            with self._as_teacher(module):
                raw = head.module(states) if weight is None else F.linear(states.to(weight.dtype), weight, bias)
                return head.finish_logits(raw)

        return Head(run)


def counts_of_rows(mask: Tensor, batch: Mapping[str, Any]) -> list[int]:
    """Number of True positions of each row."""
    if "position_ids" not in batch:
        counts: list[int] = mask.sum(1).tolist()
        return counts
    return [int(part.sum()) for part in packed_rows(mask, batch)]


def packed_rows(values: Tensor, batch: Mapping[str, Any]) -> list[Tensor]:
    """The part of `values` `[1, seq]` of each packed row; a row begins where `position_ids` is 0."""
    starts = (batch["position_ids"][0] == 0).nonzero()[1:, 0].cpu()
    return list(values[0].tensor_split(starts))


def _joined(parts: Sequence[TopOutputs], target: torch.device) -> TopOutputs:
    joined = [torch.cat(tensors).to(target) for tensors in zip(*(part.tensors() for part in parts), strict=True)]
    return TopOutputs(joined[0], joined[1], joined[2], parts[0].temperature, parts[0].outputs)
