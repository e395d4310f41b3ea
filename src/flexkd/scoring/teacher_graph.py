"""A forward pass of the teacher whose autograd graph starts at the lowest scored layer."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from flexkd.facts.losses import TASK_LOSS_FACTS, TASK_LOSS_OF_PROBLEM_TYPE
from flexkd.models.forward.head import head_is_known, states_before_head
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
from flexkd.scoring.batches import check_batch

logger = logging.getLogger(__name__)

CHUNK_SIZE: Final = 128
"""Predictions of a language model whose logits are in memory at the same time: enough for efficient matrix
multiplications, few enough for the caches of a CPU."""


Watch = Callable[[Mapping[str, Tensor]], AbstractContextManager[Any]]
"""Looks on while a model runs on inputs, as `Observation.reading`."""


@dataclass(frozen=True)
class TeacherPass:
    """States and outputs of one batch, with their autograd graph.

    Attributes:
        states: States by layer, `[batch, seq, hidden]`; at the head of a language model `[predictions, 1, hidden]`.
        outputs: The logits of each prediction, or the state and the head that make them.
        labels: The label of each prediction.
        counts: Number of predictions of each row.
        tokens: Mask of the real tokens, `[batch, seq]`.
        chunk_size: Predictions whose logits are in memory at the same time.
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
        """Slices of `chunk_size` predictions."""
        for first in range(0, len(self.outputs), self.chunk_size):
            yield slice(first, first + self.chunk_size)


class TeacherReader:
    """Runs a frozen teacher on batches.

    Args:
        teacher: A model inside of `frozen_eval`.
        precision: Autocast to this type; None: no autocast.
    """

    def __init__(self, teacher: PreTrainedModel, precision: torch.dtype | None = None) -> None:
        self.teacher = teacher
        self.precision = precision
        self._head_is_known: bool | None = None
        self._head: Head | None = None

    @contextmanager
    def graph(self) -> Iterator[None]:
        """Within it gradients and autocast are on for `read` and the derivatives, whatever the modes of the caller."""
        autocast = torch.autocast(self.teacher.device.type, self.precision, enabled=self.precision is not None)
        with torch.inference_mode(False), torch.enable_grad(), autocast:
            yield

    def read(self, batch: Mapping[str, Any], layers: tuple[int, ...], watch: Watch = nullcontext) -> TeacherPass | None:
        """Run a forward on the teacher's own encoding; None if no token of a language model's batch has a label.

        Args:
            watch: Is open, with the forward's inputs, while the teacher runs, and at no other time.
        """
        check_batch(self.teacher, batch, where="teacher", as_teacher=True)
        # A tensor that was made under inference_mode cannot be part of a graph; its copy can.
        encoding = model_inputs(self.teacher, batch, as_teacher=True)
        inputs = {key: value.to(self.teacher.device).clone() for key, value in encoding.items()}
        labels = batch["labels"].to(self.teacher.device).clone()
        if not is_generative(self.teacher):
            states, logits = self._forward(inputs, layers, None, watch)
            labels = _as_targets(self.teacher, labels)
            assert isinstance(logits, Tensor), "a classifier has all its outputs"
            (check_value_labels if labels.is_floating_point() else check_class_labels)(logits, labels)
            return TeacherPass(states, logits, labels, _is_labelled(labels).long(), token_mask(inputs), len(labels))
        supervised = supervised_mask(self.teacher, inputs, labels)
        counts = supervised.sum(1)
        if not bool(supervised.any()):
            return None
        states, outputs = self._forward(inputs, layers, supervised, watch)
        labels = prediction_labels(self.teacher, labels, supervised).long()
        return TeacherPass(states, outputs, labels, counts, token_mask(inputs), CHUNK_SIZE)

    def _forward(
        self, inputs: Mapping[str, Tensor], layers: tuple[int, ...], supervised: Tensor | None, watch: Watch
    ) -> tuple[dict[int, Tensor], Tensor | HeadOutputs]:
        """States by layer, and logits; for a language model those of the supervised positions alone.

        Order of events in one forward, with two scored layers:

            blocks below the lower layer   no graph: the teacher is frozen
            hook at the lower layer        the graph begins: `start` detaches the state and makes it require a gradient
            hook at the upper layer        `start` keeps the state as it is: it lies on the graph already
            head, or `use` behind it       the state before the head, the same way
        """
        states: dict[int, Tensor] = {}

        def start(layer: int, state: Tensor) -> Tensor:
            states[layer] = state if state.requires_grad else state.detach().requires_grad_()
            return states[layer]

        def before_head(state: Tensor) -> Tensor:
            if supervised is None:
                return start(HEAD_INPUT, state)
            return start(HEAD_INPUT, state[supervised][:, None]).transpose(0, 1)

        def use(outputs: HeadOutputs) -> HeadOutputs:
            return HeadOutputs(start(HEAD_INPUT, outputs.states[:, None])[:, 0], self._cast_head(outputs.head))

        below: dict[int, Any] = {layer: partial(start, layer) for layer in layers if layer != HEAD_INPUT}
        if supervised is not None and self._has_known_head(inputs):
            with self._with_cast_head(), hooked_states(self.teacher, below), watch(inputs):
                _, head_outputs = states_before_head(self.teacher, inputs, (HEAD_INPUT,), positions=supervised, use=use)
            check_layout(self.teacher, inputs, states, below)
            return states, head_outputs
        options = {} if supervised is None else {"use_cache": False}
        errors = nullcontext() if supervised is not None else named_errors(self.teacher)
        with hooked_states(self.teacher, {**below, HEAD_INPUT: before_head}), errors, watch(inputs):
            logits = self.teacher(**inputs, **options).logits
        check_layout(self.teacher, inputs, states, below)
        return states, logits if supervised is None else logits[0]

    def _cast_head(self, head: Head) -> Head:
        """The head with its weight in the type it multiplies in; cast once, as the teacher is frozen."""
        if self._head is None:
            weight, bias = (
                None if tensor is None else tensor.detach().to(self.precision or tensor.dtype)
                for tensor in (head.weight, head.bias)
            )
            self._head = replace(head, weight=weight, bias=bias)
        return self._head

    @contextmanager
    def _with_cast_head(self) -> Iterator[None]:
        """Within it the teacher's head has the cast weight, so that autocast need not cast it again for each batch."""
        cast, head = self._head, self.teacher.get_output_embeddings()
        if cast is None or cast.weight is None:
            yield
            return
        original = head.weight
        head.weight = nn.Parameter(cast.weight, requires_grad=False)
        try:
            yield
        finally:
            head.weight = original

    def _has_known_head(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the head alone turns the state before it into the model's logits, tested on the first batch."""
        if self._head_is_known is None:
            self._head_is_known = head_is_known(self.teacher, inputs, who="teacher")
        return self._head_is_known


def _as_targets(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Classes as integers; other labels, also 0 and 1 stored as integers, as floats with a column for each output."""
    loss = TASK_LOSS_OF_PROBLEM_TYPE.get(str(model.config.problem_type), "cross_entropy")
    if TASK_LOSS_FACTS[loss].is_distribution and not labels.is_floating_point():
        return labels.long()
    return labels.float().reshape(len(labels), -1)


def _is_labelled(labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return ~labels.isnan().any(-1)
    return labels != IGNORE_INDEX
