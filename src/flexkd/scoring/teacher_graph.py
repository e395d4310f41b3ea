"""What a teacher says about a batch, on a graph that starts at the lowest layer that is asked for."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.core.checks import check_class_labels, check_value_labels
from flexkd.core.outputs import Head, HeadOutputs
from flexkd.core.scores import chunked_label_target, label_target
from flexkd.core.tensors import IGNORE_INDEX
from flexkd.models.forward.head import same_logits, states_before_head
from flexkd.models.forward.hidden import (
    HEAD_INPUT,
    check_layout,
    hooked_states,
    is_generative,
    model_inputs,
    named_errors,
    prediction_labels,
    supervised_mask,
    token_mask,
)
from flexkd.scoring.batches import LOSS_OF_PROBLEM, check_batch

logger = logging.getLogger(__name__)

CHUNK_SIZE: Final = 128
"""Predictions of a language model whose logits stand in memory together: enough for full matrix products, and few
enough for caches."""


@dataclass(frozen=True)
class Reading:
    """One forward.

    Attributes:
        states: By layer, `[batch, seq, hidden]`; at the head of a language model `[predictions, 1, hidden]`.
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


class Reader:
    """Reads batches with a frozen teacher.

    Args:
        teacher: Within `frozen_eval`.
        precision: Autocast to this type; None: as the weights are.
    """

    def __init__(self, teacher: PreTrainedModel, precision: torch.dtype | None = None) -> None:
        self.teacher = teacher
        self.precision = precision
        self._knows_head: bool | None = None
        self._head: Head | None = None

    @contextmanager
    def graph(self) -> Iterator[None]:
        """Within it batches are read and differentiated, whatever modes the caller is in."""
        autocast = torch.autocast(self.teacher.device.type, self.precision, enabled=self.precision is not None)
        with torch.inference_mode(False), torch.enable_grad(), autocast:
            yield

    def read(self, batch: Mapping[str, Any], layers: tuple[int, ...]) -> Reading | None:
        """One forward on the teacher's own encoding; none where no token of a language model's batch has a label."""
        check_batch(self.teacher, batch, where="teacher", as_teacher=True)
        # A tensor that was made under inference_mode cannot stand in a graph; its copy can.
        own = model_inputs(self.teacher, batch, as_teacher=True)
        inputs = {key: value.to(self.teacher.device).clone() for key, value in own.items()}
        labels = batch["labels"].to(self.teacher.device).clone()
        if not is_generative(self.teacher):
            states, logits = self._forward(inputs, layers, None)
            labels = _as_targets(self.teacher, labels)
            assert isinstance(logits, Tensor), "a classifier has all its outputs"
            (check_value_labels if labels.is_floating_point() else check_class_labels)(logits, labels)
            return Reading(states, logits, labels, _is_labelled(labels).long(), token_mask(inputs), len(labels))
        rows = supervised_mask(self.teacher, inputs, labels)
        counts = rows.sum(1)
        if not bool(rows.any()):
            return None
        states, outputs = self._forward(inputs, layers, rows)
        labels = prediction_labels(self.teacher, labels, rows).long()
        return Reading(states, outputs, labels, counts, token_mask(inputs), CHUNK_SIZE)

    def _forward(
        self, inputs: Mapping[str, Tensor], layers: tuple[int, ...], rows: Tensor | None
    ) -> tuple[dict[int, Tensor], Tensor | HeadOutputs]:
        states: dict[int, Tensor] = {}

        def start(layer: int, state: Tensor) -> Tensor:
            states[layer] = state if state.requires_grad else state.detach().requires_grad_()
            return states[layer]

        def before_head(state: Tensor) -> Tensor:
            return start(HEAD_INPUT, state) if rows is None else start(HEAD_INPUT, state[rows][:, None]).transpose(0, 1)

        def use(found: HeadOutputs) -> HeadOutputs:
            return HeadOutputs(start(HEAD_INPUT, found.states[:, None])[:, 0], self._kept_head(found.head))

        below: dict[int, Any] = {layer: partial(start, layer) for layer in layers if layer != HEAD_INPUT}
        outputs: Tensor | HeadOutputs
        if rows is not None and self._knows_head is not False:
            with self._with_kept_head(), hooked_states(self.teacher, below), _logits_of(self.teacher) as own:
                read, found = states_before_head(self.teacher, inputs, (HEAD_INPUT,), rows=rows, use=use)
            if not self._is_known(found.head, read[HEAD_INPUT], own[0]):
                return self._forward(inputs, layers, rows)
            outputs = found
        else:
            options = {} if rows is None else {"use_cache": False}
            named = nullcontext() if rows is not None else named_errors(self.teacher)
            with hooked_states(self.teacher, {**below, HEAD_INPUT: before_head}), named:
                logits = self.teacher(**inputs, **options).logits
            outputs = logits if rows is None else logits[0]
        check_layout(self.teacher, inputs, states, below)
        return states, outputs

    def _kept_head(self, head: Head) -> Head:
        """The head with its weight in the type of the products: cast once, for the teacher is frozen."""
        if self._head is None:
            given = (head.weight, head.bias)
            weight, bias = (None if one is None else one.detach().to(self.precision or one.dtype) for one in given)
            self._head = replace(head, weight=weight, bias=bias)
        return self._head

    @contextmanager
    def _with_kept_head(self) -> Iterator[None]:
        """Within it the teacher's head has that weight; autocast would cast its own for each batch anew."""
        kept, head = self._head, self.teacher.get_output_embeddings()
        if kept is None or kept.weight is None:
            yield
            return
        own = head.weight
        head.weight = nn.Parameter(kept.weight, requires_grad=False)
        try:
            yield
        finally:
            head.weight = own

    def _is_known(self, head: Head, states: Tensor, logits: Tensor) -> bool:
        """Whether the head makes the model's own logits, seen at the one position of the first batch that has some."""
        if self._knows_head is None:
            with torch.no_grad():
                self._knows_head = same_logits(self.teacher, head(states[0, :1].detach()), logits[0])
            if not self._knows_head:
                logger.info(
                    "teacher: whole logits stand in memory, for %s does more to them than its head, with any scale, "
                    "cap or bias that is known",
                    type(self.teacher).__name__,
                )
        return self._knows_head


@contextmanager
def _logits_of(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within it the list gets the logits of each forward."""
    found: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: found.append(output.logits))
    try:
        yield found
    finally:
        hook.remove()


def _as_targets(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Classes as whole numbers; all other labels as a column for each output, also where 0 and 1 are stored whole."""
    loss = LOSS_OF_PROBLEM.get(str(model.config.problem_type), "cross_entropy")
    if loss == "cross_entropy" and not labels.is_floating_point():
        return labels.long()
    return labels.float().reshape(len(labels), -1)


def _is_labelled(labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return ~labels.isnan().any(-1)
    return labels != IGNORE_INDEX
