"""Rows divided among processes, each row once: in an evaluation, and in an epoch of the training."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin, prepare_data_loader
from accelerate.state import GradientState
from accelerate.utils import broadcast_object_list, recursively_apply
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from flexkd.errors import DataError
from flexkd.training.interruption import unsignalled

ROUND: Final = "round"
"""Entry that the loaders of this module add to a batch."""

Collate = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Round:
    """The rows that all processes read in one forward each.

    Every process takes part in every round, as a forward may wait for those of the others. A process that has no row
    left reads a row again, and nothing of it is counted. Three processes, two rows each, ten rows in an epoch:

        round 1   process 0: rows 0 1   process 1: rows 2 3   process 2: rows 4 5
        round 2   process 0: rows 6 7   process 1: rows 8 9   process 2: row 6 stands in, and counts for nothing

    Attributes:
        num_rows: Rows of all processes together.
        size: Most rows of one process; only the last process that has any may have fewer.
        process: Index of this process.
    """

    num_rows: int
    size: int
    process: int

    @property
    def num_local(self) -> int:
        """Rows of this process."""
        return min(max(self.num_rows - self.process * self.size, 0), self.size)

    def part(self, items: Sequence[Any]) -> list[Any]:
        """This process's part of a round's rows, or of their indices; the first one where it has none."""
        first = self.process * self.size
        return list(items[first : first + self.size]) or [items[0]]

    def gathered(self, tensors: Any, accelerator: Accelerator) -> Any:
        """Rows of all processes in their order, of tensors `[rows, ...]` or nested ones."""

        def gather(tensor: Tensor) -> Tensor:
            local = tensor[: self.num_local]
            if accelerator.num_processes == 1:
                return local
            even = local.new_zeros(min(self.num_rows, self.size), *local.shape[1:])
            even[: len(local)] = local
            every: Tensor = accelerator.gather(even)
            return every[: self.num_rows]

        return recursively_apply(gather, tensors)


class Rounds(Dataset[Any]):
    """A data set that takes the indices of a round, and fetches the rows of this process.

    Args:
        dataset: With a length and indices, whole in each process.
        size: Rows of one forward of one process.
    """

    def __init__(self, dataset: Any, size: int, accelerator: Accelerator) -> None:
        self.dataset = dataset
        self._size = size
        self._process = accelerator.process_index

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> tuple[Round, list[Any]]:
        """What a DataLoader hands to its collator."""
        shared_round = Round(len(indices), self._size, self._process)
        part = shared_round.part(indices)
        together = getattr(self.dataset, "__getitems__", None)
        return shared_round, [self.dataset[index] for index in part] if together is None else together(part)


def _marked(collate: Collate, fetched: tuple[Round, list[Any]]) -> dict[str, Any]:
    """A batch with its round in the entry `ROUND`."""
    return {**collate(fetched[1]), ROUND: fetched[0]}


class EvaluationLoader(DataLoaderStateMixin):  # type: ignore[misc]
    """Batches of one process, each row of a data set in exactly one batch of one process, in their order.

    The loaders of accelerate repeat rows from the start until every process has as many, and leave out the last rows
    where training drops them. A data set without indices is read by the first process, which hands the others
    their rows.

    Args:
        dataset: With a length and indices, or iterable; whole in each process.
        collate: Rows to a batch.
        size: Rows of one forward of one process.
        accelerator: Knows the processes.
        options: Options of the DataLoader, such as the number of its workers.

    Raises:
        DataError: The data set is already divided among the processes.
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
        self._accelerator = accelerator
        self._is_iterable = isinstance(dataset, IterableDataset)
        if self._is_iterable and getattr(getattr(dataset, "_distributed", None), "world_size", 1) > 1:
            raise DataError(
                "eval_dataset: it is split by processes already, and one process reads it for all. Give it whole, "
                "without split_dataset_by_node."
            )
        rows = dataset if self._is_iterable else Rounds(dataset, size, accelerator)
        join: Any = list if self._is_iterable else partial(_marked, collate)
        self._loader: DataLoader[Any] = DataLoader(
            rows, self.total_batch_size, collate_fn=join, worker_init_fn=unsignalled(None), **options
        )

    def __len__(self) -> int:
        """Number of rounds.

        Raises:
            TypeError: The data set has no length.
        """
        rounds: int = math.ceil(len(self.dataset) / self.total_batch_size)
        return rounds

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.begin()
        try:
            batches = self._read() if self._is_iterable else iter(self._loader)
            following = next(batches, None)
            while following is not None:
                batch, following = following, next(batches, None)
                self.end_of_dataloader = following is None
                yield batch
        finally:
            self.end()

    def _read(self) -> Iterator[dict[str, Any]]:
        """Batches of this process, of a data set that the first process reads for all."""
        several = self._accelerator.num_processes > 1
        reads = self._accelerator.process_index == 0
        rounds: Iterator[list[Any] | None] = iter(self._loader) if reads else itertools.repeat(None)
        while True:
            rows = next(rounds, None)
            rows = broadcast_object_list([rows])[0] if several else rows
            if rows is None:
                return
            shared_round = Round(len(rows), self.batch_size, self._accelerator.process_index)
            yield _marked(self._collate, (shared_round, shared_round.part(rows)))


def training_loader(
    dataset: Any, collate: Collate, size: int, sampler: Sampler[int], accelerator: Accelerator, args: TrainingArguments
) -> DataLoader[Any]:
    """Batches of one of several processes that train: the rows of each step are those that one process would read.

    At the end of an epoch accelerate would repeat rows from its start in the processes that have none left.

    Args:
        dataset: With a length and indices, whole in each process.
        collate: Rows to a batch.
        size: Rows of one forward of one process.
        sampler: The order of the rows, alike in each process.
        accelerator: Knows the processes.
        args: Options of the loader, such as whether the last rows are dropped.
    """
    batches = BatchSampler(sampler, size * accelerator.num_processes, args.dataloader_drop_last)
    loader: DataLoader[Any] = DataLoader(
        Rounds(dataset, size, accelerator),
        batch_sampler=batches,
        collate_fn=partial(_marked, collate),
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        **loader_options(args),
    )
    # Prepared as for one process: the rows are divided already.
    seedable = accelerator.use_seedable_sampler
    prepared: DataLoader[Any] = prepare_data_loader(
        loader, num_processes=1, process_index=0, use_seedable_sampler=seedable, data_seed=args.data_seed
    )
    return prepared


def loader_options(args: TrainingArguments) -> dict[str, Any]:
    """Options of a DataLoader, from the arguments of the training."""
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "multiprocessing_context": getattr(args, "dataloader_multiprocessing_context", None),
        "prefetch_factor": args.dataloader_prefetch_factor,
    }
