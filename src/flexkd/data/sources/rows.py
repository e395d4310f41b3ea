"""Rows of a named source: a hub id, a folder, a file, a sample in a package, or a source that is fetched once."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from flexkd.data.sources.fetching import cached_file, fetched_file, is_fetched_source
from flexkd.data.sources.files import READERS, read_file
from flexkd.data.sources.files import Row as Row
from flexkd.data.sources.files import Table as Table
from flexkd.data.sources.own_rows import OWN_PREFIX, own_table
from flexkd.errors import DataError, unknown_name
from flexkd.facts.names import HUB_ID
from flexkd.files import is_there, local_path
from flexkd.packages import PACKAGE_PREFIX, nearest_file, resolve_package_path

SPLIT_NAMES: Final = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""File names (without ending) that a folder may use for a split."""

_SEPARATOR: Final = " + "
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
        source: A file, a folder, "package:IMPORT_NAME/SUB/PATH.csv", a hub id ("owner/name", "owner/name:config" or
            "owner/name:config[split]"), a source that is fetched once ("apt:descriptions", "foldoc:definitions",
            "sdist:NAME==VERSION/SUB/PATH.json"), or "own:NAME" of `register_rows`. Several joined by " + " are read
            one after the other.
        split: File of a folder, or split of a hub data set; a single file has no splits.
        where: Column -> the value, or list of values, that a row must have.
        columns: Columns whose values are read besides those of `where`; None reads all.

    Raises:
        DataError: Nothing can be read, or `where` names a column or value that does not exist.
        MissingDependencyError: The package of the source is not installed.
    """
    return list(read_table(source, split=split, where=where, columns=columns).rows)


def read_table(
    source: str,
    *,
    split: str = "train",
    where: Mapping[str, object] | None = None,
    columns: Collection[str] | None = None,
) -> Table:
    """As `read_rows`, with the columns and class names of the source."""
    needed = None if columns is None else {*columns, *(where or {})}
    tables = [_read(part, split, needed) for part in joined_sources(source)]
    table = tables[0] if len(tables) == 1 else _join(tables)
    if not table.rows:
        raise DataError(f"{source}: no rows. Give a source with at least one row.")
    for column, choice in (where or {}).items():
        table = _filter(table, source, column, choice)
    return table


def joined_sources(source: str) -> list[str]:
    """The sources that " + " joins; a file whose own name holds it is one source."""
    if _SEPARATOR not in source or is_there(_local_path(source)):
        return [source]
    return [part.strip() for part in source.split(_SEPARATOR)]


def is_hub_id(source: str) -> bool:
    """Whether a source is on the Hugging Face hub, rather than on this machine."""
    if source.startswith(PACKAGE_PREFIX) or is_fetched_source(source) or Path(source).suffix.lower() in READERS:
        return False
    return _HUB_SOURCE.fullmatch(source) is not None and not is_there(_local_path(source))


def is_remote(source: str) -> bool:
    """Whether reading a source needs a network: it is on the hub, or has not been fetched yet."""
    return is_hub_id(source) or (is_fetched_source(source) and not cached_file(source).exists())


def _read(source: str, split: str, columns: Collection[str] | None) -> Table:
    if not source.strip():
        raise DataError("data: the name of the source is empty. Give a path, package:NAME/PATH, or a hub id.")
    if source.startswith(OWN_PREFIX):
        return own_table(source, split)
    if is_hub_id(source):
        return _read_hub(source, split, columns)
    if is_fetched_source(source):
        return read_file(fetched_file(source), columns)
    path = resolve_package_path(source) if source.startswith(PACKAGE_PREFIX) else _local_path(source)
    if path.is_dir():
        return _join([read_file(file, columns) for file in _split_files(path, split)])
    if not is_there(path):
        raise DataError(
            f"{source}: no such file or folder{'' if path.is_absolute() else f' in {Path.cwd()}'}.{nearest_file(path)}"
            " Give a path, package:NAME/PATH, or a hub id as owner/name."
        )
    return read_file(path, columns)


def _local_path(source: str) -> Path:
    return local_path(source, where="data")


def _split_files(folder: Path, split: str) -> list[Path]:
    """The file of a split or its shards (train-00000-of-00002.parquet), in a folder or in its `data` folder."""
    files = sorted(
        file for parent in (folder, folder / "data") if parent.is_dir() for file in parent.iterdir()
        if file.suffix.lower() in READERS
    )  # fmt: skip
    names = "|".join(SPLIT_NAMES.get(split, (re.escape(split),)))
    candidates: dict[str, list[Path]] = {}
    for file in files:
        match = re.fullmatch(rf"({names})(-\d+-of-\d+)?", file.stem, re.IGNORECASE)
        if match:
            kind = f"{match[1]}{'-*' if match[2] else ''}{file.suffix.lower()} in {file.parent}"
            candidates.setdefault(kind, []).append(file)
    if not candidates and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"{folder}: was written by save_to_disk of the datasets library, which is not read here. Write Parquet: "
            f"data = datasets.load_from_disk({str(folder)!r}); data.to_parquet('train.parquet'), for a dictionary of "
            "splits data['train'].to_parquet('train.parquet') and so on."
        )
    if not candidates:
        data_files = ", ".join(file.name for file in files[:10]) or "none"
        file_names = " or ".join(SPLIT_NAMES.get(split, (split,)))
        raise DataError(
            f"{folder}: no file for the split '{split}'. Data files there: {data_files}."
            f" Name one {file_names} with an ending of {', '.join(READERS)}, or give the file itself,"
            " several as 'FILE + FILE'."
        )
    if len(candidates) > 1:
        listed = "; ".join(candidates)
        raise DataError(f"{folder}: several files for the split '{split}': {listed}. Give the file itself.")
    shards = next(iter(candidates.values()))
    _check_shards(folder, split, shards)
    return shards


def _check_shards(folder: Path, split: str, files: Sequence[Path]) -> None:
    """Refuse a split with missing shards, or with shards from two different exports."""
    numbers = [tuple(map(int, match.groups())) for file in files if (match := _SHARD.search(file.stem))]
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


def _join(tables: Sequence[Table]) -> Table:
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
        # Other columns may hold images or sounds, which would be decoded.
        values = data.select_columns(selected).to_list() if selected else [{} for _ in range(len(data))]
    # The loader raises errors of many libraries (network, hub, file formats), which mean the same to a user.
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
    """Class names of a column of class numbers, or of lists of class numbers; empty where it has none."""
    import datasets

    inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return tuple(inner.names) if isinstance(inner, datasets.ClassLabel) else ()


def _filter(table: Table, source: str, column: str, choice: object) -> Table:
    where = f"where.{column}"
    if column not in table.columns:
        raise DataError(f"{source}: {unknown_name(where, 'column', column, table.columns)}")
    choices = choice if isinstance(choice, list | tuple) else [choice]
    if not table.is_typed:
        # CSV has only text, while a recipe may say 2020 or true.
        texts = [str(value) for value in choices]
        choices = [*texts, *(text.lower() for text in texts if text in ("True", "False"))]
    # A row that could not be read has no value to compare; it stays, to be listed as bad.
    rows = [row for row in table.rows if row.problem is not None or row.values.get(column) in choices]
    if all(row.problem is not None for row in rows):
        values = sorted({str(row.values[column]) for row in table.rows if column in row.values})
        listed = ", ".join(map(repr, values[:5])) + (", ..." if len(values) > 5 else "")
        raise DataError(f"{source}: {where}: no row has the value {choice!r}. Values there: {listed}. Correct it.")
    return Table(rows, table.columns, table.class_names, table.is_typed)
