"""Unit scores of a teacher over batches, in one pass that leaves the teacher unchanged."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.core.scores import TARGETS, ScoreAccumulator, UnitScores, check_attribution, mean_over_layers
from flexkd.core.tensors import IGNORE_INDEX
from flexkd.errors import DataError, ScoreError, unknown_name
from flexkd.facts.names import ALL_LAYERS
from flexkd.models.forward.hidden import HEAD_INPUT, is_generative, num_layers
from flexkd.models.loading.adapters import unwrapped
from flexkd.processes import divided
from flexkd.scoring.frozen import frozen_eval, state_gradients
from flexkd.scoring.teacher_graph import TeacherReader

REFERENCE_PREDICTIONS = 256
"""Predictions of a language model over which the reference |d logit / d h| is measured, at the cost of a backward."""


@overload
def score_units(
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    target: str = ...,
    attribution: str = ...,
    layer: int | Literal["all"] = ...,
    basis: Tensor | None = ...,
    seed: int = ...,
    precision: torch.dtype | None = ...,
) -> UnitScores: ...


@overload
def score_units(
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    target: str = ...,
    attribution: str = ...,
    layer: Sequence[int],
    basis: Tensor | None = ...,
    seed: int = ...,
    precision: torch.dtype | None = ...,
) -> list[UnitScores]: ...


def score_units(
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    target: str = "log_prob",
    attribution: str = "gradient",
    layer: int | str | Sequence[int] = HEAD_INPUT,
    basis: Float[Tensor, "hidden directions"] | None = None,
    seed: int = 0,
    precision: torch.dtype | None = None,
) -> UnitScores | list[UnitScores]:
    """Score of every unit: `s_i = (1 / predictions) * sum over positions |d y / d h_i|`.

    At the head the gradient stops at `h`: a forward of the body, then the head on the supervised positions and back to
    `h`, without a backward through the body. Below the head one state contributes to several labels: contributions are
    added before the absolute value, and the sum runs over all real positions. A language model's logits are computed in
    chunks. The softmax is computed in float32, sums in float64.

    Args:
        teacher: Any language model or classifier, with adapters or without. It is scored in eval mode; its mode,
            `requires_grad`, `.grad` and hooks do not change.
        batches: Dicts of tensors from a Hugging Face collator, with `labels`. Use rows of the training split.
        target: One of `core.scores.TARGETS`.
        attribution: One of `core.scores.ATTRIBUTIONS`; `activation`, `variance` and `random` are controls.
        layer: -1 for the state that the head reads, 1..N for the output of a block; a list scores all in one pass;
            `all` gives one score a unit, the `mean_over_layers` of all blocks (an encoder-decoder: of its decoder).
        basis: Directions as columns, which are scored in the place of units; their coordinates are the states.
        seed: Seed of the `random` control.
        precision: Autocast to this type; None: no autocast.

    Returns:
        `UnitScores`, or a list of them in the order of the layers.

    Raises:
        ScoreError: The scores are meaningless (vanishing, mostly equal, not finite), or a name is unknown.
        UnsupportedModelError: The outputs do not depend on the state of a layer.
        ShapeError: The teacher has no such layer.

    Source:
        Saadi and Wang, Flex-KD, 2025, arXiv:2507.10155, task-based unit scores; the paper leaves the target open, see
        docs/papers.md.
    """
    if target not in TARGETS:
        raise ScoreError(unknown_name("scores.target", "target", target, TARGETS))
    check_attribution(attribution)
    teacher = unwrapped(teacher)
    if isinstance(batches, Mapping):
        raise DataError("batches: one mapping was given. Give a list of them, [batch].")
    layers = _numbers(teacher, layer)
    if not layers:
        raise ScoreError("layer: an empty list was given. Name -1 (the head's input) or blocks from 1.")
    accumulators: dict[int, ScoreAccumulator] = {}
    reader = TeacherReader(teacher, precision)

    def of_batch(batch: Mapping[str, Any]) -> dict[int, ScoreAccumulator]:
        added = {}
        for number, gradients in _batch_gradients(reader, batch, layers, target, accumulators):
            if basis is not None:
                gradients = gradients.along(basis)
            added[number] = ScoreAccumulator(
                gradients.states.shape[-1], target=target, attribution=attribution, layer=number, seed=seed
            )
            gradients.add_to(added[number])
        return added

    with frozen_eval(teacher):
        for added in divided(batches, of_batch):
            for number, part in added.items():
                if number not in accumulators:
                    accumulators[number] = part
                    continue
                # Processes that read batches at the same time measure the reference on more of them than one would.
                reference = _needs_reference(teacher, number, accumulators[number])
                accumulators[number].merge(part, reference=reference)
    if not accumulators:
        raise ScoreError("scores: no batch was given. Give rows with labels.")
    scores = [accumulators[number].scores() for number in layers]
    if layer == ALL_LAYERS:
        return mean_over_layers(scores)
    return scores[0] if isinstance(layer, int) else scores


def _numbers(teacher: PreTrainedModel, layer: int | str | Sequence[int]) -> tuple[int, ...]:
    """The layers to score, by number."""
    if isinstance(layer, str):
        if layer != ALL_LAYERS:
            raise ScoreError(unknown_name("scores.layer", "layer", layer, [ALL_LAYERS]))
        return tuple(range(1, num_layers(teacher) + 1))
    return (layer,) if isinstance(layer, int) else tuple(layer)


def check_state_is_read(teacher: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Refuse a classifier whose head does not read the state at the last layer, before it is fine-tuned.

    Args:
        teacher: The classifier that will be scored; its weights do not matter yet.
        batch: A few rows with labels.

    Raises:
        UnsupportedModelError: As `score_units`.
    """
    reader = TeacherReader(teacher)
    with frozen_eval(teacher), reader.graph():
        teacher_pass = reader.read(batch, (HEAD_INPUT,))
        assert teacher_pass is not None, "each row of a classifier is one prediction"
        assert isinstance(teacher_pass.outputs, Tensor), "a classifier has all its outputs"
        state_gradients(teacher, teacher_pass.outputs.float().sum(), [teacher_pass.states[HEAD_INPUT]])


