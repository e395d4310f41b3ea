"""Files of a source on this machine: one file, those of a split in a folder, or those that a pattern names."""

import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flexkd.data.sources.files import READERS, is_row_file, row_name
from flexkd.errors import DataError
from flexkd.files import is_there, local_path
from flexkd.packages import PACKAGE_PREFIX, nearest_file, resolve_package_path

SPLIT_NAMES: Final = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""Names that the file or the folder of a split may have, without endings."""

# The hub writes train-00000-of-00002 and, in earlier data sets, a hash behind it.
_SHARD: Final = r"-(\d+)-of-(\d+)(?:-[0-9a-f]{16})?"
_MOST_LISTED: Final = 10


@dataclass(frozen=True)
class RowFile:
    """One file of a source.

    Attributes:
        depth: How many parts of its path are its name at least: 2 where its folder is that of a split.
    """

    path: Path
    depth: int = 1


def local_files(source: str, split: str) -> list[RowFile]:
    """The files of a source on this machine, in the order in which they are read.

    Args:
        source: A file, a folder, a pattern with * and ?, or one of the first two behind package:NAME/.
        split: Whose files of a folder; files and patterns have no splits.

    Raises:
        DataError: There is no such file or folder, or the folder has no file for the split, or lacks some of them.
    """
    path = resolve_package_path(source) if source.startswith(PACKAGE_PREFIX) else local_path(source, where="data")
    if path.is_dir():
        return _split_files(path, split)
    if is_there(path):
        return [RowFile(path)]
    here = "" if path.is_absolute() else f" in {Path.cwd()}"
    if is_pattern(source):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise DataError(f"{source}: no file{here} has a name of this pattern.{_nearest_folder(path)} Correct it.")
        return [RowFile(file) for file in files]
    raise DataError(
        f"{source}: no such file or folder{here}.{nearest_file(path)} Give a path, package:NAME/PATH, or a hub id as "
        "owner/name."
    )


def is_pattern(source: str) -> bool:
    """Whether a source names files by a pattern, unless there is a file of this very name."""
    return glob.has_magic(source) and not source.startswith(PACKAGE_PREFIX)


def distinct_names(files: Sequence[RowFile]) -> list[str]:
    """What the places of the rows of each file begin with: its name, with as many folders as tell it from the others.

    Raises:
        DataError: A file is there twice, or once more in a packed form.
    """
    paths = [file.path.absolute() for file in files]
    plain = [path.with_name(row_name(path)) for path in paths]
    for index, path in enumerate(plain):
        first = plain.index(path)
        if first != index:
            twice = "twice" if paths[first] == paths[index] else f"packed and unpacked ('{files[first].path.name}')"
            raise DataError(
                f"{files[index].path}: its rows would be read twice, since it is named {twice}. Name it once."
            )
    depths = [file.depth for file in files]
    while True:
        names = ["/".join(path.parts[-depth:]) for path, depth in zip(plain, depths, strict=True)]
        repeated = {name for name in names if names.count(name) > 1}
        if not repeated:
            return names
        depths = [depth + (name in repeated) for name, depth in zip(names, depths, strict=True)]


def _nearest_folder(path: Path) -> str:
    """What lies in the folder that a pattern looks into, as a sentence."""
    folder = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    if not folder.is_dir():
        return f" There is no folder '{folder}'."
    return f" Data files in '{folder}': {_listed(file for file in sorted(folder.iterdir()) if is_row_file(file))}."


def _split_files(folder: Path, split: str) -> list[RowFile]:
    """The files of a split in a folder, in its `data` folder, or in the folder of the split in one of these.

    It may be one file, or shards: train-00000-of-00002.parquet, train/0000.parquet.
    """
    names = "|".join(SPLIT_NAMES.get(split, (re.escape(split),)))
    entries = sorted(
        entry for parent in (folder, folder / "data") if parent.is_dir() for entry in parent.iterdir()
        if entry != folder / "data"
    )  # fmt: skip
    candidates: dict[str, list[RowFile]] = {}
    for entry in entries:
        if entry.is_dir():
            if re.fullmatch(names, entry.name, re.IGNORECASE) and not _is_saved(entry):
                for file in filter(is_row_file, sorted(entry.iterdir())):
                    kind = f"{entry.name}/*{_endings(file)} in {entry.parent}"
                    candidates.setdefault(kind, []).append(RowFile(file, depth=2))
            continue
        match = re.fullmatch(rf"({names})({_SHARD})?", Path(row_name(entry)).stem, re.IGNORECASE)
        if match and is_row_file(entry):
            kind = f"{match[1]}{'-*' if match[2] else ''}{_endings(entry)} in {entry.parent}"
            candidates.setdefault(kind, []).append(RowFile(entry))
    if not candidates:
        raise _no_split_error(folder, split, entries)
    if len(candidates) > 1:
        raise DataError(
            f"{folder}: several files for the split '{split}': {'; '.join(candidates)}. Give the file itself."
        )
    shards = next(iter(candidates.values()))
    _check_shards(folder, split, [file.path for file in shards])
    return shards


def _no_split_error(folder: Path, split: str, entries: Iterable[Path]) -> DataError:
    if _is_saved(folder):
        return DataError(
            f"{folder}: was written by save_to_disk of the datasets library, which is not read here. Write Parquet: "
            f"data = datasets.load_from_disk({str(folder)!r}); data.to_parquet('train.parquet'), for a dictionary of "
            "splits data['train'].to_parquet('train.parquet') and so on."
        )
    inner = [entry.name for entry in entries if entry.is_dir()]
    folders = f" Folders there, of which one may be meant: {', '.join(inner[:_MOST_LISTED])}." if inner else ""
    return DataError(
        f"{folder}: no file for the split '{split}'."
        f" Data files there: {_listed(entry for entry in entries if is_row_file(entry))}.{folders}"
        f" Name one {' or '.join(SPLIT_NAMES.get(split, (split,)))} with an ending of {', '.join(READERS)}, or give the"
        " file itself, several as a list or a pattern."
    )


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _endings(file: Path) -> str:
    plain = Path(row_name(file))
    return f"{plain.suffix}{file.name[len(plain.name) :]}".lower()


def _check_shards(folder: Path, split: str, files: Sequence[Path]) -> None:
    """Refuse a split with missing shards, or with shards from two different exports."""
    stems = [Path(row_name(file)).stem for file in files]
    numbers = [tuple(map(int, match.groups())) for stem in stems if (match := re.search(f"{_SHARD}$", stem))]
    counts = sorted({count for _, count in numbers})
    if len(counts) > 1:
        raise DataError(
            f"{folder}: the files for the split '{split}' are of {' and of '.join(map(str, counts))} shards. Keep those"
            " of one writing."
        )
    missing = sorted({index for count in counts for index in range(count)} - {number for number, _ in numbers})
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of the {counts[0]} files for the split '{split}' are missing (first"
            f" -{missing[0]:05d}-of-{counts[0]:05d}). Fetch or copy them again."
        )
    if len(files) > 1 and all(stem.isdecimal() for stem in stems):
        gaps = sorted(set(range(max(map(int, stems)))) - set(map(int, stems)) - {0})
        if gaps:
            raise DataError(
                f"{folder}: of the files for the split '{split}', which end with {files[-1].name}, number {gaps[0]} is "
                "missing. Fetch or copy it again, or give a pattern."
            )


def _listed(files: Iterable[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join(names[:_MOST_LISTED]) + (", ..." if len(names) > _MOST_LISTED else "") if names else "none"
