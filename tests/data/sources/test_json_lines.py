"""Files of JSON lines: a damaged one is refused with its path, the number of the line and what to do."""

import re
from pathlib import Path

import pytest

from flexkd.data.sources.json_lines import read_lines, write_lines
from flexkd.errors import ArtifactError


def test_rows_come_back_and_empty_lines_are_left_out(tmp_path: Path) -> None:
    rows = [{"id": "a\u2028b", "value": 0.1}, {"id": "\U0001f600", "value": None}]
    write_lines(tmp_path / "rows.jsonl", rows)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert read_lines(tmp_path / "rows.jsonl", dict) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a"}\n{"id": "b", "lab', ":2: damaged ("),
        (
            '{"id": "a"}\n\n{"name": "b"}\n',
            ":3: damaged (KeyError('id')). Generate the answers again",
        ),
        ("\n", ": holds no rows. Generate the answers again."),
        (None, ": cannot be read ("),
    ],
)
def test_a_damaged_file_is_refused_with_path_and_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=re.escape(f"{path}{message}")):
        read_lines(path, lambda row: str(row["id"]))
