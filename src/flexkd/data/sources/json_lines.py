"""Files with one JSON object a line: written whole or not at all, and read with the number of a damaged line."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flexkd.errors import ArtifactError
from flexkd.files import local_path, written_whole

_Parsed = TypeVar("_Parsed")


def write_lines(path: str | Path, objects: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON line for each object; floats keep all their digits and must be finite."""
    with (
        written_whole(path) as partial,
        partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        for item in objects:
            file.write(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n")


def read_lines(path: str | Path, parse: Callable[[Any], _Parsed]) -> list[_Parsed]:
    """Parse every line that is not empty.

    Args:
        parse: Turns the JSON value of one line into an object.

    Raises:
        ArtifactError: The file is missing, has no lines, or is damaged; the message has the number of the line.
    """
    try:
        # Not splitlines: texts may hold separators that only Python reads as an end of line.
        lines = local_path(path, where="rows").read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}). Give the file that flexkd generate wrote.") from error
    parsed: list[_Parsed] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            parsed.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{path}:{number}: damaged ({error!r}). Generate the answers again, or restore a copy."
            ) from error
    if not parsed:
        raise ArtifactError(f"{path}: holds no rows. Generate the answers again.")
    return parsed
