"""Signals of a model that runs now; the teacher's and the student's side are read by the same code."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.objective import Signal
from flexkd.core.terms import LayerPair
from flexkd.errors import VocabularyError
from flexkd.models.hidden import (
    TEACHER_PREFIX,
    is_generative,
    model_inputs,
    states_and_logits,
    supervised_mask,
    token_mask,
)
from flexkd.teacher.memory import Extents
from flexkd.teacher.signal import BatchPositions, SignalRequest


def batch_positions(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], labels: Tensor | None, request: SignalRequest
) -> BatchPositions:
    """Positions of a batch that a request reads of this model."""
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
) -> Signal:
    """One forward of a model as a signal.

    Args:
        model: Holds the modules that are read.
        inputs: From `model_inputs`.
        positions: From `batch_positions`.
        reads: For each pair of layers, the layer and what to do with its rows `[positions, hidden]`.
        forward: What to call instead of the model, such as a DistributedDataParallel around it.
    """
    layers = dict.fromkeys(layer for layer, _ in reads)
    states, logits = states_and_logits(model, inputs, layers, rows=positions.supervised, forward=forward)
    features = []
    for layer, columns in reads:
        assert positions.features is not None, "features are read at positions"
        # Rows are indexed out, never multiplied by the mask: a NaN at a padding position stays outside.
        features.append(columns(states[layer][positions.features]))
    return Signal(logits, tuple(features))


def student_columns(pair: LayerPair) -> Callable[[Tensor], Tensor]:
    """Rows of the student's hidden state to the columns that are taught."""
    units = pair.units.student if pair.units is not None else None
    return lambda rows: rows if units is None else rows.index_select(-1, units.to(rows.device))


def teacher_columns(pair: LayerPair) -> Callable[[Tensor], Tensor]:
    """Rows of the teacher's hidden state to the columns that it teaches."""
    units, basis = (pair.units.teacher if pair.units is not None else None), pair.teacher_basis

    def columns(rows: Tensor) -> Tensor:
        if basis is not None:
            with torch.autocast(rows.device.type, enabled=False):
                rows = rows.float() @ basis.to(rows.device)
        return rows if units is None else rows.index_select(-1, units.to(rows.device))

    return columns


class LiveTeacher:
    """A frozen model that runs on each batch, always in eval mode, without a graph.

    It is no module: `train()` of the student cannot reach it, and it is saved with nothing.

    Args:
        model: Its parameters, buffers and `requires_grad` stay as they are.
        precision: Autocast to this type while it runs; None: as the weights are.
    """

    def __init__(self, model: PreTrainedModel, *, precision: torch.dtype | None = None) -> None:
        self.model = model
        self.precision = precision

    def extents(self, batch: Mapping[str, Any], request: SignalRequest) -> Extents:
        """How the rows of a signal are shared out among the rows of the batch."""
        inputs = model_inputs(self.model, batch, own=True)
        positions = batch_positions(self.model, inputs, batch["labels"], request)
        rows = len(batch["labels"])
        features = [0] * rows if positions.features is None else positions.features.sum(1).tolist()
        if not is_generative(self.model):
            return Extents(features, [1] * rows)
        assert positions.supervised is not None, "a language model predicts at its supervised positions"
        return Extents(features, positions.supervised.sum(1).tolist())

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        """Run the model on its own encoding of the batch.

        Raises:
            VocabularyError: `tokens` positions are asked for while the two encodings differ.
        """
        if request.layers and request.positions == "tokens" and f"{TEACHER_PREFIX}input_ids" in batch:
            raise VocabularyError(
                "objective.features.positions: 'tokens' needs one tokenizer for teacher and student, which encode the "
                "same text differently here. Use positions 'supervised', or give both the same tokenizer."
            )
        self.model.eval()
        target = batch["input_ids"].device
        inputs = {key: value.to(self.model.device) for key, value in model_inputs(self.model, batch, own=True).items()}
        labels = batch["labels"].to(self.model.device) if is_generative(self.model) else None
        positions = batch_positions(self.model, inputs, labels, request)
        reads = tuple((pair.teacher_layer, teacher_columns(pair)) for pair in request.layers)
        # no_grad, not inference_mode: an inference tensor cannot take part in the student's backward.
        with torch.no_grad(), torch.autocast(target.type, self.precision, enabled=self.precision is not None):
            signal = read_signal(self.model, inputs, positions, reads)
        assert signal.logits is not None
        logits = signal.logits.to(target) if request.logits else None
        return Signal(logits, tuple(feature.to(target) for feature in signal.features))
