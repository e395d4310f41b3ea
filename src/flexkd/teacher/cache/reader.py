"""A teacher that ran once on each row, and whose answers are read from disk."""

from collections.abc import Mapping, Sequence
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
from flexkd.teacher.signal import READY, SignalRequest

_MOST_NAMES: Final = 5


class CachedTeacher:
    """Answers from a folder that `CachePlan.build` wrote; no model is needed.

    Rows are found by their `example_id` and a hash of what the teacher read of them, never by order. A stored state was
    computed in the batch in which its row was asked, and rounded to the type of the storage.

    Args:
        folder: Of the cache.
        checksums: Compare the bytes of all files with what was written, not their sizes alone.
        partial: Take a cache that was begun, as far as it is whole.

    Raises:
        ArtifactError: It is no whole cache.
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
        numbers = [number for number in range(len(self.manifest.entries)) if number not in self.unsound]
        self._shards = [Shard(shard_path(folder, index), self.manifest.group) for index in numbers]
        none = torch.empty(0, dtype=torch.int64)
        ids = torch.cat([none, *(shard.ids for shard in self._shards)])
        self._order = ids.argsort()
        self._ids = ids[self._order]
        self._hashes = torch.cat([none, *(shard.hashes for shard in self._shards)])
        self._predictions = torch.cat([none, *(shard.counts["predictions"] for shard in self._shards)])
        self._starts = torch.tensor([0, *(len(shard.ids) for shard in self._shards)]).cumsum(0)
        self._known: tuple[SignalRequest, tuple[Place, ...]] | None = None

    @property
    def storage(self) -> str:
        """Number type of the columns."""
        return self.manifest.made_of["storage"]

    @property
    def writes_text(self) -> bool:
        """Whether a language model answered."""
        return self.manifest.kind != CLASSIFIER

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(entry.bytes for entry in self.manifest.written)

    def describe(self) -> str:
        """Size, bytes a token, what the stored outputs hold and what their rounding costs, in a line."""
        entries = self.manifest.written
        fidelity = sum((entry.fidelity for entry in entries), RoundingError())
        tokens = max(sum(entry.positions for entry in entries), fidelity.predictions)
        text = (
            f"{self.folder}: {sum(entry.rows for entry in entries):,} rows, {tokens:,} positions, "
            f"{self.bytes / 1e6:,.2f} MB, {self.bytes / max(tokens, 1):.0f} bytes a position; "
            f"{self.manifest.holdings.describe()}"
        )
        if not self.manifest.holdings.logits:
            return text
        held, nats = (part / max(fidelity.predictions, 1) for part in (fidelity.held, fidelity.nats))
        top = f"; they hold {held:.2%} of the probability" if self.manifest.holdings.top is not None else ""
        return f"{text}{top}; rounding costs {nats:.1e} nats a prediction"

    def ready(self, batch: Mapping[str, Any], request: SignalRequest) -> Int64[Tensor, " rows"]:
        """Where the rows of a batch stand.

        Raises:
            ArtifactError: A row is not in the cache or has changed.
        """
        return self._find(batch)

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        """The signal of a batch, as the teacher that ran gave it.

        Raises:
            ArtifactError: A row is not in the cache or has changed, or something is asked that it does not hold.
        """
        places = self._places(request)
        known: Tensor | None = batch.get(READY)
        found = self._find(batch) if known is None else known
        device = batch["input_ids"].device
        shards = torch.searchsorted(self._starts, found, right=True) - 1
        reads = [
            self._shards[shard].row(row)
            for shard, row in zip(shards, (found - self._starts[shards]).tolist(), strict=True)
        ]
        features = tuple(_moved([read_columns(read, *place) for read in reads], device) for place in places)
        if not request.logits:
            return Signal(None, features)

        def joined(name: str) -> Tensor:
            return _moved([read(name) for read in reads], device)

        return Signal(self._outputs(joined), features)

    def _outputs(self, joined: Any) -> Outputs:
        top = self.manifest.holdings.top
        names = self._shards[0].names
        if "logits" in names:
            logits: Tensor = joined("logits")
            return logits
        log_probs: Tensor = joined("log_probs")
        if top is None:
            return log_probs
        indices, tail = joined("indices").long(), read_tail(joined("log_tail"))
        return TopOutputs(log_probs.float(), indices, tail, top.temperature, top.shared_outputs)

    def _places(self, request: SignalRequest) -> tuple[Place, ...]:
        if self._known is None or self._known[0] is not request:
            lacking = self.manifest.holdings.lacks(request)
            if lacking:
                raise ArtifactError(
                    f"{self.folder}: the cache does not hold what is read: {'; '.join(lacking)}. Choose another folder "
                    "(teacher.cache), or delete this one to build it again."
                )
            self._known = request, self.manifest.holdings.places(request)
        return self._known[1]

    def _find(self, batch: Mapping[str, Any]) -> Int64[Tensor, " rows"]:
        """The place of each row of the batch among all rows."""
        contents = row_hashes_of(batch, self.manifest.kind)
        at = torch.searchsorted(self._ids, contents.ids).clamp(max=len(self._ids) - 1)
        found = self._order[at]
        for wrong, what in (
            (self._ids[at] != contents.ids, "is not in the cache"),
            (self._hashes[found] != contents.hashes, "has changed since the teacher read it"),
            (self._predictions[found] != contents.predictions, "makes another number of predictions than is stored"),
        ):
            if bool(wrong.any()):
                name = batch["example_id"][int(wrong.nonzero()[0])]
                raise ArtifactError(
                    f"{self.folder}: row '{name}' {what} ({int(wrong.sum())} such rows in the batch). Delete the cache "
                    "to build it again from these rows."
                )
        return found


def _moved(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat(list(parts)).to(device, non_blocking=True)
