"""The order of the rows: all of them, alike in length within a batch, and a function of seed and epoch alone."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from torch.utils.data import DataLoader

from flexkd.training.sampler import BATCHES_SORTED_TOGETHER, LengthGroupedOrder


def lengths(rows: int) -> list[int]:
    return torch.randint(4, 100, (rows,), generator=torch.Generator().manual_seed(0)).tolist()


def order(rows: int = 1000, batch_size: int = 8, seed: int = 0, epoch: int = 0) -> list[int]:
    sampler = LengthGroupedOrder(lengths(rows), batch_size, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize(
    ("rows", "batch_size"), [(0, 4), (1, 4), (3, 4), (4, 4), (257, 8), (1000, 8), (1000, 1), (9, 100)]
)
def test_every_row_comes_once_in_every_epoch(rows: int, batch_size: int) -> None:
    for epoch in range(3):
        assert sorted(order(rows, batch_size, epoch=epoch)) == list(range(rows))
    assert len(LengthGroupedOrder(lengths(rows), batch_size, 0)) == rows


def test_S01_the_order_is_a_function_of_seed_and_epoch() -> None:
    torch.manual_seed(1)
    first = order(seed=3, epoch=2)
    state = torch.get_rng_state()
    assert order(seed=3, epoch=2) == first
    assert torch.equal(torch.get_rng_state(), state)
    # Every epoch and seed has its own, a next epoch of one seed included.
    others = [order(seed=seed, epoch=epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(one) for one in others}) == 16


def test_S01_an_epoch_does_not_depend_on_the_ones_before_it() -> None:
    sampler = LengthGroupedOrder(lengths(100), 4, 7)
    sampler.set_epoch(0)
    list(sampler)
    half = iter(sampler)
    for _ in range(30):
        next(half)
    sampler.set_epoch(2)
    assert list(sampler) == order(100, 4, seed=7, epoch=2)
    assert list(sampler) == order(100, 4, seed=7, epoch=2)


def padding_share(rows: list[int], batch_size: int, of: list[int]) -> float:
    batches = [[of[row] for row in rows[start : start + batch_size]] for start in range(0, len(rows), batch_size)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(map(sum, batches)) / padded


def test_rows_of_similar_length_share_a_batch() -> None:
    rows, of = order(4000, 32), lengths(4000)
    plain = torch.randperm(4000, generator=torch.Generator().manual_seed(0)).tolist()
    assert padding_share(rows, 32, of) < 0.05 < 0.4 < padding_share(plain, 32, of)


def test_batches_are_drawn_from_all_rows_and_do_not_grow_in_length() -> None:
    of = lengths(4000)
    rows = order(4000, 10)
    means = torch.tensor([sum(of[row] for row in rows[start : start + 10]) / 10 for start in range(0, 4000, 10)])
    # Sorted order would correlate with 1 over the whole epoch and over every stretch.
    for part in (means, means[:BATCHES_SORTED_TOGETHER]):
        steps = torch.arange(len(part)).float()
        assert abs(torch.corrcoef(torch.stack([steps, part]))[0, 1]) < 0.35
    assert max(rows[:10]) - min(rows[:10]) > 500


@pytest.mark.parametrize("rows", [257, 1003, 8 * BATCHES_SORTED_TOGETHER + 1])
def test_the_short_batch_comes_last(rows: int) -> None:
    batch_size, of = 8, lengths(rows)
    for epoch in range(3):
        drawn = order(rows, batch_size, epoch=epoch)
        spans = []
        for start in range(0, rows - rows % batch_size, batch_size):
            batch = [of[row] for row in drawn[start : start + batch_size]]
            # Rows of one batch stand in the order of their length: no cut goes through a batch.
            assert batch == sorted(batch)
            spans.append(batch[-1] - batch[0])
        assert sum(spans) / len(spans) < 12


def test_rows_of_equal_length_are_still_shuffled() -> None:
    sampler = LengthGroupedOrder([7] * 64, 8, 0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert first != list(range(64)) != list(sampler) != first


def test_S01_a_resumed_loader_goes_on_where_the_order_was() -> None:
    """As the Trainer does it: a prepared loader, told the epoch, whose first batches are skipped."""

    def loader() -> DataLoader[int]:
        sampler = LengthGroupedOrder(lengths(50), 4, seed=5)
        prepared: DataLoader[int] = Accelerator(cpu=True).prepare(DataLoader(range(50), batch_size=4, sampler=sampler))  # type: ignore[arg-type]
        return prepared

    whole, resumed = loader(), loader()
    for epoch in range(3):
        whole.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = [batch.tolist() for batch in whole]
        assert [row for batch in batches for row in batch] == order(50, 4, seed=5, epoch=epoch)
        assert [len(batch) for batch in batches] == [4] * 12 + [2]
    resumed.set_epoch(2)  # type: ignore[attr-defined]
    assert [batch.tolist() for batch in skip_first_batches(resumed, 5)] == batches[5:]
