"""Data files to rows: JSON lines, JSON arrays, CSV, TSV and Parquet, with only the columns that are needed."""

import csv
import io
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from flexkd.errors import DataError
from flexkd.files import is_pointer

logger = logging.getLogger(__name__)

_LARGEST_FIELD: Final = 2**31 - 1
_COMPRESSED: Final = (".gz", ".bz2", ".xz", ".zip", ".zst")
_SPACE: Final = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        values: Column -> value, for the columns that were read.
        where: File and line, or source and row number, both from 1: "train.jsonl:12".
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
    """

    rows: Sequence[Row]
    columns: tuple[str, ...]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_typed: bool = True


def read_file(path: Path, columns: Collection[str] | None = None) -> Table:
    """Read a file in the format that the ending of its name says; text is UTF-8, with or without a byte order mark.

    Args:
        columns: Columns whose values are read; None reads all. Other columns are not held in memory and, where the
            format allows it, not decoded.

    Raises:
        DataError: The file cannot be read, is empty, names a column twice, or is so damaged that its other rows are in
            doubt. A single damaged line becomes a row with a `problem` instead.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        unpack = " Unpack it first." if path.suffix.lower() in _COMPRESSED else ""
        raise DataError(f"{path}: unknown ending '{path.suffix}'. Known: {', '.join(READERS)}.{unpack}")
    try:
        if is_pointer(path):
            raise DataError(f"{path}: is a pointer of Git LFS and holds no rows. Run git lfs pull.")
        return reader(path, columns)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}). Check the path and its rights."
        ) from error


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        reason = "it looks like UTF-16" if is_utf16 else f"byte 0x{data[error.start]:02x}"
        raise DataError(f"{path.name}:{line}: not UTF-8 ({reason}). Save the file as UTF-8.") from error
    if not text or text.isspace():
        raise DataError(f"{path}: the file is empty. Give a file with at least one row.")
    return text


