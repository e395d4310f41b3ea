"""The functional geometry of a teacher's state over batches, in one pass."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.geometry import class_geometry, language_model_geometry
from flexkd.core.scores import label_target
from flexkd.errors import ScoreError, UnsupportedModelError
from flexkd.models.hidden import HEAD_INPUT, is_generative, token_mask
from flexkd.train.frozen import frozen_eval, state_gradients
from flexkd.train.scoring import differentiable_states, own_inputs


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
            with torch.inference_mode(False), torch.enable_grad():
                inputs, labels = own_inputs(teacher, batch)
                if labels.is_floating_point():
                    raise UnsupportedModelError(
                        "geometry: only known for one class of several, not for independent labels or regression. Use "
                        "basis 'units', and a loss other than 'functional_cka'."
                    )
                leaves, logits, _, counts = differentiable_states(teacher, inputs, labels, (layer,))
                part = _geometry_part(teacher, leaves[layer], logits, layer, token_mask(inputs), generator)
            total = part if total is None else total + part
            predictions += int(counts.sum()) if is_generative(teacher) else len(labels)
    if total is None or predictions == 0:
        raise ScoreError("geometry: no prediction in the batches. Give rows.")
    return total / predictions


def _geometry_part(
    teacher: PreTrainedModel, state: Tensor, logits: Tensor, layer: int, tokens: Tensor, generator: torch.Generator
) -> Tensor:
    if layer != HEAD_INPUT:
        return _sampled_geometry(teacher, state, logits, tokens, generator)
    if is_generative(teacher):
        return language_model_geometry(logits.detach(), _head_weight(teacher, state[0].detach(), logits.detach()))
    columns = [state_gradients(teacher, logits[:, c].sum(), [state])[0] for c in range(logits.shape[1])]
    jacobian = torch.stack(columns, 2)
    # A row's classes read few positions; the others have a zero Jacobian and add nothing.
    rows, positions = (jacobian != 0).any(-1).any(-1).nonzero(as_tuple=True)
    return class_geometry(logits.detach()[rows], jacobian[rows, positions])


def _head_weight(teacher: PreTrainedModel, states: Tensor, logits: Tensor) -> Tensor:
    """The weight of a head that is linear and in plain numbers, which this batch proves."""
    head = teacher.get_output_embeddings()
    weight: Tensor = head.weight.detach()
    bias: Tensor | None = getattr(head, "bias", None)
    is_plain = weight.is_floating_point() and weight.shape == (logits.shape[1], states.shape[1])
    if not is_plain or not torch.allclose(F.linear(states, weight, bias).float(), logits.float(), rtol=1e-3, atol=1e-3):
        raise UnsupportedModelError(
            f"{type(teacher).__name__}: its logits are not its head's weight times the state. basis 'tangent' knows "
            "neither scale nor soft-cap nor packed weights yet: use basis 'units'."
        )
    return weight


def _sampled_geometry(
    teacher: PreTrainedModel, state: Tensor, logits: Tensor, tokens: Tensor, generator: torch.Generator
) -> Tensor:
    p = logits.detach().float().softmax(-1).cpu()
    drawn = torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)
    value = label_target(logits, drawn)
    gradient = state_gradients(teacher, value, [state])[0][tokens].double()
    return (gradient.T @ gradient).cpu()
