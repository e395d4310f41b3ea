import numpy as np
import pytest
import torch

from flexkd.core.tensors import IGNORE_INDEX, all_reduce_sum, masked_mean, num_processes, select_positions
from tests.closeness import assert_close
from tests.references.draws import normal

NAN = float("nan")


def test_masked_mean_is_the_mean_of_the_selected_values() -> None:
    values, mask = normal(3, 5, seed=1), normal(3, 5, seed=2) > 0
    assert_close(masked_mean(values, mask), float(np.mean(values.double().numpy()[mask.numpy()])))


def test_masked_mean_gradient_is_one_over_the_number_of_selected_values() -> None:
    values = normal(7, seed=1).requires_grad_()
    mask = torch.tensor([True, False, True, True, False, False, True])
    masked_mean(values, mask).backward()
    assert_close(values.grad, mask / 4)


def test_masked_mean_passes_gradcheck_in_float64() -> None:
    values = normal(2, 4, seed=3, dtype=torch.float64).requires_grad_()
    mask = normal(2, 4, seed=4) > 0
    assert torch.autograd.gradcheck(lambda v: masked_mean(v, mask), (values,))


@pytest.mark.parametrize("outside", [NAN, float("inf"), -float("inf")])
def test_masked_mean_ignores_what_is_outside_of_the_mask(outside: float) -> None:
    values = torch.tensor([1.0, outside, 3.0], requires_grad=True)
    mean = masked_mean(values, torch.tensor([True, False, True]))
    mean.backward()
    assert mean.item() == 2.0
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_masked_mean_does_not_hide_a_nan_inside_of_the_mask() -> None:
    assert masked_mean(torch.tensor([1.0, NAN]), torch.tensor([True, True])).isnan()


@pytest.mark.parametrize("shape", [(4,), (2, 3), (0,)])
def test_M01_masked_mean_of_nothing_is_a_connected_zero(shape: tuple[int, ...]) -> None:
    values = torch.full(shape, NAN, requires_grad=True)
    mean = masked_mean(values, torch.zeros(shape, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0.0
    assert values.grad is not None
    assert values.grad.tolist() == torch.zeros(shape).tolist()


def test_M01_a_row_without_labels_changes_nothing_beside_a_good_row() -> None:
    losses, labels = normal(2, 6, seed=5), torch.full((2, 6), IGNORE_INDEX)
    labels[0, 2:5] = 1
    assert_close(masked_mean(losses, labels != IGNORE_INDEX), masked_mean(losses[:1], labels[:1] != IGNORE_INDEX))


def test_select_positions_keeps_order_drops_the_rest_and_upcasts() -> None:
    states = normal(2, 3, 4, seed=6, dtype=torch.bfloat16)
    mask = torch.tensor([[False, True, True], [True, False, False]])
    rows = select_positions(states, mask)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, torch.stack([states[0, 1], states[0, 2], states[1, 0]]).float())
    assert torch.equal(select_positions(states, None), states.float().reshape(6, 4))


def test_one_process_sums_nothing() -> None:
    values = normal(3, seed=7)
    assert num_processes() == 1
    assert all_reduce_sum(values) is values
