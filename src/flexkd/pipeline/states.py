"""States of a model on the calibration rows, at the positions of the feature term."""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.models.forward.hidden import model_inputs, states_and_logits, supervised_mask, token_mask
from flexkd.pipeline.job import Job
from flexkd.recipe import Recipe


def calibration_states(
    job: Job, recipe: Recipe, model: PreTrainedModel, layer: int, *, as_teacher: bool = False
) -> Float[Tensor, "positions hidden"]:
    """States of a model at a layer, float32 and on the CPU; the same positions in the same order for both models."""
    features = recipe.objective.features
    assert features is not None, "a feature term says at which positions"
    collected: list[Tensor] = []
    for batch in job.batches("train", num_rows=recipe.student.calibration_rows):
        inputs = {
            key: value.to(model.device) for key, value in model_inputs(model, batch, as_teacher=as_teacher).items()
        }
        labels = batch["labels"].to(model.device)
        mask = token_mask(inputs) if features.positions == "tokens" else supervised_mask(model, inputs, labels)
        # A language model's head runs on the positions it has labels for, whichever states are read.
        head_positions = supervised_mask(model, inputs, labels) if job.writes_text else None
        with torch.no_grad():
            states, _ = states_and_logits(model, inputs, (layer,), positions=head_positions)
        collected.append(states[layer][mask].float().cpu())
    return torch.cat(collected)
