"""Unit scores of a teacher over batches: one pass, a frozen teacher that is left as it was."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.core.scores import ATTRIBUTIONS, TARGETS, ScoreAccumulator, UnitScores
from flexkd.core.tensors import IGNORE_INDEX
from flexkd.errors import DataError, ScoreError, unknown_name
from flexkd.models.forward.hidden import HEAD_INPUT, is_generative
from flexkd.models.loading.adapters import unwrapped
from flexkd.scoring.frozen import frozen_eval, state_gradients
from flexkd.scoring.teacher_graph import Reader

REFERENCE_PREDICTIONS = 256
"""The yard-stick |d logit / d h| is taken over so many predictions of a language model: it costs a backward more."""


@overload
def score_units(
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    target: str = ...,
    attribution: str = ...,
    layer: int = ...,
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
    seed: int = ...,
    precision: torch.dtype | None = ...,
) -> list[UnitScores]: ...


def score_units(
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    target: str = "log_prob",
    attribution: str = "gradient",
    layer: int | Sequence[int] = HEAD_INPUT,
    seed: int = 0,
    precision: torch.dtype | None = None,
) -> UnitScores | list[UnitScores]:
    """Score of every unit: `s_i = (1 / predictions) * sum over positions |d y / d h_i|`.

    At the head the gradient stops at `h`: a forward of the body, then the head on the supervised rows and back to `h`,
    never a pass back through the body. Below it one state feeds several labels: their contributions add before the
    absolute value, and the sum runs over all real positions. A language model's logits are made a chunk at a time.
    Softmax in float32, accumulated in float64.

    Args:
        teacher: Frozen or not, with adapters or without: it is scored in eval mode, and mode, `requires_grad`, `.grad`
            and hooks are left as they were.
        batches: Dicts of tensors as a Hugging Face collator makes them, with `labels`. Use rows of the training split.
        target: One of `core.scores.TARGETS`.
        attribution: One of `core.scores.ATTRIBUTIONS`; `activation`, `variance` and `random` are controls.
        layer: -1 for the state that the head reads, 1..N for the output of a block; a list scores all in one pass.
        seed: Of the `random` control.
        precision: Autocast to this type; None: as the weights are.

    Returns:
        `UnitScores`, or a list of them in the order of the layers.

    Raises:
        ScoreError: The scores mean nothing (vanishing, mostly equal, not finite), or a name is unknown.
        UnsupportedModelError: The outputs do not depend on the state that is read.
        ShapeError: There is no such layer.

    Source:
        Saadi and Wang, Flex-KD, 2025, arXiv:2507.10155, task-based unit scores; the target there is ours to choose, see
        docs/papers.md.
    """
    if target not in TARGETS:
        raise ScoreError(unknown_name("scores.target", "target", target, TARGETS))
    if attribution not in ATTRIBUTIONS:
        raise ScoreError(unknown_name("scores.attribution", "attribution", attribution, ATTRIBUTIONS))
    teacher = unwrapped(teacher)
    if isinstance(batches, Mapping):
        raise DataError("batches: one mapping was given. Give a list of them, [batch].")
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    if not layers:
        raise ScoreError("layer: an empty list was given. Name -1 (the head's input) or blocks from 1.")
    accumulators: dict[int, ScoreAccumulator] = {}
    reader = Reader(teacher, precision)
    with frozen_eval(teacher):
        for batch in batches:
            for at, part in _batch_gradients(reader, batch, layers, target, accumulators):
                if at not in accumulators:
                    width = part.states.shape[-1]
                    accumulators[at] = ScoreAccumulator(
                        width, target=target, attribution=attribution, layer=at, seed=seed
                    )
                part.add_to(accumulators[at])
    if not accumulators:
        raise ScoreError("scores: no batch was given. Give rows with labels.")
    scores = [accumulators[at].scores() for at in layers]
    return scores[0] if isinstance(layer, int) else scores


def check_state_is_read(teacher: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Refuse a classifier whose head does not read the state at the last layer, before it learns anything.

    Args:
        teacher: As scoring will find it, but for its weights.
        batch: A few rows with labels.

    Raises:
        UnsupportedModelError: As `score_units`.
    """
    reader = Reader(teacher)
    with frozen_eval(teacher), reader.graph():
        reading = reader.read(batch, (HEAD_INPUT,))
        assert reading is not None, "each row of a classifier is one prediction"
        assert isinstance(reading.outputs, Tensor), "a classifier has all its outputs"
        state_gradients(teacher, reading.outputs.float().sum(), [reading.states[HEAD_INPUT]])


@dataclass(frozen=True)
class _LayerGradients:
    """What one batch adds to the scores of one layer."""

    gradients: Float[Tensor, "rows positions hidden"]
    states: Float[Tensor, "rows positions hidden"]
    mask: Bool[Tensor, "rows positions"]
    predictions: Int[Tensor, " rows"]
    reference: Float[Tensor, "rows positions hidden"] | None
    reference_predictions: int

    def add_to(self, accumulator: ScoreAccumulator) -> None:
        accumulator.add(self.gradients, self.states, self.mask, self.predictions)
        if self.reference is not None:
            accumulator.add_reference(self.reference, self.mask, self.reference_predictions)


def _batch_gradients(
    reader: Reader,
    batch: Mapping[str, Any],
    layers: tuple[int, ...],
    target: str,
    seen: Mapping[int, ScoreAccumulator],
) -> Iterator[tuple[int, _LayerGradients]]:
    generative = is_generative(reader.teacher)
    with reader.graph():
        reading = reader.read(batch, layers)
        if reading is None or not bool((reading.counts > 0).any()):
            return
        # All asked layers lie on one graph: a lower one gets its derivative through the upper ones.
        states = [reading.states[at] for at in layers]
        gradients = state_gradients(reader.teacher, reading.label_target(target), states)
        referred = [at for at in layers if (at == HEAD_INPUT and not generative) or _wants_reference(seen.get(at))]
        first = reading.chunk_size if generative else len(reading.labels)
        reference: dict[int, Tensor] = {}
        if referred:
            plain = _label_logits(reading.outputs[:first], reading.labels[:first])
            found = state_gradients(reader.teacher, plain, [reading.states[at] for at in referred])
            reference = dict(zip(referred, found, strict=True))
    in_reference = min(first, int(reading.counts.sum()))
    for at, gradient, state in zip(layers, gradients, states, strict=True):
        mask, predictions = reading.tokens & (reading.counts > 0)[:, None], reading.counts
        if at == HEAD_INPUT and generative:
            mask = torch.ones_like(gradient[..., 0], dtype=torch.bool)
            predictions = mask[:, 0].long()
        elif at == HEAD_INPUT:
            # A state counts when a label reads it, which a gradient shows; that of the plain logits does so where the
            # label is certain.
            read = ((gradient != 0) | (reference[at] != 0)).any(-1)
            mask = read & (predictions > 0)[:, None]
        yield at, _LayerGradients(gradient, state.detach(), mask, predictions, reference.get(at), in_reference)


def _wants_reference(accumulator: ScoreAccumulator | None) -> bool:
    return accumulator is None or accumulator.reference_predictions < REFERENCE_PREDICTIONS


def _label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return logits.float().sum()
    kept = labels != IGNORE_INDEX
    return logits[kept].float().gather(-1, labels[kept][:, None]).sum()
