"""Text with one row a line and a sign between its fields, as CSV and TSV: which sign it is, and the rows."""

import csv
import io
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from flexkd.data.sources.table import Row, Table, check_names
from flexkd.errors import DataError
from flexkd.facts.names import SEPARATORS

logger = logging.getLogger(__name__)

_LARGEST_FIELD: Final = 2**31 - 1
_LONGEST_HEADER: Final = 2**20
_MOST_UNREADABLE: Final = 0.1
"""A sign that leaves more than this share of the rows with another number of fields than the header separates none."""
_WITHOUT_QUOTES: Final = ("tab", "pipe", "none")
"""Separators of files whose quotation marks may be plain characters."""
_ANNOUNCED: Final = re.compile(r'"?sep=(.)"?[ \t]*(?:\r\n?|\n)', re.IGNORECASE)
_ADVICE: Final = f"Set data.separator (of flexkd predict: --separator) to one of {', '.join(SEPARATORS)}, none."
_NO_SIGN: Final = "\x1f"
"""Stands for the sign of a file with one column; ASCII has it for this, and no text holds it."""


def read_delimited(text: str, name: str, columns: Collection[str] | None, separator: str = "auto") -> Table:
    """The rows of a table.

    A separator is possible if it divides the header and leaves nine of ten rows with as many fields. Where two are
    possible, nothing in the file says which is meant, and it is refused. `csv.Sniffer` guesses by the frequency of
    characters instead, and takes letters for separators where texts are long.

    Args:
        name: The file, for messages and the places of rows.
        columns: Columns whose values are read; None reads all.
        separator: A name in `SEPARATORS`, or "auto" to find it out.

    Raises:
        DataError: The separator is left open, a quote is never closed, or a column appears twice.
    """
    announced = _ANNOUNCED.match(text)
    first_line = 1 if announced is None else 2
    text = text if announced is None else text[announced.end() :]
    with _unlimited_fields():
        if separator != "auto":
            return _table(text, name, separator, columns, first_line)
        if announced is not None:
            separator = _announced_separator(announced[1], name)
            table = _table(text, name, separator, columns, first_line)
        else:
            table, separator = _sniffed(text, name, columns)
    if separator != "comma":
        reading = "one column" if separator == "none" else f"fields separated by {SEPARATORS[separator]!r}"
        logger.info("%s: read as %s (%s).", name, reading, ", ".join(table.columns))
    return table


def _sniffed(text: str, name: str, columns: Collection[str] | None) -> tuple[Table, str]:
    """The table, and the separator that its header and rows have."""
    possible = [option for option in SEPARATORS if len(_first_record(text, option)) > 1]
    if len(possible) > 1:
        return _only_fitting(text, name, possible, columns)
    if not possible:
        refuse_even_lines(text, name, has_header=True)
    separator = possible[0] if possible else "none"
    return _table(text, name, separator, columns, 1), separator


def refuse_even_lines(text: str, name: str, *, has_header: bool) -> None:
    """Refuse lines that look like one column, while a sign divides every row into as many fields.

    A sign that is always followed by a space is punctuation of the texts.

    Raises:
        DataError: Names the sign and the key that decides.
    """
    for separator, sign in SEPARATORS.items():
        if not re.search(rf"{re.escape(sign)}[^\s]", text):
            continue
        counts = _field_counts(text, separator)
        if has_header:
            next(counts)
        first = next(counts, 1)
        if first > 1 and all(count == first for count in counts):
            raise DataError(
                f"{name}: every row has {first - 1} {sign!r}, so that it may be one column or {first}. {_ADVICE}"
            )


def _field_counts(text: str, separator: str) -> Iterator[int]:
    """Fields of each row; 0 where it cannot be divided."""
    try:
        for _, fields in _records(text, "", separator, has_quotes=separator not in _WITHOUT_QUOTES):
            if fields:
                yield 0 if isinstance(fields, str) else len(fields)
    except DataError:
        yield 0


def _announced_separator(sign: str, name: str) -> str:
    """The separator that the first line names, as Excel reads and writes it."""
    for separator, known_sign in SEPARATORS.items():
        if sign == known_sign:
            return separator
    raise DataError(
        f"{name}:1: names {sign!r} as its separator. Use one of {', '.join(map(repr, SEPARATORS.values()))}."
    )


