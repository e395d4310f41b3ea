"""Rows by name: a hub id, a folder, a file (JSONL, JSON, CSV, TSV, Parquet), a sample in a package, or fetched ones."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from flexkd.data.sources.fetching import fetched_file, is_fetched_source, kept_file
from flexkd.data.sources.files import READERS, read_file
from flexkd.data.sources.files import Row as Row
from flexkd.data.sources.files import Table as Table
from flexkd.errors import DataError, unknown_name
from flexkd.facts.names import HUB_ID
from flexkd.files import is_there, local_path
from flexkd.packages import PACKAGE_PREFIX, nearest_file, resolve_package_path

SPLIT_NAMES: Final = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""File names (without ending) that a folder may use for each split."""

_JOINT: Final = " + "
_SHARD: Final = re.compile(r"-(\d+)-of-(\d+)$")
_HUB_SOURCE: Final = re.compile(rf"(?P<path>{HUB_ID})(?::(?P<config>[\w.-]+))?(?:\[(?P<split>[\w.-]+)\])?", re.ASCII)


def read_rows(
    source: str,
    *,
    split: str = "train",
    where: Mapping[str, object] | None = None,
    columns: Collection[str] | None = None,
) -> list[Row]:
    """All rows of a source, in its order.

    Args:
        source: File, folder, "package:IMPORT_NAME/SUB/PATH.csv", hub id "owner/name", "owner/name:config" or
            "owner/name:config[split]", or one that is fetched once: "apt:descriptions", "foldoc:definitions",
            "sdist:NAME==VERSION/SUB/PATH.json". Several, joined by " + ", are read one after the other.
        split: Which file of a folder, or split of a hub data set; a single file has no splits.
        where: Column -> the value (or list of values) a row must have to be read.
        columns: Whose values are kept besides those of `where`, None for all: nothing else of a file is decoded.

    Raises:
        DataError: Nothing can be read, or `where` names a column or value that does not exist.
        MissingDependencyError: The package is not installed.
    """
    return list(read_table(source, split=split, where=where, columns=columns).rows)


def read_table(
    source: str,
    *,
    split: str = "train",
    where: Mapping[str, object] | None = None,
    columns: Collection[str] | None = None,
) -> Table:
    """As `read_rows`, with the columns and the class names that the source knows."""
    read = None if columns is None else {*columns, *(where or {})}
    tables = [_read(part, split, read) for part in parts_of(source)]
    table = tables[0] if len(tables) == 1 else _joined(tables)
    if not table.rows:
        raise DataError(f"{source}: no rows. Give a source with at least one row.")
    for column, wanted in (where or {}).items():
        table = _filtered(table, source, column, wanted)
    return table


def parts_of(source: str) -> list[str]:
    """The sources that are joined to one by " + "; a file that has this in its name is one."""
    if _JOINT not in source or is_there(_local(source)):
        return [source]
    return [part.strip() for part in source.split(_JOINT)]


def is_hub_id(source: str) -> bool:
    """Whether a source is looked up on the Hugging Face hub, rather than on this machine."""
    if source.startswith(PACKAGE_PREFIX) or is_fetched_source(source) or Path(source).suffix.lower() in READERS:
        return False
    return _HUB_SOURCE.fullmatch(source) is not None and not is_there(_local(source))


def is_remote(source: str) -> bool:
    """Whether reading a source needs a network: it is on the hub, or was not fetched yet."""
    return is_hub_id(source) or (is_fetched_source(source) and not kept_file(source).exists())


def _read(source: str, split: str, columns: Collection[str] | None) -> Table:
    if not source.strip():
        raise DataError("data: the name of the source is empty. Give a path, package:NAME/PATH, or a hub id.")
    if is_hub_id(source):
        return _read_hub(source, split, columns)
    if is_fetched_source(source):
        return read_file(fetched_file(source), columns)
    path = resolve_package_path(source) if source.startswith(PACKAGE_PREFIX) else _local(source)
    if path.is_dir():
        return _joined([read_file(file, columns) for file in _split_files(path, split)])
    if not is_there(path):
        raise DataError(
            f"{source}: no such file or folder{'' if path.is_absolute() else f' in {Path.cwd()}'}.{nearest_file(path)}"
            " Give a path, package:NAME/PATH, or a hub id as owner/name."
        )
    return read_file(path, columns)


def _local(source: str) -> Path:
    return local_path(source, where="data")


