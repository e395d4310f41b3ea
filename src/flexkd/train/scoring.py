"""Unit scores of a teacher over batches: one pass, a frozen teacher that is left as it was."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.core.scores import ATTRIBUTIONS, TARGETS, ScoreAccumulator, UnitScores, label_target
from flexkd.core.tensors import IGNORE_INDEX
from flexkd.errors import ScoreError, unknown_name
from flexkd.models.adapters import unwrapped
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
from flexkd.train.frozen import frozen_eval, state_gradients

REFERENCE_PREDICTIONS = 256
"""Below the head, the yard-stick |d logit / d h| is taken over so many predictions: it costs a backward more."""


@overload
def score_units(
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    target: str = ...,
    attribution: str = ...,
    layer: int = ...,
    seed: int = ...,
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
) -> list[UnitScores]: ...


def score_units(
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    target: str = "log_prob",
    attribution: str = "gradient",
    layer: int | Sequence[int] = HEAD_INPUT,
    seed: int = 0,
) -> UnitScores | list[UnitScores]:
    """Score of every unit: `s_i = (1 / predictions) * sum over positions |d y / d h_i|`.

    At the head the gradient stops at `h`: a forward, the head and its backward, never a pass back through the body.
    Below it one state feeds several labels: their contributions add before the absolute value, and the sum runs over
    all real positions. Computed in the model's own dtype, softmax in float32, accumulated in float64.

    Args:
        teacher: Frozen or not, with adapters or without: it is scored in eval mode, and mode, `requires_grad`, `.grad`
            and hooks are left as they were.
        batches: Dicts of tensors as a Hugging Face collator makes them, with `labels`. Use rows of the training split.
        target: One of `core.scores.TARGETS`.
        attribution: One of `core.scores.ATTRIBUTIONS`; `activation`, `variance` and `random` are controls.
        layer: -1 for the state that the head reads, 1..N for the output of a block; a list scores all in one pass.
        seed: Of the `random` control.

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
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    accumulators: dict[int, ScoreAccumulator] = {}
    with frozen_eval(teacher):
        for batch in batches:
            for at, part in _batch_gradients(teacher, batch, layers, target, accumulators):
                if at not in accumulators:
                    width = part.states.shape[-1]
                    accumulators[at] = ScoreAccumulator(
                        width, target=target, attribution=attribution, layer=at, seed=seed
                    )
                accumulators[at].add(part.gradients, part.states, part.mask, part.predictions, part.logit_gradients)
    if not accumulators:
        raise ScoreError("scores: no batch was given. Give rows with labels.")
    scores = [accumulators[at].scores() for at in layers]
    return scores[0] if isinstance(layer, int) else scores


@dataclass(frozen=True)
class _LayerGradients:
    """What one batch adds to the scores of one layer."""

    gradients: Float[Tensor, "rows positions hidden"]
    states: Float[Tensor, "rows positions hidden"]
    mask: Bool[Tensor, "rows positions"]
    predictions: Int[Tensor, " rows"]
    logit_gradients: Float[Tensor, "rows positions hidden"] | None


def _batch_gradients(
    teacher: PreTrainedModel,
    batch: Mapping[str, Any],
    layers: tuple[int, ...],
    target: str,
    seen: Mapping[int, ScoreAccumulator],
) -> Iterator[tuple[int, _LayerGradients]]:
    with torch.inference_mode(False), torch.enable_grad():
        inputs, labels = own_inputs(teacher, batch)
        leaves, logits, flat_labels, counts = differentiable_states(teacher, inputs, labels, layers)
        if not bool((counts > 0).any()):
            return
        value = label_target(logits, flat_labels, target=target)
        states = [leaves[at] for at in layers]
        # All asked layers lie on one graph: a lower one gets its derivative through the upper ones.
        gradients = state_gradients(teacher, value, states)
        needs_reference = [at for at in layers if at == HEAD_INPUT or _wants_reference(seen.get(at))]
        reference: dict[int, Tensor] = {}
        if needs_reference:
            plain = _label_logits(logits, flat_labels)
            found = state_gradients(teacher, plain, [leaves[at] for at in needs_reference])
            reference = dict(zip(needs_reference, found, strict=True))
    for at, gradient, state in zip(layers, gradients, states, strict=True):
        if at != HEAD_INPUT:
            mask = token_mask(inputs) & (counts > 0)[:, None]
            yield at, _LayerGradients(gradient, state.detach(), mask, counts, reference.get(at))
            continue
        # At the head a state counts when a label reads it, which a gradient shows; that of the plain logits does so
        # where the label is certain. The states of a language model are one row of predictions there: each becomes a
        # row of its own.
        flip = is_generative(teacher)
        tensors = [t.transpose(0, 1) if flip else t for t in (gradient, state.detach(), reference[at])]
        per_row = torch.ones(len(tensors[0]), dtype=torch.long, device=counts.device) if flip else counts
        mask = ((tensors[0] != 0) | (tensors[2] != 0)).any(-1) & (per_row > 0)[:, None]
        yield at, _LayerGradients(tensors[0], tensors[1], mask, per_row, tensors[2])


def own_inputs(teacher: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """The teacher's encoding of a batch and its labels, on its device."""
    # A tensor that was made under inference_mode cannot stand in a graph; its copy can.
    inputs = model_inputs(teacher, batch, own=True)
    return {k: v.to(teacher.device).clone() for k, v in inputs.items()}, batch["labels"].to(teacher.device).clone()


def _wants_reference(accumulator: ScoreAccumulator | None) -> bool:
    return accumulator is None or accumulator.reference_predictions < REFERENCE_PREDICTIONS


def differentiable_states(
    teacher: PreTrainedModel, inputs: Mapping[str, Tensor], labels: Tensor, layers: tuple[int, ...]
) -> tuple[dict[int, Tensor], Tensor, Tensor, Tensor]:
    """One forward whose graph starts at the lowest asked layer.

    Returns:
        States by layer, logits of the predictions, their labels, and how many predictions each row of the states has.
    """
    generative = is_generative(teacher)
    rows = supervised_mask(teacher, inputs, labels) if generative else None
    flat_labels = _as_targets(labels) if rows is None else prediction_labels(teacher, labels, rows)
    at_head: dict[int, Tensor] = {}
    below = [layer for layer in layers if layer != HEAD_INPUT]

    def start(state: Tensor) -> Tensor:
        return state if state.requires_grad else state.detach().requires_grad_()

    def head_rows(state: Tensor) -> Tensor:
        picked = state if rows is None else state[rows][None]
        at_head[HEAD_INPUT] = start(picked)
        return at_head[HEAD_INPUT]

    started: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def replace(state: Tensor) -> Tensor:
            started[layer] = start(state)
            return started[layer]

        return replace

    with hooked_states(teacher, {**{layer: keep(layer) for layer in below}, HEAD_INPUT: head_rows}):
        logits = teacher(**inputs, **({"use_cache": False} if generative else {})).logits
    check_layout(teacher, inputs, started)
    leaves = {**started, **at_head}
    counts = rows.sum(1) if rows is not None else _is_labelled(labels).long()
    return leaves, (logits[0] if generative else logits), flat_labels, counts


def _as_targets(labels: Tensor) -> Tensor:
    return labels[:, None] if labels.is_floating_point() and labels.ndim == 1 else labels


def _is_labelled(labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return ~torch.isnan(labels.flatten(1) if labels.ndim > 1 else labels[:, None]).any(-1)
    return labels != IGNORE_INDEX


def _label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return logits.float().sum()
    kept = labels != IGNORE_INDEX
    return logits[kept].float().gather(-1, labels[kept][:, None]).sum()
