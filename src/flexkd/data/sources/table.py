"""Rows of a source and what is known of all of them: their columns, the names of their classes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, get_args

from flexkd.errors import DataError, unknown_name
from flexkd.facts.names import SeparatorName


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        values: Column -> value, for the columns that were read.
        where: File and line, or source and row number, both from 1: "train.jsonl:12"; the same for a packed file. Of
            several files, each has a name that no other has.
        problem: Why the row could not be read; its values are then empty. It counts as a bad row later.
    """

    values: Mapping[str, object]
    where: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """All rows of a source.

    Attributes:
        columns: All columns of the source in its order, also those whose values were not read.
        class_names: Column of class numbers -> names of the classes, where the source stores them.
        is_typed: False for CSV and TSV, where each value is text.
        columns_by_file: File -> its columns, where rows of several files are read as one source.
    """

    rows: Sequence[Row]
    columns: tuple[str, ...]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_typed: bool = True
    columns_by_file: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def is_encoding(name: object) -> bool:
    """Whether text can be in an encoding of this name."""
    try:
        return isinstance(name, str) and (name == "auto" or isinstance("".encode(name), bytes))
    except (LookupError, ValueError):
        return False


@dataclass(frozen=True, slots=True)
class TextFormat:
    """What a user says of text files whose content leaves it open.

    Attributes:
        separator: Sign between the fields of a table, by its name in `SEPARATORS`; "auto" finds it out.
        encoding: What files that are not UTF-8 are in, as Python names it; "auto" finds it out.
    """

    separator: str = "auto"
    encoding: str = "auto"

    def __post_init__(self) -> None:
        if self.separator not in get_args(SeparatorName):
            raise DataError(unknown_name("separator", "name", str(self.separator), get_args(SeparatorName)))
        if not is_encoding(self.encoding):
            raise DataError(f"encoding: Python knows no {self.encoding!r:.60}. Write auto, cp1252, utf-16-le, ...")


AUTO_FORMAT: Final = TextFormat()
"""Both are found out."""


def check_names(names: Sequence[str], where: str) -> None:
    """Refuse a header or schema that names a column twice."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{where}: the column '{repeated[0]}' appears twice. Give each column its own name.")


def column_problems(
    column: str, columns_by_file: Mapping[str, tuple[str, ...]], where: str, *, everywhere: bool = True
) -> Iterator[str]:
    """Why rows have no column of this name: no file has it, or some do not.

    Args:
        columns_by_file: File -> its columns. A file in which no row could be read has none, and is left out.
        where: The recipe key, for messages.
        everywhere: Whether each file must have it, rather than any.
    """
    readable = {name: columns for name, columns in columns_by_file.items() if columns}
    holders = [name for name, columns in readable.items() if column in columns]
    if readable and not holders:
        yield unknown_name(
            where, "column", column, dict.fromkeys(name for names in readable.values() for name in names)
        )
    elif everywhere:
        for name, columns in readable.items():
            if column not in columns:
                yield (
                    f"{where}: '{name}' has no column '{column}', which '{holders[0]}' has; it has "
                    f"{', '.join(columns)}. Name it there as in the other files."
                )
