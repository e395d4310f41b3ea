import re

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import entropy
from torch import Tensor

from flexkd.core.geometry import (
    LanguageModelGeometry,
    class_geometry,
    geometry_coverage,
    lowest_directions,
    matrix_square_root,
    tangent_basis,
)
from flexkd.errors import ShapeError
from tests.closeness import assert_close
from tests.references import geometry as reference
from tests.references.draws import normal, rotation

Array = npt.NDArray[np.float64]
INNER, OUTER = normal(7, 5, seed=1, scale=0.5, dtype=torch.float64), normal(4, 7, seed=2, dtype=torch.float64)


def two_layer_head(states: Tensor) -> Tensor:
    return (states @ INNER.T).tanh() @ OUTER.T


def two_layer_head_of_array(state: Array) -> Array:
    return np.tanh(state @ INNER.numpy().T) @ OUTER.numpy().T


def jacobian_of(states: Tensor) -> Tensor:
    return torch.stack([torch.autograd.functional.jacobian(two_layer_head, state) for state in states])


def language_model_geometry(logits: Tensor, weight: Tensor, slope: Tensor | None = None) -> Tensor:
    geometry = LanguageModelGeometry(weight)
    geometry.add(logits, slope)
    return geometry.total()


def test_class_geometry_is_the_sum_of_squared_log_probability_gradients() -> None:
    states = normal(3, 5, seed=3, dtype=torch.float64)
    geometry = class_geometry(two_layer_head(states), jacobian_of(states))
    # Central differences of the reference are exact to 1e-10; products of two of them to a few 1e-9.
    expected = torch.tensor(reference.fisher(two_layer_head_of_array, states))
    torch.testing.assert_close(geometry, expected, rtol=1e-7, atol=1e-8)


def test_class_geometry_is_the_second_order_of_the_divergence() -> None:
    state = normal(1, 5, seed=4, dtype=torch.float64)
    geometry = class_geometry(two_layer_head(state), jacobian_of(state)).numpy()
    for seed in range(5):
        step = 1e-3 * normal(5, seed=10 + seed, dtype=torch.float64).numpy()
        expected = reference.divergence_of_step(two_layer_head_of_array, state[0].numpy(), step)
        # The third order is 1e-3 of the second.
        assert step @ geometry @ step / 2 == pytest.approx(expected, rel=5e-3)


def test_class_geometry_has_a_rank_below_the_number_of_classes() -> None:
    states, weight = normal(50, 6, seed=5), normal(3, 6, seed=6)
    geometry = class_geometry(states @ weight.T, weight.expand(50, 3, 6))
    assert torch.linalg.matrix_rank(geometry, hermitian=True, rtol=1e-9) == 2
    assert torch.equal(geometry, geometry.T) or (geometry - geometry.T).abs().max() < 1e-12


def test_language_model_geometry_is_class_geometry_of_a_linear_head() -> None:
    states, weight = normal(20, 6, seed=7), normal(30, 6, seed=8)
    logits = states @ weight.T
    assert_close(language_model_geometry(logits, weight), class_geometry(logits, weight.expand(20, 30, 6)))


@pytest.mark.parametrize("cap", [None, 2.0])
def test_language_model_geometry_knows_the_logit_scale_and_the_soft_cap(cap: float | None) -> None:
    states, weight = normal(3, 4, seed=9, dtype=torch.float64), normal(6, 4, seed=10, dtype=torch.float64)

    def head(state: Array) -> Array:
        raw = 0.7 * (state @ weight.numpy().T)
        return raw if cap is None else cap * np.tanh(raw / cap)

    logits = torch.tensor(head(states.numpy()))
    slope = torch.full_like(logits, 0.7) if cap is None else 0.7 * (1 - (logits / cap).square())
    geometry = language_model_geometry(logits, weight, slope)
    torch.testing.assert_close(geometry, torch.tensor(reference.fisher(head, states)), rtol=1e-7, atol=1e-8)


