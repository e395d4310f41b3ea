"""One pass of a teacher over all rows, written to disk file by file, and resumed after an interruption."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from flexkd.data.encoding.encoded import EncodedRow
from flexkd.display.progress import Progress
from flexkd.errors import ArtifactError, DataError
from flexkd.guards.locks import locked
from flexkd.models.forward.engine import engine_of
from flexkd.processes import decided, divided, follow, num_processes, process_index
from flexkd.teacher.cache.columns import CachedColumns
from flexkd.teacher.cache.manifest import Entry, Manifest, has_manifest, shard_path
from flexkd.teacher.cache.quantization import RoundingError, stored_signal
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.cache.row_hashes import CLASSIFIER, kind_of, row_hashes_of
from flexkd.teacher.cache.shards import INDEX_BYTES, axis_of, empty_shard, write_shard
from flexkd.teacher.cache.verification import Verification, verify
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest

logger = logging.getLogger(__name__)

SHARD_BYTES: Final = 2**26
"""Size at which a file is closed, after the batch that reaches it."""

DISK_MARGIN: Final = 2**28
"""Bytes that a cache leaves free on the disk."""

TEACHER_BATCH_SIZE: Final = 32
"""Rows of a batch of the teacher, whatever the batch size of the training."""


class CachePlan:
    """Plans a cache of a teacher's answers to some rows, knows its size in advance, and builds it.

    The batches of the teacher depend on the rows alone: rounding makes an answer depend slightly on the other rows of
    its batch, so that an interruption or another student must not change them. To know the shapes of its answers, the
    plan first runs the teacher on a single row.

    Args:
        teacher: The teacher that answers.
        request: From `merged`; the cache covers every request that was merged into it.
        rows: Encoded rows with an `id`; a row that occurs twice is answered once.
        collate: Rows to a batch.
        storage: Number type of the columns: float16, or int8 with a scale for each column.

    Raises:
        DataError: A row has no id, or two different rows share one.
    """

    def __init__(
        self,
        teacher: LiveTeacher,
        request: SignalRequest,
        rows: Sequence[EncodedRow],
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        storage: str,
    ) -> None:
        self.teacher, self.request, self.storage = teacher, request, storage
        self._collate = collate
        self._kind = kind_of(teacher.model)
        self.columns = CachedColumns.of(request)
        self._batches = _batches(rows)
        self._index = self._survey()

    @property
    def bytes(self) -> int:
        """Size on disk, without the header of some hundred bytes in each file."""
        return sum(self._division[1])

    @property
    def name(self) -> str:
        """Name of the cache's folder, the same for the same columns and storage."""
        # The class was called Holdings in earlier versions; caches from then must keep their name.
        described = str(self.columns).replace(type(self.columns).__name__, "Holdings", 1)
        return hashlib.blake2b(f"{described} {self.storage}".encode(), digest_size=6).hexdigest()

    def made_of(self, fingerprints: Mapping[str, str]) -> dict[str, str]:
        """Everything that the answers depend on besides the request: fingerprints, engine, storage and rows."""
        hashes = torch.cat([batch[name] for batch in self._index for name in ("ids", "hashes")])
        rows_hash = hashlib.blake2b(hashes.numpy().tobytes(), digest_size=12).hexdigest()
        engine = engine_of(self.teacher.model, self.teacher.precision)
        return {**fingerprints, **engine, "storage": self.storage, "rows": rows_hash}

    def build(self, folder: Path, fingerprints: Mapping[str, str]) -> CachedTeacher:
        """Build the cache; complete files are kept, missing, truncated and altered ones are written.

        Args:
            folder: Folder of this cache alone.
            fingerprints: Fingerprints of teacher, tokenizer, data and whatever else the answers depend on, by name.

        Raises:
            ArtifactError: The folder holds another cache, another process writes to it, or the disk is too small.
        """
        folder.mkdir(parents=True, exist_ok=True)
        made_of = self.made_of(fingerprints)
        unsound = decided(lambda: sorted(self._manifest(folder, made_of).unsound(folder)))
        if decided(lambda: has_manifest(folder)):
            self.verify(CachedTeacher(folder, checksums=bool(unsound), partial=True), made_of)
        if unsound:
            with locked(folder / "lock", what=str(folder), advice="choose another folder for this cache"):
                self._write(folder, self._manifest(folder, made_of))
        # The others may have been faster than the last file of the first process.
        follow()
        return CachedTeacher(folder)

    def verify(
        self, cached: CachedTeacher, made_of: Mapping[str, str], *, thorough: bool = False
    ) -> Verification | None:
        """Let the teacher answer the first batch, which has the shortest rows, again and compare.

        Args:
            cached: A cache of the same rows, complete or not.
            made_of: From `made_of`.
            thorough: Compare also the middle and the last batch, which has the longest rows; always so where the
                teacher's engine differs.

        Returns:
            The deviations; None if the cache has no complete file.

        Raises:
            ArtifactError: The cache was made from something else, or its answers deviate from the present ones by more
                than rounding.
        """
        engine_differences = cached.manifest.check(cached.folder, made_of)
        if engine_differences:
            logger.warning(
                "%s: %s; some answers are compared with the teacher's.", cached.folder, "; ".join(engine_differences)
            )
        stored = self._stored_batches(cached)
        if not stored:
            return None
        is_thorough = thorough or bool(engine_differences)
        numbers = {stored[0], stored[len(stored) // 2], stored[-1]} if is_thorough else {stored[0]}
        batches = [self._collate(self._batches[number]) for number in sorted(numbers)]
        verification = verify(cached, self.teacher, self.request, batches)
        verification.check(cached, engine_differences)
        logger.info("%s: %s", cached.folder, verification)
        return verification

    def _stored_batches(self, cached: CachedTeacher) -> list[int]:
        """Numbers of the batches that a cache stores."""
        if not cached.unsound:
            return list(range(len(self._batches)))
        if cached.manifest.columns != self.columns or len(cached.unsound) == len(cached.manifest.entries):
            return []
        numbers = range(len(self._batches))
        missing = {number for file in cached.unsound for number in numbers[self._division[0][file]]}
        return [number for number in numbers if number not in missing]

    def _manifest(self, folder: Path, made_of: Mapping[str, str]) -> Manifest:
        """The manifest of a folder, or an empty one for a new cache."""
        if not has_manifest(folder):
            return Manifest(made_of, self._kind, TEACHER_BATCH_SIZE, self.columns, (None,) * len(self._division[0]))
        manifest = Manifest.read(folder)
        manifest.check(folder, made_of)
        if manifest.columns != self.columns:
            raise ArtifactError(
                f"{folder}: the cache holds something else: it was '{manifest.columns.describe()}' and is "
                f"'{self.columns.describe()}' now. Choose another folder, or delete this one."
            )
        return manifest

    def _survey(self) -> list[dict[str, Tensor]]:
        """The index of each batch: hashes of its rows, and their number of positions and predictions."""
        indices = []
        for rows in self._batches:
            batch = self._collate(rows)
            row_hashes, extents = row_hashes_of(batch, self._kind), self.teacher.extents(batch, self.request)
            assert extents.predictions == row_hashes.predictions.tolist(), "the teacher and the hashes count alike"
            indices.append(
                {
                    "ids": row_hashes.ids,
                    "hashes": row_hashes.hashes,
                    "positions": torch.tensor(extents.features),
                    "predictions": row_hashes.predictions,
                }
            )
        return indices

    @cached_property
    def _division(self) -> tuple[list[slice], list[int]]:
        """The batches of each file, and the size of each file in bytes."""
        tensors, _ = self._answers(self._batches[0][:1])
        rates = {"positions": 0, "predictions": 0, "groups": 0}
        for name, tensor in tensors.items():
            rates[axis_of(name)] += tensor.element_size() * tensor.shape[1:].numel()
        shards, sizes, first, size = [], [], 0, 0
        for number, index in enumerate(self._index):
            size += INDEX_BYTES * len(index["ids"]) + rates["groups"]
            size += sum(int(index[axis].sum()) * rates[axis] for axis in ("positions", "predictions"))
            if size >= SHARD_BYTES or number == len(self._index) - 1:
                shards.append(slice(first, number + 1))
                sizes.append(size)
                first, size = number + 1, 0
        return shards, sizes

    def _answers(self, rows: Sequence[EncodedRow]) -> tuple[dict[str, Tensor], RoundingError]:
        """The teacher's answers to some rows, quantized."""
        config: Any = self.teacher.model.config
        # A classifier's config may have no vocabulary; it stores no indices.
        vocabulary = 0 if self._kind == CLASSIFIER else int(config.get_text_config(decoder=True).vocab_size)
        signal = self.teacher.signal(self._collate(rows), self.request)
        return stored_signal(signal, self.storage, writes_text=self._kind != CLASSIFIER, vocabulary=vocabulary)

    def _write(self, folder: Path, manifest: Manifest) -> None:
        shards, sizes = self._division
        assert len(shards) == len(manifest.entries), "the same rows and columns are divided alike"
        missing = decided(lambda: sorted(manifest.unsound(folder, checksums=True)))
        needed = sum(sizes[index] for index in missing)
        free = decided(lambda: shutil.disk_usage(folder).free)
        logger.info(
            "%s: %.2f MB to write, %d of %d files are there; %s",
            folder, needed / 1e6, len(shards) - len(missing), len(shards), self.columns.describe(),
        )  # fmt: skip
        if needed > free - DISK_MARGIN:
            raise ArtifactError(
                f"{folder}: the cache needs {needed:,} bytes, {free:,} are free, of which {DISK_MARGIN:,} stay so. "
                "Free some, name another folder (teacher.cache), store less (objective.logits.top_k, "
                "teacher.cache_storage: int8), or set teacher.cache: never."
            )
        manifest.write(folder)
        batches = [len(self._batches[shard]) for shard in shards]
        written = sum(batches) - sum(batches[index] for index in missing)
        with Progress("teacher's answers", sum(batches), "batches", done=written) as progress:
            # With fewer files than processes they divide the batches of each file.
            by_file = len(missing) >= num_processes()

            def write(index: int) -> Entry:
                path = shard_path(folder, index)
                return self._write_shard(path, shards[index], needed, progress, divides=not by_file)

            entries = divided(missing, write) if by_file else map(write, missing)
            for number, (index, entry) in enumerate(zip(missing, entries, strict=True)):
                manifest = manifest.with_entry(index, entry)
                manifest.write(folder)
                needed -= sizes[index]
                if by_file and number % num_processes() != process_index():
                    progress.advance(batches[index])

    def _write_shard(
        self, path: Path, shard: slice, bytes_left: int, progress: Progress, *, divides: bool = False
    ) -> Entry:
        index = {name: torch.cat([batch[name] for batch in self._index[shard]]) for name in self._index[0]}
        counts = {axis: int(index[axis].sum()) for axis in ("positions", "predictions")}
        counts["groups"] = len(self._batches[shard])
        tensors: dict[str, Tensor] = {}
        starts, total_error = dict.fromkeys(counts, 0), RoundingError()
        batches = self._batches[shard]
        answers = divided(batches, self._answers) if divides else map(self._answers, batches)
        for (parts, rounding_error), batch_index in zip(answers, self._index[shard], strict=True):
            tensors = tensors or empty_shard(parts, counts)
            lengths = {axis: int(batch_index[axis].sum()) for axis in ("positions", "predictions")} | {"groups": 1}
            for name, part in parts.items():
                axis = axis_of(name)
                assert len(part) == lengths[axis], (name, len(part), lengths)
                tensors[name][starts[axis] : starts[axis] + lengths[axis]] = part
            starts = {axis: starts[axis] + lengths[axis] for axis in starts}
            total_error += rounding_error
            progress.advance()

        def write() -> list[Any]:
            return list(write_shard(path, {**index, **tensors}, bytes_left=bytes_left))

        size, checksum = decided(write) if divides else write()
        return Entry(size, checksum, len(index["ids"]), counts["positions"], total_error)


def _batches(rows: Sequence[EncodedRow]) -> list[list[EncodedRow]]:
    """Batches of distinct rows, from the shortest rows to the longest."""
    by_id: dict[str, EncodedRow] = {}
    for row in rows:
        if "id" not in row:
            raise DataError("rows: one has no 'id', by which a cache finds its answer. Give each row its own.")
        if by_id.setdefault(str(row["id"]), row) != row:
            raise DataError(f"rows: two that differ share the id '{row['id']}'. Give each row its own.")
    ordered = sorted(by_id.values(), key=lambda row: (len(row["input_ids"]), str(row["id"])))
    return [ordered[first : first + TEACHER_BATCH_SIZE] for first in range(0, len(ordered), TEACHER_BATCH_SIZE)]
