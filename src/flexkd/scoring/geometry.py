"""The functional geometry of a teacher's state over batches, in one pass."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.geometry import LanguageModelGeometry, class_geometry
from flexkd.errors import ScoreError, UnsupportedModelError
from flexkd.models.forward.hidden import HEAD_INPUT, is_generative
from flexkd.processes import gathered, share_of
from flexkd.scoring.frozen import frozen_eval, state_gradients
from flexkd.scoring.teacher_graph import TeacherPass, TeacherReader, Watch


def functional_geometry(
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    layer: int = HEAD_INPUT,
    seed: int = 0,
    watches: Sequence[Watch] = (),
) -> Float64[Tensor, "hidden hidden"]:
    """The Fisher form `G = E_h[sum_v p_v grad(log p_v) grad(log p_v)^T]` of a teacher's state, mean over predictions.

    At the head it is exact: one vector-Jacobian product for each class, or, for a language model, a product with the
    head's weight, without a backward pass. Below the head, labels are sampled from p, with one backward a batch.

    Args:
        teacher: As in `score_units`.
        batches: As in `score_units`.
        layer: A single layer, numbered as in `score_units`.
        seed: Seed of the sampled labels.
        watches: As in `TeacherReader.read`, for the first batches, one each.

    Raises:
        UnsupportedModelError: The head of a language model is more than a matrix, a scale, a soft-cap and a bias.
        ScoreError: The batches contain no prediction.
    """
    generator = torch.Generator().manual_seed(seed)
    reader = TeacherReader(teacher)
    at_head: LanguageModelGeometry | None = None
    total, predictions = None, 0
    watched = zip(batches, chain(watches, repeat(nullcontext)), strict=False)
    # Below the head labels are drawn in the order of the batches, so that each process reads all of them.
    is_divided = layer == HEAD_INPUT
    with frozen_eval(teacher):
        for batch, watch in share_of(watched) if is_divided else watched:
            _check_labels(batch["labels"])
            with reader.graph():
                teacher_pass = reader.read(batch, (layer,), watch)
                if teacher_pass is None:
                    continue
                predictions += len(teacher_pass.labels)
                if layer == HEAD_INPUT and is_generative(teacher):
                    at_head = _with_predictions(teacher, teacher_pass, at_head)
                    continue
                if layer == HEAD_INPUT:
                    part = _exact_part(teacher, teacher_pass)
                else:
                    part = _sampled_part(teacher, teacher_pass, generator)
            total = part if total is None else total + part
    total = total if at_head is None else at_head.total()
    parts = gathered((total, predictions)) if is_divided else [(total, predictions)]
    totals = [total for total, _ in parts if total is not None]
    if not totals:
        raise ScoreError("geometry: no prediction in the batches. Give rows.")
    return functools.reduce(torch.add, totals) / sum(predictions for _, predictions in parts)


def _check_labels(labels: Tensor) -> None:
    if labels.is_floating_point():
        raise UnsupportedModelError(
            "geometry: only known for one class of several, not for independent labels or regression. Use "
            "basis 'units', and a loss other than 'functional_cka'."
        )


def _with_predictions(
    teacher: PreTrainedModel, teacher_pass: TeacherPass, form: LanguageModelGeometry | None
) -> LanguageModelGeometry:
    """Add the predictions of a batch to the form, for a linear head whose weight is known."""
    outputs = teacher_pass.outputs
    if isinstance(outputs, Tensor) or outputs.head.weight is None:
        raise UnsupportedModelError(
            f"{type(teacher).__name__}: its logits are not its head's weight times the state, with a scale, a soft-cap "
            "or a bias that is known (packed weights, an adapter?). Use basis 'units'."
        )
    form = LanguageModelGeometry(outputs.head.weight) if form is None else form
    for chunk in teacher_pass.chunks():
        raw = F.linear(outputs.states[chunk].detach(), outputs.head.weight, outputs.head.bias).requires_grad_()
        logits = outputs.head.finish_logits(raw)
        # `finish` is elementwise, so that its derivatives are those of the sum.
        slope = None if outputs.head.finish is None else torch.autograd.grad(logits.sum(), raw)[0]
        form.add(logits.detach(), slope)
    return form


def _exact_part(teacher: PreTrainedModel, teacher_pass: TeacherPass) -> Tensor:
    logits, state = teacher_pass.outputs[:], teacher_pass.states[HEAD_INPUT]
    columns = [state_gradients(teacher, logits[:, c].sum(), [state])[0] for c in range(logits.shape[1])]
    jacobian = torch.stack(columns, 2)
    # The classes of a row depend on few positions; the others have a zero Jacobian and add nothing.
    row_indices, positions = (jacobian != 0).any(-1).any(-1).nonzero(as_tuple=True)
    return class_geometry(logits.detach()[row_indices], jacobian[row_indices, positions])


def _sampled_part(teacher: PreTrainedModel, teacher_pass: TeacherPass, generator: torch.Generator) -> Tensor:
    (layer,) = (layer for layer in teacher_pass.states if layer != HEAD_INPUT)
    samples = []
    for chunk in teacher_pass.chunks():
        p = teacher_pass.outputs[chunk].detach().float().softmax(-1).cpu()
        samples.append(torch.multinomial(p, 1, generator=generator)[:, 0])
    labels = torch.cat(samples).to(teacher_pass.labels.device)
    value = replace(teacher_pass, labels=labels).label_target("log_prob")
    gradient = state_gradients(teacher, value, [teacher_pass.states[layer]])[0][teacher_pass.tokens].double()
    return (gradient.T @ gradient).cpu()
