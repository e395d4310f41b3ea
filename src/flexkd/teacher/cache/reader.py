"""A teacher that ran once on each row and whose answers are read from disk."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Int64
from torch import Tensor

from flexkd.core.objective import Signal
from flexkd.core.outputs import Outputs, TopOutputs
from flexkd.errors import ArtifactError
from flexkd.teacher.cache.columns import Place
from flexkd.teacher.cache.manifest import Manifest, shard_path
from flexkd.teacher.cache.quantization import RoundingError, read_columns, read_tail
from flexkd.teacher.cache.row_hashes import CLASSIFIER, row_hashes_of
from flexkd.teacher.cache.shards import Shard
from flexkd.teacher.signal import PREFETCHED, SignalRequest

_MOST_NAMES: Final = 5


class CachedTeacher:
    """Answers from a folder that `CachePlan.build` wrote, without a model.

    Rows are looked up by their `example_id` and a hash of what the teacher read, never by order. The states of a row
    were computed in the batch in which the teacher answered it, and rounded to the storage type.

    Args:
        folder: The folder of the cache.
        checksums: Compare the bytes of all files with their checksums, not only their sizes.
        partial: Accept an incomplete cache, and read the files that are complete.

    Raises:
        ArtifactError: The cache is missing, incomplete or damaged.
    """

    def __init__(self, folder: Path, *, checksums: bool = False, partial: bool = False) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.unsound = self.manifest.unsound(folder, checksums=checksums)
        if self.unsound and not partial:
            names = ", ".join(shard_path(folder, number).name for number in self.unsound[:_MOST_NAMES])
            raise ArtifactError(
                f"{folder}: {len(self.unsound)} of {len(self.manifest.entries)} files are missing or damaged (first "
                f"{names}). Delete those that are there, and build the cache again (flexkd cache): whole files are "
                "kept."
            )
        sound = [number for number in range(len(self.manifest.entries)) if number not in self.unsound]
        self._shards = [Shard(shard_path(folder, number), self.manifest.group) for number in sound]
        empty = torch.empty(0, dtype=torch.int64)
        ids = torch.cat([empty, *(shard.ids for shard in self._shards)])
        self._order = ids.argsort()
        self._ids = ids[self._order]
        self._hashes = torch.cat([empty, *(shard.hashes for shard in self._shards)])
        self._predictions = torch.cat([empty, *(shard.counts["predictions"] for shard in self._shards)])
        self._starts = torch.tensor([0, *(len(shard.ids) for shard in self._shards)]).cumsum(0)
        self._last_places: tuple[SignalRequest, tuple[Place, ...]] | None = None

    @property
    def storage(self) -> str:
        """Number type of the columns."""
        return self.manifest.made_of["storage"]

    @property
    def writes_text(self) -> bool:
        """Whether the answers are those of a language model."""
        return self.manifest.kind != CLASSIFIER

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(entry.bytes for entry in self.manifest.written)

    def describe(self) -> str:
        """Size, bytes a position, probability that the stored outputs cover, and their rounding error, on one line."""
        entries = self.manifest.written
        error = sum((entry.rounding_error for entry in entries), RoundingError())
        tokens = max(sum(entry.positions for entry in entries), error.predictions)
        text = (
            f"{self.folder}: {sum(entry.rows for entry in entries):,} rows, {tokens:,} positions, "
            f"{self.bytes / 1e6:,.2f} MB, {self.bytes / max(tokens, 1):.0f} bytes a position; "
            f"{self.manifest.columns.describe()}"
        )
        if not self.manifest.columns.logits:
            return text
        covered, nats = (total / max(error.predictions, 1) for total in (error.held, error.nats))
        top = f"; they hold {covered:.2%} of the probability" if self.manifest.columns.top is not None else ""
        return f"{text}{top}; rounding costs {nats:.1e} nats a prediction"

    def prefetch(self, batch: Mapping[str, Any], request: SignalRequest) -> Int64[Tensor, " rows"]:
        """Index in the cache of each row of a batch.

        Raises:
            ArtifactError: A row is not in the cache or has changed.
        """
        return self._indices(batch)

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        """The stored signal of a batch.

        Raises:
            ArtifactError: A row is not in the cache or has changed, or the cache does not store what is requested.
        """
        places = self._places(request)
        prefetched: Tensor | None = batch.get(PREFETCHED)
        indices = self._indices(batch) if prefetched is None else prefetched
        device = batch["input_ids"].device
        shards = torch.searchsorted(self._starts, indices, right=True) - 1
        rows = (indices - self._starts[shards]).tolist()
        readers = [self._shards[shard].row(row) for shard, row in zip(shards, rows, strict=True)]
        features = tuple(_joined([read_columns(read, *place) for read in readers], device) for place in places)
        if not request.logits:
            return Signal(None, features)

        def joined(name: str) -> Tensor:
            return _joined([read(name) for read in readers], device)

        return Signal(self._outputs(joined), features)

    def _outputs(self, joined: Callable[[str], Tensor]) -> Outputs:
        """The outputs of a batch, from a function that returns a stored tensor for all its rows, by name."""
        top = self.manifest.columns.top
        names = self._shards[0].names
        if "logits" in names:
            return joined("logits")
        log_probs = joined("log_probs")
        if top is None:
            return log_probs
        indices, tail = joined("indices").long(), read_tail(joined("log_tail"))
        return TopOutputs(log_probs.float(), indices, tail, top.temperature, top.shared_outputs)

    def _places(self, request: SignalRequest) -> tuple[Place, ...]:
        if self._last_places is None or self._last_places[0] is not request:
            gaps = self.manifest.columns.lacks(request)
            if gaps:
                raise ArtifactError(
                    f"{self.folder}: the cache does not hold what is read: {'; '.join(gaps)}. Choose another folder "
                    "(teacher.cache), or delete this one to build it again."
                )
            self._last_places = request, self.manifest.columns.places(request)
        return self._last_places[1]

    def _indices(self, batch: Mapping[str, Any]) -> Int64[Tensor, " rows"]:
        """Index of each row of the batch among all rows of the cache."""
        row_hashes = row_hashes_of(batch, self.manifest.kind)
        ranks = torch.searchsorted(self._ids, row_hashes.ids).clamp(max=len(self._ids) - 1)
        indices = self._order[ranks]
        for is_wrong, problem in (
            (self._ids[ranks] != row_hashes.ids, "is not in the cache"),
            (self._hashes[indices] != row_hashes.hashes, "has changed since the teacher read it"),
            (
                self._predictions[indices] != row_hashes.predictions,
                "makes another number of predictions than is stored",
            ),
        ):
            if bool(is_wrong.any()):
                name = batch["example_id"][int(is_wrong.nonzero()[0])]
                raise ArtifactError(
                    f"{self.folder}: row '{name}' {problem} ({int(is_wrong.sum())} such rows in the batch). Delete the "
                    "cache to build it again from these rows."
                )
        return indices


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat(list(parts)).to(device, non_blocking=True)
