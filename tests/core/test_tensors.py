import torch

from flexkd.core.tensors import all_reduce_sum, num_processes, select_positions
from tests.references.draws import normal

NAN = float("nan")


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
