"""What a cache was made of and holds, and which of its files are whole."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from flexkd.errors import ArtifactError
from flexkd.files import written_whole
from flexkd.made_of import check_made_of
from flexkd.teacher.cache.columns import CachedColumns
from flexkd.teacher.cache.quantization import RoundingError
from flexkd.teacher.cache.shards import checksum_of

FORMAT: Final = 1
"""Version of the layout of a cache; another one is refused."""

_FILE: Final = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """One file that was written whole.

    Attributes:
        bytes: Its size.
        checksum: Of its bytes.
        rows: That it holds.
        positions: Of these rows.
        fidelity: Of their predictions.
    """

    bytes: int
    checksum: str
    rows: int
    positions: int
    fidelity: RoundingError


@dataclass(frozen=True)
class Manifest:
    """What is known of a cache.

    Attributes:
        made_of: What the answers depend on, by name: teacher, tokenizer, data, precision, storage and others.
        kind: Of the teacher, as in `contents.kind_of`.
        group: Rows that were asked together.
        holdings: What of each answer is stored.
        entries: One for each file, None for one that is still to be written.
    """

    made_of: Mapping[str, str]
    kind: str
    group: int
    holdings: CachedColumns
    entries: tuple[Entry | None, ...]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """That of a folder.

        Raises:
            ArtifactError: There is none, it is damaged, or of another format.
        """
        path = folder / _FILE
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            if plain["format"] != FORMAT:
                raise ArtifactError(
                    f"{path}: has format {plain['format']}, this version of flexkd reads {FORMAT}. Delete the folder, "
                    "and build the cache again."
                )
            return cls(
                made_of=plain["made_of"],
                kind=plain["kind"],
                group=plain["group"],
                holdings=CachedColumns.from_plain(plain["holdings"]),
                entries=tuple(None if one is None else _entry(one) for one in plain["entries"]),
            )
        except ArtifactError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path}: cannot be read ({error!r}). Delete the folder, and build it again."
            ) from error

    def write(self, folder: Path) -> None:
        """Write it whole or not at all."""
        with written_whole(folder / _FILE) as partial:
            partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1), encoding="utf-8")

    def with_entry(self, index: int, entry: Entry) -> "Manifest":
        """The same after one more file was written."""
        return replace(self, entries=(*self.entries[:index], entry, *self.entries[index + 1 :]))

    def check(self, folder: Path, made_of: Mapping[str, str]) -> list[str]:
        """Refuse a cache that was made of something else.

        Returns:
            In what the teacher's engine differs, under which its answers have to be looked at.

        Raises:
            ArtifactError: Names every difference, old and new.
        """
        advice = "Choose another folder (teacher.cache), or delete this one to build it again."
        return check_made_of(folder, self.made_of, made_of, advice)

    def unsound(self, folder: Path, *, checksums: bool = False) -> list[int]:
        """Files that are missing, cut or, where checksums are compared, altered."""
        return [
            index
            for index, entry in enumerate(self.entries)
            if entry is None or not _is_sound(shard_path(folder, index), entry, checksums)
        ]

    @property
    def written(self) -> list[Entry]:
        """Of the files that are there."""
        return [entry for entry in self.entries if entry is not None]


def has_manifest(folder: Path) -> bool:
    """Whether a cache was begun in a folder."""
    return (folder / _FILE).is_file()


def shard_path(folder: Path, index: int) -> Path:
    """One file of a cache."""
    return folder / f"answers-{index:05}.safetensors"


def _is_sound(path: Path, entry: Entry, checksums: bool) -> bool:
    if not path.is_file() or path.stat().st_size != entry.bytes:
        return False
    return not checksums or checksum_of(path) == entry.checksum


def _entry(plain: Mapping[str, Any]) -> Entry:
    return Entry(**{**plain, "fidelity": RoundingError(**plain["fidelity"])})
