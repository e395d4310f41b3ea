"""Files of one JSON object a line, replaced whole or not at all, and read with the number of a damaged line."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flexkd.errors import ArtifactError
from flexkd.files import local_path, written_whole

_Row = TypeVar("_Row")


def write_lines(path: str | Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON line a row; floats keep all their digits and have to be finite."""
    with (
        written_whole(path) as partial,
        partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_lines(path: str | Path, parse: Callable[[Any], _Row]) -> list[_Row]:
    """Each line as `parse` makes it; empty lines are left out.

    Raises:
        ArtifactError: No such file, one without rows, or a damaged one; with the number of the line.
    """
    try:
        # Not splitlines: the texts of rows may hold separators that only Python takes for an end of line.
        lines = local_path(path, where="rows").read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}). Give the predictions.jsonl of a run.") from error
    rows: list[_Row] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path}:{number}: damaged ({error!r}). Evaluate again, or restore a copy.") from error
    if not rows:
        raise ArtifactError(f"{path}: holds no rows. Evaluate again.")
    return rows
