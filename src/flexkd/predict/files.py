"""Answers to all rows of a file, one JSON line a row; an interrupted call goes on where it stopped."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from flexkd.data.sources.rows import Row, Table, read_table
from flexkd.data.sources.table import AUTO_FORMAT, TextFormat
from flexkd.display.progress import Progress
from flexkd.errors import ArtifactError, DataError, unknown_name
from flexkd.files import output_file, writing, written_whole
from flexkd.fingerprints import check_fingerprints
from flexkd.guards.locks import locked
from flexkd.models.loading.pretrained import model_fingerprint
from flexkd.predict.student import Student
from flexkd.strict_json import read_object

_ADVICE: Final = "Choose another --output, or delete this file to start afresh."
_CHUNK: Final = 16
"""Batches whose answers are written together."""


def predict_file(
    student: Student,
    source: str,
    output: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 32,
    text_format: TextFormat = AUTO_FORMAT,
) -> Path:
    """Answer every row of a source.

    Line n of the output is about row n of the source: `row`, counted from 1, and the prediction, or `error` where the
    row cannot be used. The answers of some batches are written at once; the same call goes on behind them.

    Args:
        source: A file, a folder or a hub id, as `data.train` in a recipe; rows need no labels.
        columns: What a column holds -> its name in this source, where that is another than in the training rows.
        batch_size: Rows of a forward pass.
        text_format: Separator and encoding of a text file that leaves them open.

    Returns:
        The output.

    Raises:
        DataError: The source cannot be read, or lacks a column.
        ArtifactError: The output holds answers of another student or to other rows, or another process writes it.
    """
    path = output_file(output, where="--output")
    student = _with_columns(student, columns or {})
    names = list(student.settings.columns.values())
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(Path(f"{path}.lock"), what=str(path), advice="choose another --output"):
            table = read_table(source, columns=names, text_format=text_format)
            _check_columns(table, student.settings.columns, source)
            _answer(student, table.rows, path, names, batch_size)
    return path


def _answer(student: Student, rows: Sequence[Row], path: Path, names: Sequence[str], batch_size: int) -> None:
    """Write the lines that the output lacks; called with its lock held."""
    made_of = {
        "student": model_fingerprint(student.model),
        "rows": _digest(rows, names),
        "columns": json.dumps(dict(student.settings.columns), sort_keys=True),
        "precision": student.precision,
    }
    num_answered = _num_answered(path, made_of)
    step = batch_size * _CHUNK
    with (
        path.open("a", encoding="utf-8", newline="\n") as file,
        Progress("student's answers", len(rows), "rows", done=num_answered) as progress,
    ):
        for first in range(num_answered, len(rows), step):
            chunk = rows[first : first + step]
            predictions = student.predict_rows(chunk, batch_size=batch_size)
            lines = [{"row": first + place + 1, **prediction} for place, prediction in enumerate(predictions)]
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
            progress.advance(len(chunk))


def _num_answered(path: Path, made_of: Mapping[str, str]) -> int:
    """Lines of an earlier call; removes one that an interruption left half.

    Raises:
        ArtifactError: They are of another student, or about other rows.
    """
    side = path.with_name(f"{path.name}.made_of.json")
    if not path.exists():
        with written_whole(side) as partial:
            partial.write_text(json.dumps(made_of), encoding="utf-8")
        return 0
    if not side.is_file():
        raise ArtifactError(f"{path}: is there, and was not written by flexkd predict. {_ADVICE}")
    check_fingerprints(path, read_object(side, advice=_ADVICE), made_of, _ADVICE)
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return content.count(b"\n")


def _digest(rows: Sequence[Row], names: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        values = [row.problem, *(row.values.get(name) for name in names)]
        digest.update(json.dumps(values, default=str).encode("utf-8", errors="surrogatepass") + b"\n")
    return digest.hexdigest()


def _with_columns(student: Student, columns: Mapping[str, str]) -> Student:
    """The student with other names of columns."""
    settings: Any = student.settings
    for name in columns:
        if name not in settings.columns:
            raise DataError(unknown_name("--column", "column", name, list(settings.columns)))
    return replace(student, settings=replace(settings, columns={**settings.columns, **columns}))


def _check_columns(table: Table, columns: Mapping[str, str], source: str) -> None:
    for name, column in columns.items():
        # A context may be missing in every row, as it may be empty in each.
        lacking = [file for file, names in table.columns_by_file.items() if column not in names and name != "context"]
        if lacking:
            where = source if len(table.columns_by_file) == 1 else f"{source}: '{lacking[0]}'"
            raise DataError(
                f"{where}: has no column '{column}', which holds the {name} of the training rows; it has "
                f"{', '.join(table.columns_by_file[lacking[0]])}. Name the one that does: --column {name}=COLUMN."
            )