def _only_fitting(text: str, name: str, possible: Sequence[str], columns: Collection[str] | None) -> tuple[Table, str]:
    """The table under the only separator that fits header and rows, and that separator."""
    tables: dict[str, Table] = {}
    for separator in possible:
        try:
            tables[separator] = _table(text, name, separator, columns, 1)
        except DataError:
            continue
    fitting = [
        separator for separator, table in tables.items() if _num_problems(table) <= _MOST_UNREADABLE * len(table.rows)
    ]
    if len(fitting) != 1:
        readings = "; ".join(f"{option}: {', '.join(_first_record(text, option))}" for option in fitting or possible)
        reason = "more than one sign divides it evenly" if fitting else "no sign divides its rows as its header"
        raise DataError(f"{name}: {reason} ({readings}). {_ADVICE}")
    return tables[fitting[0]], fitting[0]


def _first_record(text: str, separator: str) -> list[str]:
    try:
        record = next((fields for _, fields in _records(text[:_LONGEST_HEADER], "", separator) if fields), [])
    except DataError:
        return []
    return [] if isinstance(record, str) else record


@contextmanager
def _unlimited_fields() -> Iterator[None]:
    # By default the csv module refuses fields over 131,072 characters; long texts are checked with all rows later.
    limit = csv.field_size_limit(_LARGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _records(
    text: str, name: str, separator: str, *, has_quotes: bool = True, skips_space: bool = False, first_line: int = 1
) -> Iterator[tuple[int, list[str] | str]]:
    """For each record, its first line and its fields, or the reason why it cannot be split into fields."""
    quoting: Final = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    sign = SEPARATORS.get(separator, _NO_SIGN)
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=sign, quoting=quoting, strict=True, skipinitialspace=skips_space)
    while True:
        line = reader.line_num + first_line
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                message = f"{name}:{line}: a quote that opens in this row is never closed. Close it, or double it."
                raise DataError(message) from error
            yield line, f"row cannot be divided into fields: {error}"


def _table(text: str, name: str, separator: str, columns: Collection[str] | None, first_line: int) -> Table:
    """The table under one separator, with quotation marks as quotes.

    In files of tabs, bars or one column they may be plain characters as well: spreadsheets quote fields; public
    benchmarks do not, and hold unpaired marks. There the reading with fewer unreadable rows is taken.
    """
    if separator not in _WITHOUT_QUOTES or '"' not in text:
        return _rows_of(text, name, separator, columns, first_line)
    plain = _rows_of(text, name, separator, columns, first_line, has_quotes=False)
    try:
        quoted = _rows_of(text, name, separator, columns, first_line)
    except DataError:
        quoted = None
    if quoted is not None and _num_problems(quoted) <= _num_problems(plain):
        return quoted
    logger.info("%s: quotation marks are read as plain characters, since they do not pair up as quotes.", name)
    return plain


def _rows_of(
    text: str, name: str, separator: str, columns: Collection[str] | None, first_line: int, *, has_quotes: bool = True
) -> Table:
    # A space behind every sign of the header is part of the layout, not of the names and values.
    behind = _first_record(text, separator)[1:]
    skips_space = bool(behind) and all(field.startswith(" ") for field in behind)
    records = _records(text, name, separator, has_quotes=has_quotes, skips_space=skips_space, first_line=first_line)
    line, header = next((line, fields) for line, fields in records if fields)
    if isinstance(header, str):
        raise DataError(f"{name}:{line}: the header cannot be read ({header}). Correct it.")
    if any("\0" in field for field in header):
        raise DataError(f"{name}:{line}: the header holds a zero byte. Write the file again.")
    names = [field.strip() or f"column {index}" for index, field in enumerate(header, start=1)]
    check_names(names, f"{name}:{line}")
    indices = {column: index for index, column in enumerate(names) if columns is None or column in columns}
    rows: list[Row] = []
    filled = {index for index, field in enumerate(header) if field.strip()}
    for line, fields in records:
        if fields:
            rows.append(_row(fields, header, indices, f"{name}:{line}"))
            if len(filled) < len(header) and isinstance(fields, list):
                filled.update(index for index, field in enumerate(fields) if field)
    # Spreadsheets write empty columns without a name behind the others.
    return Table(rows, tuple(name for index, name in enumerate(names) if index in filled), is_typed=False)


def _row(fields: list[str] | str, header: Sequence[str], indices: Mapping[str, int], where: str) -> Row:
    if isinstance(fields, str):
        return Row({}, where, fields)
    width = len(header)
    if len(fields) < width or any(fields[width:]):
        return Row({}, where, f"row has another number of fields than the header: {len(fields)}, not {width}")
    if fields == header:
        return Row({}, where, "row repeats the header")
    if any("\0" in field for field in fields):
        return Row({}, where, "row holds a zero byte")
    return Row({column: fields[index] for column, index in indices.items()}, where)


def _num_problems(table: Table) -> int:
    return sum(row.problem is not None for row in table.rows)
