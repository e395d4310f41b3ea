"""The functional geometry of a teacher's state over batches, in one pass."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.geometry import class_geometry, language_model_geometry
from flexkd.core.scores import label_target
from flexkd.errors import ScoreError, UnsupportedModelError
from flexkd.models.hidden import HEAD_INPUT, is_causal, model_inputs, token_mask
from flexkd.train.scoring import differentiable_states, frozen_eval


def functional_geometry(
    teacher: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, layer: int = HEAD_INPUT, seed: int = 0
) -> Float64[Tensor, "hidden hidden"]:
    """The Fisher form `G = E_h[sum_v p_v grad(log p_v) grad(log p_v)^T]` of a teacher's state, mean over predictions.

    At the head it is exact: one vector-Jacobian product for each class, or, for a language model, from the head's
    weight without a backward. Below it labels are drawn from p, and each row gives one backward.

    Args:
        teacher: As in `score_units`.
        batches: As in `score_units`.
        layer: As in `score_units`, one.
        seed: Of the drawn labels.

    Raises:
        UnsupportedModelError: The language model's logits are not its head's output (scale, soft-cap).
        ScoreError: No prediction was seen.
    """
    generator = torch.Generator().manual_seed(seed)
    total, predictions = None, 0
    with frozen_eval(teacher):
        for batch in batches:
            labels = batch["labels"].to(teacher.device)
            inputs = {key: value.to(teacher.device) for key, value in model_inputs(teacher, batch, own=True).items()}
            with torch.enable_grad():
                leaves, logits, _, counts = differentiable_states(teacher, inputs, labels, (layer,))
                part = _geometry_part(teacher, leaves[layer], logits, layer, token_mask(inputs), generator)
            total = part if total is None else total + part
            predictions += int(counts.sum()) if is_causal(teacher) else len(labels)
    if total is None or predictions == 0:
        raise ScoreError("geometry: no prediction in the batches. Give rows.")
    return total / predictions


def _geometry_part(
    teacher: PreTrainedModel, state: Tensor, logits: Tensor, layer: int, tokens: Tensor, generator: torch.Generator
) -> Tensor:
    if layer != HEAD_INPUT:
        return _sampled_geometry(state, logits, tokens, generator)
    if is_causal(teacher):
        head = teacher.get_output_embeddings()
        if not torch.allclose(head(state[0]).float(), logits.float(), rtol=1e-3, atol=1e-3):
            raise UnsupportedModelError(
                f"{type(teacher).__name__}: its logits are not the output of its head. basis 'tangent' does not know "
                "its scale or soft-cap yet: use basis 'units'."
            )
        return language_model_geometry(logits.detach(), head.weight.detach())
    columns = [torch.autograd.grad(logits[:, c].sum(), state, retain_graph=True)[0] for c in range(logits.shape[1])]
    jacobian = torch.stack(columns, 2)
    # A row's classes read few positions; the others have a zero Jacobian and add nothing.
    rows, positions = (jacobian != 0).any(-1).any(-1).nonzero(as_tuple=True)
    return class_geometry(logits.detach()[rows], jacobian[rows, positions])


def _sampled_geometry(state: Tensor, logits: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    p = logits.detach().float().softmax(-1).cpu()
    drawn = torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)
    value = label_target(logits, drawn)
    gradient = torch.autograd.grad(value, state)[0][tokens].double()
    return (gradient.T @ gradient).cpu()