def _check_names(names: Sequence[str], where: str) -> None:
    """Refuse a header or schema that names a column twice."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{where}: the column '{repeated[0]}' appears twice. Give each column its own name.")


class _JsonRowDecoder:
    """Decodes rows one after the other and finds repeated keys: JSON does not define which of them counts."""

    def __init__(self) -> None:
        self._repeated: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def read(self, text: str, position: int, where: str) -> tuple[Row, int]:
        """The row that begins at a position, and the position of its end."""
        self._repeated.clear()
        value, end = self._decoder.raw_decode(text, position)
        if not isinstance(value, dict):
            return Row({}, where, f"row is not an object: {type(value).__name__}"), end
        if self._repeated:
            return Row({}, where, f"row holds a key twice: '{self._repeated[0]}'"), end
        return Row(value, where), end

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            self._repeated.append(next(key for key in keys if keys.count(key) > 1))
        return values


def _table(rows: Iterable[Row], columns: Collection[str] | None) -> Table:
    names: dict[str, None] = {}
    selected = []
    for row in rows:
        names.update(dict.fromkeys(row.values))
        values = {name: value for name, value in row.values.items() if columns is None or name in columns}
        selected.append(Row(values, row.where, row.problem))
    return Table(selected, tuple(names))


def _read_json(path: Path, columns: Collection[str] | None) -> Table:
    text = _read_text(path)
    start = _after_space(text, 0)
    rows = _array_rows(text, start + 1, path.name) if text[start] == "[" else _line_rows(text, path.name)
    table = _table(rows, columns)
    if len(table.rows) == 1:
        _refuse_columns(table.rows[0].values, path.name)
    return table


def _refuse_columns(values: Mapping[str, object], name: str) -> None:
    """Refuse one object of whole columns, which is how pandas writes a table by default."""
    sizes = [len(value) if isinstance(value, list | dict) else None for value in values.values()]
    if len(sizes) > 1 and None not in sizes and len(set(sizes)) == 1:
        raise _not_rows_error(name, ", ".join(list(values)[:5]))


def _not_rows_error(name: str, keys: str) -> DataError:
    return DataError(f"{name}: holds one object ({keys}), not rows. Write one object a line, or one array of objects.")


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _line_rows(text: str, name: str) -> Iterator[Row]:
    # Not str.splitlines: it also splits at U+2028 and others, which may be inside a JSON string.
    is_first, decoder = True, _JsonRowDecoder()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row, end = decoder.read(line, _after_space(line, 0), where)
            end = _after_space(line, end)
            if end < len(line):
                raise json.JSONDecodeError("Extra data", line, end)
            yield row
        except (ValueError, RecursionError) as error:
            if is_first:
                _refuse_single_object(text, name)
            yield Row({}, where, f"row is not JSON: {_json_fault(error)}")
        is_first = False


def _refuse_single_object(text: str, name: str) -> None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return
    keys = ", ".join(list(value)[:5]) if isinstance(value, dict) else type(value).__name__
    raise _not_rows_error(name, keys)


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _array_rows(text: str, position: int, name: str) -> Iterator[Row]:
    """Rows of one JSON array, decoded one by one, since json.loads does not tell the line of each."""
    decoder = _JsonRowDecoder()
    counted_to, line = 0, 1

    def line_of(offset: int) -> int:
        nonlocal counted_to, line
        line += text.count("\n", counted_to, offset)
        counted_to = offset
        return line

    position = _after_space(text, position)
    while text[position : position + 1] != "]":
        where = f"{name}:{line_of(position)}"
        try:
            row, position = decoder.read(text, position, where)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: the array is not JSON: {_json_fault(error)}. Correct this row.") from error
        yield row
        position = _after_space(text, position)
        if text[position : position + 1] == ",":
            position = _after_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(
                f"{name}:{line_of(position)}: the array goes on without ',' or ends without ']'. Correct it."
            )
    end = _after_space(text, position + 1)
    if end < len(text):
        raise DataError(f"{name}:{line_of(end)}: more text follows the array. Write one array, or one object a line.")


@contextmanager
def _unlimited_fields() -> Iterator[None]:
    # By default the csv module refuses fields over 131,072 characters; long texts are checked with all rows later.
    limit = csv.field_size_limit(_LARGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _records(text: str, name: str, delimiter: str, has_quotes: bool) -> Iterator[tuple[int, list[str] | str]]:
    """For each record, its first line and its fields, or the reason why it cannot be split into fields."""
    quoting: Final = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                message = f"{name}:{line}: a quote that opens in this row is never closed. Close it, or double it."
                raise DataError(message) from error
            yield line, f"row is not {'CSV' if delimiter == ',' else 'TSV'}: {error}"


def _delimited_table(
    text: str, name: str, delimiter: str, columns: Collection[str] | None, *, has_quotes: bool = True
) -> Table:
    with _unlimited_fields():
        records = _records(text, name, delimiter, has_quotes)
        line, header = next((line, fields) for line, fields in records if fields)
        if isinstance(header, str):
            raise DataError(f"{name}:{line}: the header cannot be read ({header}). Correct it.")
        _check_names(header, f"{name}:{line}")
        indices = {column: index for index, column in enumerate(header) if columns is None or column in columns}
        rows = [_record_row(fields, len(header), indices, f"{name}:{line}") for line, fields in records if fields]
    return Table(rows, tuple(header), is_typed=False)


def _record_row(fields: list[str] | str, width: int, indices: Mapping[str, int], where: str) -> Row:
    if isinstance(fields, str):
        return Row({}, where, fields)
    if len(fields) != width:
        return Row({}, where, f"row has another number of fields than the header: {len(fields)}, not {width}")
    return Row({column: fields[index] for column, index in indices.items()}, where)


def _read_csv(path: Path, columns: Collection[str] | None) -> Table:
    return _delimited_table(_read_text(path), path.name, ",", columns)


def _read_tsv(path: Path, columns: Collection[str] | None) -> Table:
    """Read quotation marks as quotes or as plain characters, whichever gives fewer unreadable rows.

    Both kinds of file are common: spreadsheets quote fields; public benchmarks do not, and hold unpaired marks.
    """
    text = _read_text(path)
    plain = _delimited_table(text, path.name, "\t", columns, has_quotes=False)
    if '"' not in text:
        return plain
    try:
        quoted = _delimited_table(text, path.name, "\t", columns)
    except DataError:
        quoted = None
    if quoted is not None and _num_problems(quoted) <= _num_problems(plain):
        return quoted
    logger.info("%s: quotation marks are read as plain characters, since they do not pair up as quotes.", path.name)
    return plain


def _num_problems(table: Table) -> int:
    return sum(row.problem is not None for row in table.rows)


def _read_parquet(path: Path, columns: Collection[str] | None) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_names(schema.names, str(path))
            selected = [name for name in schema.names if columns is None or name in columns]
            table = file.read(columns=selected)
    except pyarrow.ArrowException as error:
        first_line = str(error).splitlines()[0]
        raise DataError(f"{path}: not a Parquet file ({first_line}). Write it again.") from error
    values = [_python_values(table.column(name), name, path) for name in selected]
    rows = [
        Row(dict(zip(selected, row, strict=True)), f"{path.name}:row {number}")
        for number, row in enumerate(zip(*values, strict=True) if values else [()] * table.num_rows, start=1)
    ]
    return Table(rows, tuple(schema.names), _stored_class_names(schema.metadata or {}))


def _python_values(column: Any, name: str, path: Path) -> list[object]:
    """The values of an Arrow column as Python objects, which cannot hold some of them, like a date after year 9999."""
    import pyarrow

    try:
        values: list[object] = column.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: column '{name}' of type {column.type} holds a value that cannot be read ({error}). Write it as "
            "text."
        ) from error
    return values


def _stored_class_names(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Class names that the datasets library stores in the schema of its Parquet files, also for lists of classes."""
    stored = json.loads(metadata.get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features", {})
    # A list column is a feature that wraps the feature of its items; earlier versions wrote a JSON list.
    items = {
        column: feature[0] if isinstance(feature, list) and feature else feature for column, feature in features.items()
    }
    inner = {column: item.get("feature", item) if isinstance(item, dict) else item for column, item in items.items()}
    return {
        column: tuple(feature["names"])
        for column, feature in inner.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


READERS: Final[dict[str, Callable[[Path, Collection[str] | None], Table]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
