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


def least_squares(inputs: Tensor, targets: Tensor) -> Tensor:
    """The targets as the best affine map of the inputs gives them."""
    columns = np.column_stack([inputs.double().numpy(), np.ones(len(inputs))])
    return torch.as_tensor(columns @ np.linalg.pinv(columns) @ targets.double().numpy())


def test_units_of_any_size_get_variance_one_and_one_that_does_not_vary_becomes_zero() -> None:
    states = related(40, 5) * torch.tensor([1.0, 900.0, 1e-3, 1.0, 5.0])
    states[:, 3] = 300.01
    basis = unit_variance_basis(states)
    scaled = (states @ basis).double().numpy()
    np.testing.assert_allclose(scaled.std(0)[[0, 1, 2, 4]], 1, rtol=1e-5)
    assert not scaled[:, 3].any()
    assert not (basis - basis.diagonal().diag()).any()


@pytest.mark.parametrize("kind", ["units", "directions"])
def test_the_map_of_a_cut_is_the_best_affine_map_of_what_the_cut_keeps(kind: str) -> None:
    states = related(60, 6)
    directions = torch.eye(6)[:, KEPT] if kind == "units" else rotation(6, seed=4)[:, :3].float() * 1.7
    inputs = states @ directions
    linear_map = cut_map(states, directions)
    torch.testing.assert_close(mapped(linear_map, inputs).double(), least_squares(inputs, states), rtol=1e-4, atol=1e-4)
    # What lies in the cut comes back as it was: a student that copies its teacher there costs nothing.
    torch.testing.assert_close(mapped(linear_map, inputs) @ directions, inputs, rtol=1e-4, atol=1e-4)
    if kind == "units":
        assert_close(linear_map.weight[KEPT], torch.eye(3))
        assert_close(linear_map.bias[KEPT], torch.zeros(3))


def test_the_map_of_a_cut_is_exact_where_positions_are_fewer_than_units() -> None:
    states = related(2, 6)
    linear_map = cut_map(states, torch.eye(6)[:, KEPT])
    assert_close(linear_map.weight[KEPT], torch.eye(3))
    assert linear_map.weight.isfinite().all()
    torch.testing.assert_close(mapped(linear_map, states[:, KEPT]), states, rtol=1e-4, atol=1e-4)


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
