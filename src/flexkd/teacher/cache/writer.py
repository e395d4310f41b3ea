"""One pass of a teacher over all rows, written to disk as it goes, and gone on with where it was interrupted."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from flexkd.errors import ArtifactError, DataError
from flexkd.models.forward.engine import engine_of
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
"""Size of one file; a file ends with the batch that reaches it."""

DISK_MARGIN: Final = 2**28
"""Bytes of a disk that a cache leaves free."""

ASKED_TOGETHER: Final = 32
"""Rows of a batch."""


class CachePlan:
    """How large a cache of a teacher's answers to some rows will be, before it is asked, and how it is built.

    Rows are asked in one order, so that neither an interruption nor another student changes a number: what a teacher
    says of a row hangs, by a rounding, on the rows beside it. For the shapes of its answers it runs on one row.

    Args:
        teacher: Answers.
        request: From `merged`: the answers serve every request that it was merged of.
        rows: Features; of rows that stand there twice, one is asked.
        collate: Features to a batch.
        storage: Of the columns: float16, or int8 with a scale for each column.

    Raises:
        DataError: A row has no id, or two rows share one.
    """

    def __init__(
        self,
        teacher: LiveTeacher,
        request: SignalRequest,
        rows: Sequence[Mapping[str, Any]],
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        storage: str,
    ) -> None:
        self.teacher, self.request, self.storage = teacher, request, storage
        self._collate = collate
        self._kind = kind_of(teacher.model)
        self.holdings = CachedColumns.of(request)
        self._batches = _batches(rows)
        self._index = self._survey()

    @property
    def bytes(self) -> int:
        """On disk, but for a header of some hundred bytes a file."""
        return sum(self._divided[1])

    @property
    def name(self) -> str:
        """Of a folder, the same for the same holdings and storage."""
        # The class had another name when the first caches were made; theirs are found again.
        described = str(self.holdings).replace(type(self.holdings).__name__, "Holdings", 1)
        return hashlib.blake2b(f"{described} {self.storage}".encode(), digest_size=6).hexdigest()

    def made_of(self, fingerprints: Mapping[str, str]) -> dict[str, str]:
        """What the answers depend on besides what is asked: also how the teacher computes."""
        names = torch.cat([batch[name] for batch in self._index for name in ("ids", "hashes")])
        rows = hashlib.blake2b(names.numpy().tobytes(), digest_size=12).hexdigest()
        engine = engine_of(self.teacher.model, self.teacher.precision)
        return {**fingerprints, **engine, "storage": self.storage, "rows": rows}

    def build(self, folder: Path, fingerprints: Mapping[str, str]) -> CachedTeacher:
        """The whole cache; what is there already is kept, what is missing, cut or altered is written.

        Args:
            folder: Of this cache alone.
            fingerprints: Of teacher, tokenizer, data and all else that the answers depend on, by name.

        Raises:
            ArtifactError: The folder belongs to something else, another process writes it, or the disk is too small.
        """
        folder.mkdir(parents=True, exist_ok=True)
        made_of = self.made_of(fingerprints)
        unsound = self._begun(folder, made_of).unsound(folder)
        if has_manifest(folder):
            self.verify(CachedTeacher(folder, checksums=bool(unsound), partial=True), made_of)
        if unsound:
            try:
                with FileLock(folder / "lock", timeout=0):
                    self._write(folder, self._begun(folder, made_of))
            except Timeout as error:
                raise ArtifactError(
                    f"{folder}: another process writes this cache. Wait for it, or choose another folder."
                ) from error
        return CachedTeacher(folder)

    def verify(
        self, cached: CachedTeacher, made_of: Mapping[str, str], *, thorough: bool = False
    ) -> Verification | None:
        """Answer some rows of a cache again and compare: the first batch, the shortest rows.

        Args:
            cached: Made of the same rows; may be one that was begun.
            made_of: From `made_of`.
            thorough: Also the middle and the last batch, the longest rows, as it is done where the engine differs.

        Returns:
            The figures; None where no file of the cache is whole.

        Raises:
            ArtifactError: The cache belongs to something else, or its answers lie further from those of now than
                storing and computing round.
        """
        told = cached.manifest.check(cached.folder, made_of)
        if told:
            logger.warning("%s: %s; its answers are compared.", cached.folder, "; ".join(told))
        whole = self._whole(cached)
        if not whole:
            return None
        chosen = {whole[0], whole[len(whole) // 2], whole[-1]} if thorough or told else {whole[0]}
        batches = [self._collate(self._batches[number]) for number in sorted(chosen)]
        verification = verify(cached, self.teacher, self.request, batches)
        verification.check(cached, told)
        logger.info("%s: %s", cached.folder, verification)
        return verification

    def _whole(self, cached: CachedTeacher) -> list[int]:
        """Batches that a cache holds."""
        if not cached.unsound:
            return list(range(len(self._batches)))
        if cached.manifest.holdings != self.holdings or len(cached.unsound) == len(cached.manifest.entries):
            return []
        numbers = range(len(self._batches))
        missing = {number for file in cached.unsound for number in numbers[self._divided[0][file]]}
        return [number for number in numbers if number not in missing]

    def _begun(self, folder: Path, made_of: Mapping[str, str]) -> Manifest:
        if not has_manifest(folder):
            return Manifest(made_of, self._kind, ASKED_TOGETHER, self.holdings, (None,) * len(self._divided[0]))
        manifest = Manifest.read(folder)
        manifest.check(folder, made_of)
        if manifest.holdings != self.holdings:
            raise ArtifactError(
                f"{folder}: the cache holds something else: it was '{manifest.holdings.describe()}' and is "
                f"'{self.holdings.describe()}' now. Choose another folder, or delete this one."
            )
        return manifest

    def _survey(self) -> list[dict[str, Tensor]]:
        """For each batch, what its rows are and how many positions and predictions each has."""
        found = []
        for rows in self._batches:
            batch = self._collate(rows)
            contents, extents = row_hashes_of(batch, self._kind), self.teacher.extents(batch, self.request)
            assert extents.predictions == contents.predictions.tolist(), "one rule for what is predicted"
            positions = torch.tensor(extents.features)
            found.append(
                {
                    "ids": contents.ids,
                    "hashes": contents.hashes,
                    "positions": positions,
                    "predictions": contents.predictions,
                }
            )
        return found

    @cached_property
    def _divided(self) -> tuple[list[slice], list[int]]:
        """Which batches each file holds, and its size."""
        tensors, _ = self._asked(self._batches[0][:1])
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

    def _asked(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], RoundingError]:
        """The stored answers to some rows."""
        config: Any = self.teacher.model.config
        # A classifier's config may have no vocabulary; it stores no indices.
        vocabulary = 0 if self._kind == CLASSIFIER else int(config.get_text_config(decoder=True).vocab_size)
        signal = self.teacher.signal(self._collate(rows), self.request)
        return stored_signal(signal, self.storage, writes_text=self._kind != CLASSIFIER, vocabulary=vocabulary)

    def _write(self, folder: Path, manifest: Manifest) -> None:
        shards, sizes = self._divided
        assert len(shards) == len(manifest.entries), "the same rows and holdings are divided alike"
        missing = manifest.unsound(folder, checksums=True)
        needed = sum(sizes[index] for index in missing)
        free = shutil.disk_usage(folder).free
        done = len(shards) - len(missing)
        logger.info(
            "%s: %.1f MB to write, %d of %d files are there; %s",
            folder, needed / 1e6, done, len(shards), self.holdings.describe(),
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
        with tqdm(total=sum(batches), initial=written, desc="teacher, batches answered", leave=False) as bar:
            for index in missing:
                entry = self._write_shard(shard_path(folder, index), shards[index], needed, bar)
                manifest = manifest.with_entry(index, entry)
                manifest.write(folder)
                needed -= sizes[index]

    def _write_shard(self, path: Path, shard: slice, bytes_left: int, bar: Any) -> Entry:
        index = {name: torch.cat([one[name] for one in self._index[shard]]) for name in self._index[0]}
        counts = {axis: int(index[axis].sum()) for axis in ("positions", "predictions")}
        counts["groups"] = len(self._batches[shard])
        tensors: dict[str, Tensor] = {}
        at, total = dict.fromkeys(counts, 0), RoundingError()
        for rows, extents in zip(self._batches[shard], self._index[shard], strict=True):
            parts, fidelity = self._asked(rows)
            tensors = tensors or empty_shard(parts, counts)
            step = {axis: int(extents[axis].sum()) for axis in ("positions", "predictions")} | {"groups": 1}
            for name, part in parts.items():
                axis = axis_of(name)
                assert len(part) == step[axis], (name, len(part), step)
                tensors[name][at[axis] : at[axis] + step[axis]] = part
            at = {axis: at[axis] + step[axis] for axis in at}
            total += fidelity
            bar.update()
        size, checksum = write_shard(path, {**index, **tensors}, bytes_left=bytes_left)
        return Entry(size, checksum, len(index["ids"]), counts["positions"], total)


def _batches(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows of similar length together, each once."""
    once: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if "id" not in row:
            raise DataError("rows: one has no 'id', by which a cache finds its answer. Give each row its own.")
        if once.setdefault(str(row["id"]), row) != row:
            raise DataError(f"rows: two that differ share the id '{row['id']}'. Give each row its own.")
    ordered = sorted(once.values(), key=lambda row: (len(row["input_ids"]), str(row["id"])))
    return [ordered[first : first + ASKED_TOGETHER] for first in range(0, len(ordered), ASKED_TOGETHER)]
