"""What a teacher says about a batch, on a graph that starts at the lowest layer that is asked for."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.outputs import HeadOutputs
from flexkd.core.scores import chunked_label_target, label_target
from flexkd.core.tensors import IGNORE_INDEX
from flexkd.errors import UnsupportedModelError
from flexkd.models.head import check_head, states_before_head
from flexkd.models.hidden import (
    HEAD_INPUT,
    check_layout,
    hooked_states,
    is_generative,
    model_inputs,
    prediction_labels,
    supervised_mask,
    token_mask,
)
from flexkd.train.chunks import predictions_together


@dataclass(frozen=True)
class Reading:
    """One forward.

    Attributes:
        states: By layer, `[batch, seq, hidden]`; what the head of a language model reads is `[predictions, hidden]`.
        outputs: Of each prediction: its logits, or the state and the head that make them.
        labels: Of each prediction.
        counts: Predictions that each row stands for.
        tokens: Real tokens `[batch, seq]`.
        chunk_size: Predictions whose logits stand in memory together.
    """

    states: Mapping[int, Tensor]
    outputs: Tensor | HeadOutputs
    labels: Tensor
    counts: Tensor
    tokens: Tensor
    chunk_size: int

    def label_target(self, target: str) -> Tensor:
        """`core.scores.label_target` of all predictions."""
        if isinstance(self.outputs, Tensor):
            return label_target(self.outputs, self.labels, target=target)
        return chunked_label_target(self.outputs, self.labels, target=target, chunk_size=self.chunk_size)

    def chunks(self) -> Iterator[slice]:
        """Predictions, as many as stand in memory together."""
        for first in range(0, len(self.outputs), self.chunk_size):
            yield slice(first, first + self.chunk_size)

    def with_labels(self, labels: Tensor) -> "Reading":
        """The same forward, asked about other labels."""
        return replace(self, labels=labels)


class Reader:
    """Runs a frozen teacher on batches.

    Args:
        teacher: Within `frozen_eval`.
        precision: Autocast to this type; None: as the weights are.
    """

    def __init__(self, teacher: PreTrainedModel, precision: torch.dtype | None = None) -> None:
        self.teacher = teacher
        self.precision = precision
        self._unknown_head: UnsupportedModelError | None = None
        self._outputs = 0

    @contextmanager
    def graph(self) -> Iterator[None]:
        """Within it batches are read and differentiated, whatever the caller's own modes are."""
        device = self.teacher.device.type
        autocast = torch.autocast(device, self.precision, enabled=self.precision is not None)
        with torch.inference_mode(False), torch.enable_grad(), autocast:
            yield

    def read(self, batch: Mapping[str, Any], layers: tuple[int, ...]) -> Reading | None:
        """One forward; None, and no forward, where a batch of a language model has no label."""
        teacher = self.teacher
        # A tensor that was made under inference_mode cannot stand in a graph; its copy can.
        own = model_inputs(teacher, batch, own=True)
        inputs = {key: value.to(teacher.device).clone() for key, value in own.items()}
        labels = batch["labels"].to(teacher.device).clone()
        if not is_generative(teacher):
            states, logits = self._with_logits(inputs, layers, None)
            counts = _is_labelled(labels).long()
            return Reading(states, logits, _as_targets(labels), counts, token_mask(inputs), len(logits))
        rows = supervised_mask(teacher, inputs, labels)
        counts = rows.sum(1)
        if not bool(rows.any()):
            return None
        together = self._together(inputs, int(counts.argmax()))
        read = self._with_logits if self._unknown_head else self._with_head
        states, outputs = read(inputs, layers, rows)
        labels = prediction_labels(teacher, labels, rows)
        return Reading(states, outputs, labels, counts, token_mask(inputs), together)

    def plain_head(self) -> Any:
        """Proven"""

    def _together(self, inputs: Mapping[str, Tensor], row: int) -> int:
        """Predictions of a chunk; on the first call the head is proven on a row that has labels."""
        if self._outputs == 0:
            try:
                check_head(self.teacher, {name: value[row : row + 1] for name, value in inputs.items()})
            except UnsupportedModelError as error:
                logger.info("teacher: whole logits stand in memory. %s", error)
                self._unknown_head = error
            self._outputs = int(self.teacher.config.get_text_config(decoder=True).vocab_size)
        return predictions_together(self._outputs)
