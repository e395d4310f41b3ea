"""Rows of an evaluation shared out among processes: each row once, in the order of the data set."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from accelerate.utils import broadcast_object_list, recursively_apply
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from flexkd.errors import DataError

ROUND: Final = "round"
"""Entry of a batch that an `EvaluationLoader` adds."""

Collate = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Round:
    """The rows that all processes read in one forward each.

    Every process takes part in every round, for a forward may wait for that of the others. One that has no row left
    reads a row again, and nothing of it is counted.

    Attributes:
        rows: Of all processes.
        size: At most so many of one process; only the last process that has some has fewer.
        process: This one.
    """

    rows: int
    size: int
    process: int

    @property
    def own(self) -> int:
        """Rows of this process."""
        return min(max(self.rows - self.process * self.size, 0), self.size)

    def part(self, rows: Sequence[Any]) -> list[Any]:
        """This process's part of the rows of a round, the first row where it has none."""
        first = self.process * self.size
        return list(rows[first : first + self.size]) or [rows[0]]

    def gathered(self, tensors: Any, accelerator: Accelerator) -> Any:
        """Rows of all processes in the order of the data set, of tensors `[rows, ...]` or nested ones."""

        def gather(tensor: Tensor) -> Tensor:
            own = tensor[: self.own]
            if accelerator.num_processes == 1:
                return own
            even = own.new_zeros(min(self.rows, self.size), *own.shape[1:])
            even[: len(own)] = own
            every: Tensor = accelerator.gather(even)
            return every[: self.rows]

        return recursively_apply(gather, tensors)


class EvaluationLoader(DataLoaderStateMixin):  # type: ignore[misc]
    """Batches of one process, each row of a data set in exactly one batch of one process.

    The loaders of accelerate repeat rows from the start until every process has as many, and go without the last ones
    where the training drops them. A data set without indices is read by the first process, which hands the others
    their rows.

    Args:
        dataset: With a length and indices, or iterable; whole in each process.
        collate: Rows to a batch.
        size: Rows of one forward of one process.
        accelerator: Knows the processes.
        options: Of the DataLoader, such as the number of its workers.

    Raises:
        DataError: The data set gives each process other rows.
    """

    def __init__(
        self, dataset: Any, collate: Collate, size: int, accelerator: Accelerator, options: Mapping[str, Any]
    ) -> None:
        self.dataset = dataset
        self.batch_size = size
        self.gradient_state = GradientState()
        self.total_batch_size = size * accelerator.num_processes
        self._drop_last = False
        self._collate = collate
        self._process, self._processes = accelerator.process_index, accelerator.num_processes
        self._is_iterable = isinstance(dataset, IterableDataset)
        if not self._is_iterable:
            self._loader = DataLoader(dataset, batch_sampler=_Own(self), collate_fn=collate, **options)
            return
        if getattr(getattr(dataset, "_distributed", None), "world_size", 1) > 1:
            raise DataError(
                "eval_dataset: it is split by processes already, and one process reads it for all. Give it whole, "
                "without split_dataset_by_node."
            )
        self._loader = DataLoader(dataset, batch_size=self.total_batch_size, collate_fn=list, **options)

    def __len__(self) -> int:
        """Rounds.

        Raises:
            TypeError: The data set has no length.
        """
        rounds: int = math.ceil(len(self.dataset) / self.total_batch_size)
        return rounds

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.begin()
        try:
            batches = iter(self._batches())
            following = next(batches, None)
            while following is not None:
                batch, following = following, next(batches, None)
                self.end_of_dataloader = following is None
                yield batch
        finally:
            self.end()

    def rounds(self) -> Iterator[Round]:
        """All rounds of a data set with indices."""
        for first in range(0, len(self.dataset), self.total_batch_size):
            rows = min(self.total_batch_size, len(self.dataset) - first)
            yield Round(rows, self.batch_size, self._process)

    def _batches(self) -> Iterator[dict[str, Any]]:
        if not self._is_iterable:
            for batch, one in zip(self._loader, self.rounds(), strict=True):
                yield {**batch, ROUND: one}
            return
        for rows in self._read():
            one = Round(len(rows), self.batch_size, self._process)
            yield {**self._collate(one.part(rows)), ROUND: one}

    def _read(self) -> Iterator[list[Any]]:
        """The rows of each round, in every process."""
        if self._processes == 1:
            yield from self._loader
            return
        read = iter(self._loader) if self._process == 0 else itertools.repeat(None)
        while True:
            held = broadcast_object_list([next(read, None)])
            if held[0] is None:
                return
            yield held[0]


class _Own:
    """Indices of one process's rows, round by round."""

    def __init__(self, loader: EvaluationLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[int]]:
        first = 0
        for one in self.loader.rounds():
            yield one.part(range(first, first + one.rows))
            first += one.rows


def loader_options(args: TrainingArguments) -> dict[str, Any]:
    """What training arguments say of a DataLoader, but for its rows."""
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "multiprocessing_context": getattr(args, "dataloader_multiprocessing_context", None),
        "prefetch_factor": args.dataloader_prefetch_factor,
    }
