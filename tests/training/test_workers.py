"""Processes that load batches: a signal to the group of the run, as from Ctrl-C, ends none of them."""

import os
import signal
from typing import Any

import pytest
from torch.utils.data import DataLoader

from flexkd.training.interruption import unsignalled


def numbers(batch: list[int]) -> list[int]:
    return batch


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_S01_a_worker_outlives_a_signal_to_the_group_and_ends_with_its_loader(method: str) -> None:
    loader: DataLoader[Any] = DataLoader(
        range(40),  # type: ignore[arg-type]
        batch_size=1, collate_fn=numbers, num_workers=1, worker_init_fn=unsignalled(None),
        multiprocessing_context=method,
    )  # fmt: skip
    batches: Any = iter(loader)
    assert next(batches) == [0]
    (worker,) = batches._workers
    # What a terminal or a system sends goes to the group of this process.
    assert os.getpgid(worker.pid) == worker.pid != os.getpgid(0)
    os.kill(worker.pid, signal.SIGINT)
    assert [batch[0] for batch in batches] == list(range(1, 40))
    worker.join(timeout=10)
    assert worker.exitcode == 0
