"""The Fisher form of real architectures: against finite differences of the divergence, and a planted low rank."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.geometry import geometry_coverage, tangent_basis
from flexkd.core.losses import forward_kl
from flexkd.errors import UnsupportedModelError
from flexkd.models.hidden import hooked_states, model_inputs
from flexkd.train.geometry import functional_geometry
from tests.tiny import tiny_batch, tiny_model


def mean_divergence(model: PreTrainedModel, batch: dict[str, Tensor], shift: Tensor) -> float:
    """Mean KL of a classifier's output when the state that the head reads moves by the shift, in float64."""
    model = model.double()
    inputs = model_inputs(model, batch)
    with torch.no_grad():
        plain = model(**inputs).logits
        with hooked_states(model, {-1: lambda state: state + shift}):
            moved = model(**inputs).logits
    p, q = plain.log_softmax(-1), moved.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_form_is_the_curvature_of_the_divergence() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model, rows=6)
    geometry = functional_geometry(model, [batch])
    for seed in range(3):
        direction = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        shift = 1e-3 * direction / direction.norm()
        predicted = float(shift @ geometry @ shift) / 2
        # Second order against the whole: the next term is of relative size 1e-3.
        assert mean_divergence(tiny_model("bert"), batch, shift) == pytest.approx(predicted, rel=1e-2)


def test_a_planted_low_rank_is_found_and_single_units_hold_less() -> None:
    model = tiny_model("llama", "causal", tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(1)
    planted = torch.linalg.qr(torch.randn(32, 5, generator=generator)).Q
    with torch.no_grad():
        model.lm_head.weight.copy_(3 * torch.randn(61, 5, generator=generator) @ planted.T)
    geometry = functional_geometry(model, [tiny_batch(model, rows=8, seed=s) for s in range(3)])
    basis = tangent_basis(geometry, 5)
    cosines = torch.linalg.svdvals(planted.T @ basis)
    assert cosines.min() > 0.9999
    assert geometry_coverage(geometry)[4] > 0.9999
    units = geometry.diagonal().sort(descending=True).values.cumsum(0) / geometry.trace()
    assert units[4] < 0.6


def test_drawn_labels_come_close_to_the_exact_form_below_the_head() -> None:
    model = tiny_model("bert", num_hidden_layers=1)
    batches = [tiny_batch(model, rows=64, length=2, seed=s) for s in range(60)]
    exact, drawn = functional_geometry(model, batches), functional_geometry(model, batches, layer=1)
    # The output of the last block is the head's input; 3,840 draws leave a relative error near 2 %.
    assert float((exact - drawn).norm() / exact.norm()) < 0.1


def test_a_head_with_a_soft_cap_is_refused_by_name() -> None:
    model = tiny_model("gemma2", "causal", head_dim=8, num_key_value_heads=2, final_logit_softcapping=1.0)
    with pytest.raises(UnsupportedModelError, match="knows neither scale nor soft-cap"):
        functional_geometry(model, [tiny_batch(model)])


def test_equal_models_have_no_divergence() -> None:
    logits = torch.randn(3, 4)
    assert forward_kl(logits, logits).abs().max() < 1e-7