def test_a_vocabulary_padded_with_minus_infinity_has_the_same_geometry() -> None:
    states, weight = normal(20, 6, seed=7), normal(30, 6, seed=8)
    logits = states @ weight.T
    padded = torch.cat([logits, torch.full((20, 2), -float("inf"))], 1)
    assert_close(
        language_model_geometry(padded, torch.cat([weight, normal(2, 6, seed=11)])),
        language_model_geometry(logits, weight),
    )


def test_predictions_add_up_in_any_parts() -> None:
    states, weight = normal(20, 6, seed=7), normal(30, 6, seed=8)
    logits = states @ weight.T
    parts = LanguageModelGeometry(weight)
    for part in logits.split(7):
        parts.add(part)
    assert_close(parts.total(), language_model_geometry(logits, weight))


def test_tangent_basis_finds_a_planted_low_rank_geometry() -> None:
    planted = rotation(12, seed=12)[:, :3]
    states = normal(400, 12, seed=13, dtype=torch.float64)
    weight = normal(40, 3, seed=14, dtype=torch.float64) @ planted.T
    geometry = language_model_geometry(states @ weight.T, weight)
    basis = tangent_basis(geometry, 3).double()
    assert basis.shape == (12, 3)
    assert_close(basis @ basis.T, planted @ planted.T, dtype=torch.float32)
    assert_close(geometry_coverage(geometry)[2], 1.0)
    # No three coordinates hold what three directions hold.
    best_units = geometry.diagonal().sort(descending=True).values[:3].sum() / geometry.trace()
    assert best_units < 0.8


def test_tangent_basis_is_ordered_orthonormal_and_signed() -> None:
    turn = rotation(6, seed=15)
    geometry = (turn * torch.tensor([1.0, 9.0, 4.0, 16.0, 0.0, 2.0])) @ turn.T
    basis = tangent_basis(geometry, 4)
    assert basis.dtype == torch.float32
    assert_close(basis.T @ basis, torch.eye(4))
    assert_close((basis.double().T @ geometry @ basis.double()).diagonal(), [16.0, 9.0, 4.0, 2.0], dtype=torch.float32)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("k", [0, 7])
def test_tangent_basis_refuses_a_size_it_cannot_have(k: int) -> None:
    with pytest.raises(ShapeError, match=re.escape(f"tangent basis: cannot take {k} of 6 directions. Ask for 1 to 6.")):
        tangent_basis(torch.eye(6, dtype=torch.float64), k)


def test_square_root_times_itself_is_the_geometry_and_agrees_with_scipy() -> None:
    factor = normal(6, 6, seed=16, dtype=torch.float64)
    geometry = factor @ factor.T
    root = matrix_square_root(geometry)
    assert_close(root.double() @ root.double(), geometry, dtype=torch.float32)
    assert_close(root, sqrtm(geometry.numpy()).real, dtype=torch.float32)
    assert_close(root, root.T)
    singular = factor[:, :2] @ factor[:, :2].T
    assert matrix_square_root(singular).isfinite().all()


def test_coverage_of_a_geometry_is_the_share_of_its_trace() -> None:
    turn = rotation(4, seed=17)
    geometry = (turn * torch.tensor([1.0, 4.0, 3.0, 2.0])) @ turn.T
    assert_close(geometry_coverage(geometry), [0.4, 0.7, 0.9, 1.0])


def test_the_divergence_of_the_reference_is_scipys() -> None:
    state, step = normal(5, seed=18, dtype=torch.float64), normal(5, seed=19, dtype=torch.float64)
    p, q = two_layer_head(state).softmax(-1), two_layer_head(state + step).softmax(-1)
    ours = reference.divergence_of_step(two_layer_head_of_array, state.numpy(), step.numpy())
    assert ours == pytest.approx(entropy(p.numpy(), q.numpy()))


def test_the_lowest_directions_lie_in_what_the_form_reaches_smallest_first() -> None:
    vectors = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    form = (vectors[:, :3] * torch.tensor([5.0, 1.0, 4.0], dtype=torch.float64)) @ vectors[:, :3].T
    basis, shares = lowest_directions(form)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
    expected = vectors[:, [1, 2, 0]].float()
    torch.testing.assert_close((basis * expected).sum(0).abs(), torch.ones(3), rtol=1e-5, atol=1e-5)
