"""Data files to rows: JSON, tables, plain lines and Parquet, packed or not, with only the columns that are needed."""

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from flexkd.data.sources.delimited import read_delimited, refuse_even_lines
from flexkd.data.sources.encodings import decode
from flexkd.data.sources.table import AUTO_FORMAT, Row, Table, TextFormat, check_names
from flexkd.errors import DataError
from flexkd.files import is_pointer

UNPACKED: Final[dict[str, Callable[[bytes], bytes]]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
"""Endings of packed files, which stand behind that of the rows."""

_OTHER_PACKED: Final = (".zip", ".zst", ".7z", ".rar", ".tar", ".tgz")
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_LINE_END: Final = re.compile(r"\r\n?|\n")
_TEXT_COLUMN: Final = "text"


def row_name(path: Path) -> str:
    """The name of a file without the ending that says how it is packed."""
    return path.stem if path.suffix.lower() in UNPACKED else path.name


def is_row_file(path: Path) -> bool:
    """Whether a file of this name can hold rows."""
    return Path(row_name(path)).suffix.lower() in READERS


def read_file(
    path: Path, columns: Collection[str] | None = None, *, name: str = "", text_format: TextFormat = AUTO_FORMAT
) -> Table:
    """Read a file in the format that the endings of its name say.

    Args:
        columns: Columns whose values are read; None reads all. Other columns are not held in memory and, where the
            format allows it, not decoded.
        name: What places of rows begin with; by default the name of the file.
        text_format: Separator and encoding of text files.

    Raises:
        DataError: The file cannot be read, is empty, names a column twice, or is so damaged that its other rows are in
            doubt. A single damaged line becomes a row with a `problem` instead.
    """
    name = name or row_name(path)
    ending = Path(row_name(path)).suffix.lower()
    reader = READERS.get(ending)
    if reader is None:
        unpack = " Unpack it first." if ending in _OTHER_PACKED else ""
        raise DataError(
            f"{path}: unknown ending '{ending}'. Known: {', '.join(READERS)}, and {', '.join(UNPACKED)} behind"
            f" them.{unpack}"
        )
    try:
        if is_pointer(path):
            raise DataError(f"{path}: is a pointer of Git LFS and holds no rows. Run git lfs pull.")
        return reader(path, name, columns, text_format)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}). Check the path and its rights."
        ) from error


def _read_text(path: Path, name: str, text_format: TextFormat) -> str:
    data = path.read_bytes()
    unpack = UNPACKED.get(path.suffix.lower())
    if unpack is not None:
        try:
            data = unpack(data)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise DataError(
                f"{path}: cannot be unpacked ({error}). Fetch or copy it again, or correct its ending."
            ) from error
    text = decode(data, name, text_format.encoding)
    if not text.strip("\0 \t\r\n"):
        raise DataError(f"{path}: the file is empty. Give a file with at least one row.")
    return text


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


def _read_json(path: Path, name: str, columns: Collection[str] | None, text_format: TextFormat) -> Table:
    text = _read_text(path, name, text_format)
    start = _after_space(text, 0)
    rows = _array_rows(text, start + 1, name) if text[start] == "[" else _line_rows(text, name)
    table = _table(rows, columns)
    if len(table.rows) == 1:
        _refuse_columns(table.rows[0].values, name)
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
    for number, line in enumerate(_LINE_END.split(text), start=1):
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


def _read_csv(path: Path, name: str, columns: Collection[str] | None, text_format: TextFormat) -> Table:
    return read_delimited(_read_text(path, name, text_format), name, columns, text_format.separator)


def _read_tsv(path: Path, name: str, columns: Collection[str] | None, text_format: TextFormat) -> Table:
    return read_delimited(_read_text(path, name, text_format), name, columns, "tab")


def _read_txt(path: Path, name: str, columns: Collection[str] | None, text_format: TextFormat) -> Table:
    """One text a line, unless a separator makes it a table."""
    text = _read_text(path, name, text_format)
    if text_format.separator not in ("auto", "none"):
        return read_delimited(text, name, columns, text_format.separator)
    if text_format.separator == "auto":
        refuse_even_lines(text, name, has_header=False)
    is_read = columns is None or _TEXT_COLUMN in columns
    rows = [
        Row({_TEXT_COLUMN: line} if is_read else {}, f"{name}:{number}")
        for number, line in enumerate(_LINE_END.split(text), start=1)
        if line.strip()
    ]
    return Table(rows, (_TEXT_COLUMN,), is_typed=False)


def _read_parquet(path: Path, name: str, columns: Collection[str] | None, text_format: TextFormat) -> Table:
    if path.suffix.lower() in UNPACKED:
        raise DataError(f"{path}: Parquet is packed by itself, and not read inside {path.suffix}. Unpack it first.")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            check_names(schema.names, str(path))
            selected = [column for column in schema.names if columns is None or column in columns]
            table = file.read(columns=selected)
    except pyarrow.ArrowException as error:
        first_line = str(error).splitlines()[0]
        raise DataError(f"{path}: not a Parquet file ({first_line}). Write it again.") from error
    values = [_python_values(table.column(column), column, path) for column in selected]
    rows = [
        Row(dict(zip(selected, row, strict=True)), f"{name}:row {number}")
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


READERS: Final[dict[str, Callable[[Path, str, Collection[str] | None, TextFormat], Table]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
