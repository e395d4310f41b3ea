"""Where projectors begin and how their targets are scaled, against numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from flexkd.core.losses import Projector
from flexkd.core.projection import LinearMap, cut_map, head_map, unit_variance_basis
from tests.closeness import assert_close
from tests.references.draws import normal, rotation

KEPT = torch.tensor([0, 2, 5])


def related(positions: int, units: int, seed: int = 1) -> Tensor:
    """States whose units depend on each other, away from zero mean."""
    return normal(positions, units, seed=seed, mean=0.3) @ normal(units, units, seed=seed + 1) + 2


def mapped(linear_map: LinearMap, states: Tensor) -> Tensor:
    return states @ linear_map.weight.T + linear_map.bias


def ridge(inputs: Tensor, targets: Tensor, strength: float) -> Tensor:
    """The weights of standardized states by least squares of a system with one more row for each weight."""
    x, y = (side.double().numpy() for side in (inputs, targets))
    penalty = np.sqrt(strength * len(x)) * np.eye(x.shape[1])
    system, right = np.vstack([x, penalty]), np.vstack([y, np.zeros((x.shape[1], y.shape[1]))])
    return torch.as_tensor(np.linalg.lstsq(system, right, rcond=None)[0])


def standardized(states: Tensor) -> tuple[Tensor, Tensor]:
    deviation = states.double().std(0, correction=0)
    return (states.double() - states.double().mean(0)) / deviation, deviation


def test_units_of_any_size_get_variance_one_and_one_that_does_not_vary_becomes_zero() -> None:
    states = related(40, 5) * torch.tensor([1.0, 900.0, 1e-3, 1.0, 5.0])
    states[:, 3] = 300.01
    basis = unit_variance_basis(states)
    scaled = (states @ basis).double().numpy()
    np.testing.assert_allclose(scaled.std(0)[[0, 1, 2, 4]], 1, rtol=1e-5)
    assert not scaled[:, 3].any()
    assert not (basis - basis.diagonal().diag()).any()


@pytest.mark.parametrize("kind", ["units", "directions"])
def test_the_map_of_a_cut_is_exact_for_what_it_keeps_and_predicts_the_rest(kind: str) -> None:
    states = related(60, 6)
    directions = torch.eye(6)[:, KEPT] if kind == "units" else rotation(6, seed=4)[:, :3].float() * 1.7
    inputs = states @ directions
    linear_map = cut_map(states, directions)
    # What lies in the cut comes back as it was: a student that copies its teacher there costs nothing.
    torch.testing.assert_close(mapped(linear_map, inputs) @ directions, inputs, rtol=1e-4, atol=1e-4)
    if kind == "units":
        assert_close(linear_map.weight[KEPT], torch.eye(3))
        assert_close(linear_map.bias[KEPT], torch.zeros(3))
        others = [1, 3, 4]
        (x, x_size), (y, y_size) = standardized(states[:, KEPT]), standardized(states[:, others])
        strengths = [10.0**exponent for exponent in range(-6, 3)]
        errors = [(y[30:] - x[30:] @ ridge(x[:30], y[:30], strength)).square().sum() for strength in strengths]
        expected = ridge(x, y, strengths[int(torch.stack(errors).argmin())]) * y_size / x_size[:, None]
        torch.testing.assert_close(linear_map.weight[others].double(), expected.T, rtol=1e-4, atol=1e-5)
        assert_close(mapped(linear_map, inputs).mean(0), states.mean(0))


def test_a_rest_that_follows_from_what_is_kept_comes_back_on_other_rows() -> None:
    of_cut, mixing = normal(80, 3, seed=1, mean=0.4), normal(3, 4, seed=2)
    states = torch.cat([of_cut, of_cut @ mixing + 1], 1)
    linear_map = cut_map(states[:40], torch.eye(7)[:, :3])
    torch.testing.assert_close(mapped(linear_map, states[40:, :3]), states[40:], rtol=1e-3, atol=1e-3)


def test_a_rest_that_cannot_be_predicted_is_its_mean() -> None:
    """Least squares of 50 positions would make of 40 unrelated units a prediction that is worse than none."""
    states = normal(50, 60, seed=3, mean=0.4)
    linear_map = cut_map(states, torch.eye(60)[:, :40])
    assert linear_map.weight[40:].abs().max() < 0.1
    assert_close(linear_map.weight[:40], torch.eye(40))
    new = normal(400, 60, seed=4, mean=0.4)
    error = (mapped(linear_map, new[:, :40]) - new)[:, 40:].square().mean()
    assert error < 1.1 * new[:, 40:].var(0).mean()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_map_of_a_cut_is_finite_and_exact_for_few_positions(count: int) -> None:
    linear_map = cut_map(related(count, 6), torch.eye(6)[:, KEPT])
    assert_close(linear_map.weight[KEPT], torch.eye(3))
    assert linear_map.weight.isfinite().all()
    assert linear_map.bias.isfinite().all()


def test_under_the_teachers_head_a_mapped_state_has_the_logits_of_the_student() -> None:
    w_s, w_t = normal(50, 3, seed=5), normal(50, 7, seed=6)
    linear_map = head_map(w_s, w_t)
    expected = w_s.double().numpy().T @ np.linalg.pinv(w_t.double().numpy().T)
    assert_close(linear_map.weight, torch.as_tensor(expected.T), dtype=torch.float32)
    # Where the teacher's head can say what the student's says, the logits are the same.
    inside = (w_t @ normal(7, 3, seed=7)).float()
    states, bias = normal(9, 3, seed=8), w_t @ normal(7, seed=9)
    logits = mapped(head_map(inside, w_t, bias), states) @ w_t.T
    torch.testing.assert_close(logits, states @ inside.T + bias, rtol=1e-4, atol=1e-4)
    assert_close(head_map(w_t, w_t).weight, torch.eye(7))


def test_a_projector_that_begins_with_a_map_computes_it_in_the_basis_of_its_targets() -> None:
    states, basis = related(60, 6), torch.diag(normal(6, seed=10).abs() + 0.1)
    linear_map = cut_map(states, torch.eye(6)[:, KEPT])
    projector = Projector(3, 6)
    projector.begin_with(linear_map.in_basis(basis))
    torch.testing.assert_close(projector(states[:, KEPT]), mapped(linear_map, states[:, KEPT]) @ basis)