@dataclass(frozen=True)
class _LayerGradients:
    """Gradients and states of one batch at one layer."""

    gradients: Float[Tensor, "rows positions hidden"]
    states: Float[Tensor, "rows positions hidden"]
    mask: Bool[Tensor, "rows positions"]
    predictions: Int[Tensor, " rows"]
    reference: Float[Tensor, "rows positions hidden"] | None
    reference_predictions: int

    def along(self, basis: Float[Tensor, "hidden directions"]) -> "_LayerGradients":
        """The same in the coordinates along some directions."""
        columns = basis.to(self.gradients.device, torch.float32)
        reference = None if self.reference is None else self.reference.float() @ columns
        turned = (self.gradients.float() @ columns, self.states.float() @ columns)
        return replace(self, gradients=turned[0], states=turned[1], reference=reference)

    def add_to(self, accumulator: ScoreAccumulator) -> None:
        accumulator.add(self.gradients, self.states, self.mask, self.predictions)
        if self.reference is not None:
            accumulator.add_reference(self.reference, self.mask, self.reference_predictions)


def _batch_gradients(
    reader: TeacherReader,
    batch: Mapping[str, Any],
    layers: tuple[int, ...],
    target: str,
    accumulators: Mapping[int, ScoreAccumulator],
) -> Iterator[tuple[int, _LayerGradients]]:
    """What one batch adds to the scores of each layer, by the layer's number."""
    generative = is_generative(reader.teacher)
    with reader.graph():
        teacher_pass = reader.read(batch, layers)
        if teacher_pass is None or not bool((teacher_pass.counts > 0).any()):
            return
        # All layers lie on one graph: the derivative by a lower one runs through the upper ones.
        states = [teacher_pass.states[number] for number in layers]
        gradients = state_gradients(reader.teacher, teacher_pass.label_target(target), states)
        referenced = [number for number in layers if _needs_reference(reader.teacher, number, accumulators.get(number))]
        num_referenced = teacher_pass.chunk_size if generative else len(teacher_pass.labels)
        references: dict[int, Tensor] = {}
        if referenced:
            logit = _label_logits(teacher_pass.outputs[:num_referenced], teacher_pass.labels[:num_referenced])
            by_layer = state_gradients(reader.teacher, logit, [teacher_pass.states[number] for number in referenced])
            references = dict(zip(referenced, by_layer, strict=True))
    num_referenced = min(num_referenced, int(teacher_pass.counts.sum()))
    for number, gradient, state in zip(layers, gradients, states, strict=True):
        mask, predictions = teacher_pass.tokens & (teacher_pass.counts > 0)[:, None], teacher_pass.counts
        if number == HEAD_INPUT and generative:
            mask = torch.ones_like(gradient[..., 0], dtype=torch.bool)
            predictions = mask[:, 0].long()
        elif number == HEAD_INPUT:
            # The head reads a position if its gradient is not zero. Where a label is certain the gradient of the target
            # vanishes, but not that of the plain logit.
            is_read = ((gradient != 0) | (references[number] != 0)).any(-1)
            mask = is_read & (predictions > 0)[:, None]
        reference = references.get(number)
        yield number, _LayerGradients(gradient, state.detach(), mask, predictions, reference, num_referenced)


def _needs_reference(teacher: PreTrainedModel, layer: int, accumulator: ScoreAccumulator | None) -> bool:
    """Whether a batch measures the reference; at a classifier's head it also says which positions are read."""
    is_of_classes = layer == HEAD_INPUT and not is_generative(teacher)
    return is_of_classes or accumulator is None or accumulator.reference_predictions < REFERENCE_PREDICTIONS


def _label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return logits.float().sum()
    labelled = labels != IGNORE_INDEX
    return logits[labelled].float().gather(-1, labels[labelled][:, None]).sum()
