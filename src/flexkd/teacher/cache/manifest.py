"""The manifest of a cache: what its answers depend on, what it stores, and which of its files are complete."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from flexkd.errors import ArtifactError
from flexkd.files import written_whole
from flexkd.fingerprints import check_fingerprints
from flexkd.teacher.cache.columns import CachedColumns
from flexkd.teacher.cache.quantization import RoundingError
from flexkd.teacher.cache.shards import checksum_of

CACHE_FORMAT: Final = 1
"""Version of the layout of a cache; another one is refused."""

_FILE: Final = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """One complete file.

    Attributes:
        bytes: Size of the file.
        checksum: Hash of its bytes.
        rows: Number of rows.
        positions: Number of positions of all rows.
        rounding_error: Error of the stored predictions. Its key in the file is `fidelity`.
    """

    bytes: int
    checksum: str
    rows: int
    positions: int
    rounding_error: RoundingError

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Entry":
        """From the form that is stored as JSON."""
        values = {name: value for name, value in plain.items() if name != "fidelity"}
        return cls(**values, rounding_error=RoundingError(**plain["fidelity"]))

    def plain(self) -> dict[str, Any]:
        """The form that is stored as JSON."""
        values = asdict(self)
        rounding_error = values.pop("rounding_error")
        return {**values, "fidelity": rounding_error}


@dataclass(frozen=True)
class Manifest:
    """Contents of the manifest file.

    Attributes:
        made_of: What the answers depend on, by name: teacher, tokenizer, data, precision, storage and others.
        kind: Kind of teacher, as in `row_hashes.kind_of`.
        group: Rows of a batch of the teacher; they share the scales of int8 columns.
        columns: What is stored of each answer. Its key in the file is `holdings`.
        entries: One for each file; None for a file that is not written yet.
    """

    made_of: Mapping[str, str]
    kind: str
    group: int
    columns: CachedColumns
    entries: tuple[Entry | None, ...]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a folder.

        Raises:
            ArtifactError: It is missing, damaged, or of another format.
        """
        path = folder / _FILE
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            if plain["format"] != CACHE_FORMAT:
                raise ArtifactError(
                    f"{path}: has format {plain['format']}, this version of flexkd reads {CACHE_FORMAT}. Delete the "
                    "folder, and build the cache again."
                )
            return cls(
                made_of=plain["made_of"],
                kind=plain["kind"],
                group=plain["group"],
                columns=CachedColumns.from_plain(plain["holdings"]),
                entries=tuple(None if entry is None else Entry.from_plain(entry) for entry in plain["entries"]),
            )
        except ArtifactError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path}: cannot be read ({error!r}). Delete the folder, and build it again."
            ) from error

    def write(self, folder: Path) -> None:
        """Write the file whole or not at all."""
        plain = {
            "format": CACHE_FORMAT,
            "made_of": dict(self.made_of),
            "kind": self.kind,
            "group": self.group,
            "holdings": asdict(self.columns),
            "entries": [None if entry is None else entry.plain() for entry in self.entries],
        }
        with written_whole(folder / _FILE) as partial:
            partial.write_text(json.dumps(plain, indent=1), encoding="utf-8")

    def with_entry(self, index: int, entry: Entry) -> "Manifest":
        """A copy with the entry of one more file."""
        return replace(self, entries=(*self.entries[:index], entry, *self.entries[index + 1 :]))

    def check(self, folder: Path, made_of: Mapping[str, str]) -> list[str]:
        """Refuse a cache that was made from something else.

        Returns:
            Differences in how the teacher is computed, after which the answers have to be verified.

        Raises:
            ArtifactError: Names every other difference, with the stored and the present value.
        """
        advice = "Choose another folder (teacher.cache), or delete this one to build it again."
        return check_fingerprints(folder, self.made_of, made_of, advice)

    def unsound(self, folder: Path, *, checksums: bool = False) -> list[int]:
        """Indices of files that are missing, truncated or, if checksums are compared, altered."""
        return [
            index
            for index, entry in enumerate(self.entries)
            if entry is None or not _is_sound(shard_path(folder, index), entry, checksums)
        ]

    @property
    def written(self) -> list[Entry]:
        """Entries of the files that are written."""
        return [entry for entry in self.entries if entry is not None]


def has_manifest(folder: Path) -> bool:
    """Whether a folder holds a cache, complete or not."""
    return (folder / _FILE).is_file()


def shard_path(folder: Path, index: int) -> Path:
    """Path of one file of a cache."""
    return folder / f"answers-{index:05}.safetensors"


def _is_sound(path: Path, entry: Entry, checksums: bool) -> bool:
    if not path.is_file() or path.stat().st_size != entry.bytes:
        return False
    return not checksums or checksum_of(path) == entry.checksum