def _split_files(folder: Path, split: str) -> list[Path]:
    """The file of a split, or its shards (train-00000-of-00002.parquet), in the folder or in its `data` folder."""
    files = sorted(
        file for place in (folder, folder / "data") if place.is_dir() for file in place.iterdir()
        if file.suffix.lower() in READERS
    )  # fmt: skip
    names = "|".join(SPLIT_NAMES.get(split, (re.escape(split),)))
    found: dict[str, list[Path]] = {}
    for file in files:
        match = re.fullmatch(rf"({names})(-\d+-of-\d+)?", file.stem, re.IGNORECASE)
        if match:
            kind = f"{match[1]}{'-*' if match[2] else ''}{file.suffix.lower()} in {file.parent}"
            found.setdefault(kind, []).append(file)
    if not found and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"{folder}: was written by save_to_disk of the datasets library, which is not read here. Write Parquet: "
            f"data = datasets.load_from_disk({str(folder)!r}); data.to_parquet('train.parquet'), for a dictionary of "
            "splits data['train'].to_parquet('train.parquet') and so on."
        )
    if not found:
        there = ", ".join(file.name for file in files[:10]) or "none"
        wanted = " or ".join(SPLIT_NAMES.get(split, (split,)))
        raise DataError(
            f"{folder}: no file for the split '{split}'. Data files there: {there}."
            f" Name one {wanted} with an ending of {', '.join(READERS)}, or give the file itself,"
            " several as 'FILE + FILE'."
        )
    if len(found) > 1:
        raise DataError(f"{folder}: several files for the split '{split}': {'; '.join(found)}. Give the file itself.")
    shards = next(iter(found.values()))
    _check_shards(folder, split, shards)
    return shards


def _check_shards(folder: Path, split: str, files: Sequence[Path]) -> None:
    """Refuses shards of which some are missing, or which belong to two writings of one split."""
    numbers = [tuple(map(int, match.groups())) for file in files if (match := _SHARD.search(file.stem))]
    counts = sorted({count for _, count in numbers})
    if len(counts) > 1:
        raise DataError(
            f"{folder}: the files for the split '{split}' are of {' and of '.join(map(str, counts))} shards. Keep those"
            " of one writing."
        )
    absent = sorted({place for count in counts for place in range(count)} - {number for number, _ in numbers})
    if absent:
        raise DataError(
            f"{folder}: {len(absent)} of the {counts[0]} files for the split '{split}' are missing (first"
            f" -{absent[0]:05d}-of-{counts[0]:05d}). Fetch or copy them again."
        )


def _joined(tables: Sequence[Table]) -> Table:
    columns = dict.fromkeys(column for table in tables for column in table.columns)
    class_names: dict[str, tuple[str, ...]] = {}
    for table in tables:
        for column, names in table.class_names.items():
            is_read = bool(table.rows) and column in table.rows[0].values
            if is_read and class_names.setdefault(column, names) != names:
                raise DataError(
                    f"{column}: the sources that are read as one name its classes differently: "
                    f"{list(class_names[column])} and {list(names)}. Write them again with one list of names."
                )
    rows = [row for table in tables for row in table.rows]
    return Table(rows, tuple(columns), class_names, all(table.is_typed for table in tables))


def _read_hub(source: str, split: str, columns: Collection[str] | None) -> Table:
    match = _HUB_SOURCE.fullmatch(source)
    assert match is not None
    split = match["split"] or split
    import datasets

    try:
        data = datasets.load_dataset(match["path"], match["config"], split=split)
        features = dict(data.features or {})
        selected = [column for column in data.column_names if columns is None or column in columns]
        # Other columns may hold images or sounds, which would all be decoded.
        values = data.select_columns(selected).to_list() if selected else [{} for _ in range(len(data))]
    # The loader raises errors of many libraries (network, hub, file formats); each means the same to a user.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise DataError(
            f"{source}: no file or folder here, and the split '{split}' of a hub data set of that name could not be"
            f" loaded ({type(error).__name__}: {reason}). Check the name, its configuration and the network,"
            " or give a local file."
        ) from error
    class_names = {column: names for column, feature in features.items() if (names := _class_names(feature))}
    name = f"{match['path'].partition('/')[2]}[{split}]"
    rows = [Row(row, f"{name}:row {number}") for number, row in enumerate(values, start=1)]
    return Table(rows, tuple(data.column_names), class_names)


def _class_names(feature: Any) -> tuple[str, ...]:
    """Names of a column of class numbers, or of lists of class numbers."""
    import datasets

    inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return tuple(inner.names) if isinstance(inner, datasets.ClassLabel) else ()


def _filtered(table: Table, source: str, column: str, wanted: object) -> Table:
    where = f"where.{column}"
    if column not in table.columns:
        raise DataError(f"{source}: {unknown_name(where, 'column', column, table.columns)}")
    choices = wanted if isinstance(wanted, list | tuple) else [wanted]
    if not table.is_typed:
        # CSV knows only text; a recipe may say 2020 or true.
        texts = [str(choice) for choice in choices]
        choices = [*texts, *(text.lower() for text in texts if text in ("True", "False"))]
    # A row that could not be read has no value to judge by: it stays, to be listed as bad.
    rows = [row for row in table.rows if row.problem is not None or row.values.get(column) in choices]
    if all(row.problem is not None for row in rows):
        seen = sorted({str(row.values[column]) for row in table.rows if column in row.values})
        known = ", ".join(repr(value) for value in seen[:5]) + (", ..." if len(seen) > 5 else "")
        raise DataError(f"{source}: {where}: no row has the value {wanted!r}. Values there: {known}. Correct it.")
    return Table(rows, table.columns, table.class_names, table.is_typed)
