"""The order of the training rows: random, of similar length within a batch, a function of seed and epoch alone."""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch.utils.data import Sampler

BATCHES_SORTED_TOGETHER: Final = 32


class LengthGroupedOrder(Sampler[int]):
    """Shuffles the rows, sorts stretches of them by length, and shuffles the batches within each stretch.

    A resumed run and any number of processes see the order of the uninterrupted one: nothing depends on the state of
    a global random generator.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of one optimizer step.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        full: list[torch.Tensor] = []
        short: list[torch.Tensor] = []
        for stretch in order.split(self.batch_size * BATCHES_SORTED_TOGETHER):
            by_length = stretch[self.lengths[stretch].argsort(stable=True)]
            batches = list(by_length.split(self.batch_size))
            for index in torch.randperm(len(batches), generator=generator).tolist():
                (full if len(batches[index]) == self.batch_size else short).append(batches[index])
        # The one short batch comes last: anywhere else it would shift the cuts between all later batches.
        for batch in full + short:
            yield from batch.tolist()
