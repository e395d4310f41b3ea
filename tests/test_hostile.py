"""Damaged and hostile files: recipes, rows, scores, caches, records and settings end in an error of ours or are read.

Hypothesis damages real files; `make fuzz N=100000` tries more of them.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flexkd.compare_record import CompareRecord
from flexkd.data.sources.rows import read_table
from flexkd.errors import ArtifactError, FlexKDError
from flexkd.pipeline.cells import check_stored
from flexkd.preflight.comparison import finished_steps
from flexkd.preflight.run_folder import student_settings
from flexkd.recipe import Recipe, load_recipe
from flexkd.record import RunRecord
from flexkd.run_files import checkpoints
from flexkd.scoring.selection_file import load_selection
from flexkd.tasks.serving import ServingSettings
from flexkd.teacher.cache.reader import CachedTeacher
from tests.source_tree import ROOT

OLD: Final = ROOT / "tests" / "old_folders"
FILES: Final = int(os.environ.get("FUZZ", "3000"))
"""Damaged files in all."""

ODD_VALUES: Final = [
    "null", "[]", "{}", "true", "-1", "0", "1e400", "-1e-400", ".nan", ".inf", "99999999999999999999", "0x7fffffff",
    "''", "'\\x00'", "!!python/object/apply:os.system ['true']", "!!binary aGk=", "&a [*a]", "*b", "2026-13-45",
    "<<: *c", "'$HOME'", "~root/x", "../../x", "http://x/y", "a: b: c", "- - -", "{a: }", "\ud83d", "\u202e", "1_000",
    "1:30:00", "yes", "'" + "x" * 5000 + "'",
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A real file in which some bytes are gone, others, repeated or swapped."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(start + draw(st.integers(0, 64)), len(content))
        match draw(st.sampled_from(["cut", "delete", "insert", "flip", "repeat", "zero"])):
            case "cut":
                del content[start:]
            case "delete":
                del content[start:end]
            case "insert":
                content[start:start] = draw(st.binary(max_size=16))
            case "flip":
                for place in range(start, end):
                    content[place] ^= draw(st.integers(1, 255))
            case "repeat":
                content[start:start] = content[start:end] * draw(st.integers(1, 3))
            case "zero":
                content[start:end] = bytes(end - start)
    return bytes(content)


@st.composite
def edited(draw: st.DrawFn, originals: list[str]) -> bytes:
    """A real text in which lines are gone, repeated or swapped, or whose values are odd."""
    lines = draw(st.sampled_from(originals)).splitlines()
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(lines) - 1)) if lines else 0
        match (
            draw(st.sampled_from(["delete", "repeat", "swap", "value", "value", "value", "key", "indent"]))
            if lines
            else ""
        ):
            case "delete":
                del lines[place]
            case "repeat":
                lines.insert(place, lines[place])
            case "swap":
                other = draw(st.integers(0, len(lines) - 1))
                lines[place], lines[other] = lines[other], lines[place]
            case "value":
                key, colon, _ = lines[place].partition(":")
                lines[place] = f"{key}{colon or ':'} {draw(st.sampled_from(ODD_VALUES))}"
            case "key":
                lines[place] = draw(st.text(max_size=12)) + lines[place]
            case "indent":
                lines[place] = draw(st.sampled_from([" ", "  ", "\t"])) + lines[place]
    return "\n".join(lines).encode("utf-8", errors="surrogatepass")


def bytes_of(*patterns: str) -> list[bytes]:
    return [path.read_bytes() for pattern in patterns for path in sorted(OLD.glob(pattern))]


def texts_of(folder: Path, pattern: str) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob(pattern))]


def read_recipe(file: Path) -> None:
    assert isinstance(load_recipe(file), Recipe)


def read_rows(file: Path) -> None:
    table = read_table(str(file))
    assert table.rows


def read_cell(file: Path) -> None:
    whole = json.loads(bytes_of("comparison/cells/*/cell.json")[0])
    check_stored(file, whole["made_of"], whole["engine"])
    student_settings(file.parents[2])
    finished_steps([file.parent])


def read_cache(file: Path) -> None:
    """Of a cache one file is damaged, the other is whole."""
    whole = OLD / "cached" / "cache"
    (folder,) = (path for path in whole.iterdir() if path.is_dir())
    copy = file.parent / "cache"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    damaged_name = "manifest.json" if file.read_bytes()[:1] in (b"{", b"") else "answers-00000.safetensors"
    shutil.copy(file, copy / damaged_name)
    CachedTeacher(copy, checksums=True)


def read_checkpoint(file: Path) -> None:
    folder = file.parent / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(OLD / "interrupted" / "checkpoints", folder)
    shutil.copy(file, folder / "checkpoint-2" / "model.safetensors")
    ((_, damage),) = checkpoints(folder)
    if damage:
        raise ArtifactError(damage)
    load_file(folder / "checkpoint-2" / "model.safetensors")


SETTINGS: Final = json.dumps(
    {
        "task": "classification", "problem": "single_label", "columns": {"text": "text"}, "max_length": 16,
        "labels": ["a", "b"], "max_answer_length": 0, "prompt": None, "generation": None, "format": 1,
    }
).encode()  # fmt: skip

KINDS: Final[dict[str, tuple[str, Callable[[], st.SearchStrategy[bytes]], Callable[[Path], None]]]] = {
    "recipes by line": ("x.yaml", lambda: edited(texts_of(ROOT / "recipes", "*/*.yaml")), read_recipe),
    "recipes with every key": ("x.yaml", lambda: edited(texts_of(OLD / "recipes", "*/*.yaml")), read_recipe),
    "recipes by byte": ("x.yaml", lambda: damaged(bytes_of("recipes/*.yaml")), read_recipe),
    "recipes of noise": ("x.yaml", lambda: st.binary(max_size=200), read_recipe),
    "rows as JSON lines": ("x.jsonl", lambda: damaged(bytes_of("*.jsonl")), read_rows),
    "rows as JSON": ("x.json", lambda: damaged([b'[{"a": 1, "b": ["x"]}, {"a": 2, "b": []}]']), read_rows),
    "rows as CSV": ("x.csv", lambda: damaged([b'a,b\n1,"x, y"\n2,z\n', b"a;b\n1;x\n2;y\n"]), read_rows),
    "rows of noise": ("x.csv", lambda: st.binary(max_size=200), read_rows),
    "rows as text": ("x.txt", lambda: st.binary(max_size=200), read_rows),
    "scores": ("x.safetensors", lambda: damaged(bytes_of("*/scores.safetensors")), lambda file: _selection(file)),
    "caches": ("x", lambda: damaged(bytes_of("cached/cache/*/*.json", "cached/cache/*/*.safetensors")), read_cache),
    "records": ("x.json", lambda: damaged(bytes_of("*/record.json")), lambda file: RunRecord.read(file)),
    "comparisons": ("x.json", lambda: damaged(bytes_of("*/compare.json")), lambda file: CompareRecord.read(file)),
    "cells": ("cells/a/cell.json", lambda: damaged(bytes_of("comparison/cells/*/cell.json")), read_cell),
    "settings": (
        "flexkd.json",
        lambda: damaged(bytes_of("*/student/flexkd.json") or [SETTINGS]),
        lambda file: _serving(file),
    ),
    "checkpoints": ("x", lambda: damaged(bytes_of("interrupted/checkpoints/*/model.safetensors")), read_checkpoint),
}


def _selection(file: Path) -> None:
    load_selection(file, {})


def _serving(file: Path) -> None:
    ServingSettings.read(file.parent)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_by_name_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    name, contents, read = KINDS[kind]
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    num_read = num_refused = 0

    @settings(
        max_examples=max(FILES // len(KINDS), 1), deadline=None, database=None, suppress_health_check=list(HealthCheck),
        derandomize="FUZZ" not in os.environ,
    )  # fmt: skip
    @given(content=contents())
    def check(content: bytes) -> None:
        nonlocal num_read, num_refused
        file.write_bytes(content)
        before = set(os.listdir(tmp_path)) | {"cache", "checkpoints"}
        try:
            read(file)
            num_read += 1
        except FlexKDError as error:
            num_refused += 1
            message = str(error)
            assert message.strip()
            assert "Traceback" not in message
        assert set(os.listdir(tmp_path)) <= before

    check()
    assert num_refused, f"none of {num_read} damaged files was refused"


def test_text_of_rows_is_no_code(tmp_path: Path) -> None:
    """A tag of YAML that makes objects is refused, and nothing of it runs."""
    file = tmp_path / "x.yaml"
    mark = tmp_path / "ran"
    value: Any = f"!!python/object/apply:pathlib.Path.touch [{mark}]"
    file.write_text(f"name: {value}\n", encoding="utf-8")
    with pytest.raises(FlexKDError):
        load_recipe(file)
    assert not mark.exists()
