"""Rows of a named source: a hub id, a folder, a file, a sample in a package, or a source that is fetched once."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from flexkd.data.sources.fetching import cached_file, fetched_file, is_fetched_source
from flexkd.data.sources.files import is_row_file, read_file
from flexkd.data.sources.own_rows import OWN_PREFIX, own_table
from flexkd.data.sources.places import RowFile, distinct_names, local_files
from flexkd.data.sources.table import AUTO_FORMAT, TextFormat, column_problems
from flexkd.data.sources.table import Row as Row
from flexkd.data.sources.table import Table as Table
from flexkd.errors import DataError
from flexkd.facts.names import HUB_ID, SOURCE_SEPARATOR
from flexkd.files import is_there, local_path
from flexkd.packages import PACKAGE_PREFIX

TableReader = Callable[..., Table]
"""`read_table`, or a `ReadOnce` in its place."""

_HUB_SOURCE: Final = re.compile(rf"(?P<path>{HUB_ID})(?::(?P<config>[\w.-]+))?(?:\[(?P<split>[\w.-]+)\])?", re.ASCII)


def read_rows(
    source: str,
    *,
    split: str = "train",
    where: Mapping[str, object] | None = None,
    columns: Collection[str] | None = None,
    text_format: TextFormat = AUTO_FORMAT,
) -> list[Row]:
    """All rows of a source, in its order.

    Args:
        source: A file, a folder, a pattern such as "rows/*.csv", "package:IMPORT_NAME/SUB/PATH.csv", a hub id
            ("owner/name", "owner/name:config" or "owner/name:config[split]"), a source that is fetched once
            ("sdist:NAME==VERSION/SUB/PATH.json", or one of `register_fetched`), or "own:NAME" of `register_rows`.
            Several joined by " + " are read one after the other.
        split: File of a folder, or split of a hub data set; a single file has no splits.
        where: Column -> the value, or list of values, that a row must have.
        columns: Columns whose values are read besides those of `where`; None reads all.
        text_format: Separator and encoding of text files.

    Raises:
        DataError: Nothing can be read, or `where` names a column or value that does not exist.
        MissingDependencyError: The package of the source is not installed.
    """
    return list(read_table(source, split=split, where=where, columns=columns, text_format=text_format).rows)


def read_table(
    source: str,
    *,
    split: str = "train",
    where: Mapping[str, object] | None = None,
    columns: Collection[str] | None = None,
    text_format: TextFormat = AUTO_FORMAT,
) -> Table:
    """As `read_rows`, with the columns and class names of the source."""
    needed = None if columns is None else {*columns, *(where or {})}
    return _selected(list(_tables(source, split, needed, text_format)), source, where)


class ReadOnce:
    """`read_table` for who asks for the same sources again: each is read, and said how, once.

    It holds all columns in memory, also those that nobody asks for.
    """

    def __init__(self) -> None:
        self._tables: dict[tuple[str, str, TextFormat], list[Table]] = {}

    def __call__(
        self,
        source: str,
        *,
        split: str = "train",
        where: Mapping[str, object] | None = None,
        columns: Collection[str] | None = None,
        text_format: TextFormat = AUTO_FORMAT,
    ) -> Table:
        """As `read_table`; rows have all columns, whichever are asked for."""
        key = (source, split, text_format)
        if key not in self._tables:
            self._tables[key] = list(_tables(source, split, None, text_format))
        return _selected(self._tables[key], source, where)


def _selected(tables: Sequence[Table], source: str, where: Mapping[str, object] | None) -> Table:
    """The tables of a source as one, with the rows that `where` leaves."""
    if not any(table.rows for table in tables):
        raise DataError(f"{source}: no rows. Give a source with at least one row.")
    for column, choice in (where or {}).items():
        tables = _filter(tables, source, column, choice)
    return tables[0] if len(tables) == 1 else _join(tables)


def joined_sources(source: str) -> list[str]:
    """The sources that " + " joins; a file whose own name holds it is one source."""
    if SOURCE_SEPARATOR not in source or is_there(_local_path(source)):
        return [source]
    return [part.strip() for part in source.split(SOURCE_SEPARATOR)]


def is_hub_id(source: str) -> bool:
    """Whether a source is on the Hugging Face hub, rather than on this machine."""
    if source.startswith(PACKAGE_PREFIX) or is_fetched_source(source) or is_row_file(Path(source)):
        return False
    return _HUB_SOURCE.fullmatch(source) is not None and not is_there(_local_path(source))


def is_remote(source: str) -> bool:
    """Whether reading a source needs a network: it is on the hub, or has not been fetched yet."""
    return is_hub_id(source) or (is_fetched_source(source) and not cached_file(source).exists())


def _tables(source: str, split: str, columns: Collection[str] | None, text_format: TextFormat) -> Iterator[Table]:
    """The table of each file, hub id or function that a source names, in their order."""
    parts = joined_sources(source)
    files: dict[str, list[RowFile]] = {}
    for part in parts:
        if not part.strip():
            raise DataError("data: the name of the source is empty. Give a path, package:NAME/PATH, or a hub id.")
        if parts.count(part) > 1:
            raise DataError(f"{source}: '{part}' is named twice, so that its rows would be read twice. Name it once.")
        if not part.startswith(OWN_PREFIX) and not is_hub_id(part):
            files[part] = [RowFile(fetched_file(part))] if is_fetched_source(part) else local_files(part, split)
    names = iter(distinct_names([file for entries in files.values() for file in entries]))
    for part in parts:
        if part.startswith(OWN_PREFIX):
            yield _named(part, own_table(part, split))
        elif part not in files:
            yield _named(part, _read_hub(part, split, columns))
        for file in files.get(part, ()):
            name = next(names)
            yield _named(name, read_file(file.path, columns, name=name, text_format=text_format))


def _named(name: str, table: Table) -> Table:
    return replace(table, columns_by_file={name: table.columns})


def _local_path(source: str) -> Path:
    return local_path(source, where="data")


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
    return Table(rows, tuple(columns), class_names, all(table.is_typed for table in tables), _columns_by_file(tables))


def _columns_by_file(tables: Sequence[Table]) -> dict[str, tuple[str, ...]]:
    return {name: columns for table in tables for name, columns in table.columns_by_file.items()}


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


def _filter(tables: Sequence[Table], source: str, column: str, choice: object) -> list[Table]:
    """The tables without the rows whose column has another value."""
    where = f"where.{column}"
    problems = list(column_problems(column, _columns_by_file(tables), where))
    if problems:
        raise DataError("\n".join(f"{source}: {problem}" for problem in problems))
    choices = choice if isinstance(choice, list | tuple) else [choice]
    filtered = [_filtered(table, column, choices) for table in tables]
    if all(row.problem is not None for table in filtered for row in table.rows):
        values = sorted({str(row.values[column]) for table in tables for row in table.rows if column in row.values})
        listed = ", ".join(map(repr, values[:5])) + (", ..." if len(values) > 5 else "")
        raise DataError(f"{source}: {where}: no row has the value {choice!r}. Values there: {listed}. Correct it.")
    return filtered


def _filtered(table: Table, column: str, choices: Sequence[object]) -> Table:
    if not table.is_typed:
        # CSV has only text, while a recipe may say 2020 or true.
        texts = [str(value) for value in choices]
        choices = [*texts, *(text.lower() for text in texts if text in ("True", "False"))]
    # A row that could not be read has no value to compare; it stays, to be listed as bad.
    rows = [row for row in table.rows if row.problem is not None or row.values.get(column) in choices]
    return replace(table, rows=rows)
