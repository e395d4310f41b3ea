"""Rows that a function of the user gives, named by a recipe like any other source."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flexkd
from flexkd.data.sources.own_rows import OWN_ROWS
from flexkd.data.sources.rows import is_hub_id, is_remote, read_table
from flexkd.errors import DataError, RecipeError
from flexkd.preflight import preflight
from tests.job_files import job


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    OWN_ROWS.clear()


def test_a_recipe_reads_the_rows_of_a_function_as_those_of_a_file(tmp_path: Path) -> None:
    file = preflight(job(tmp_path)).data
    lines = (tmp_path / "single_label.jsonl").read_text(encoding="utf-8").splitlines()
    splits: list[str] = []

    def rows(split: str) -> Iterator[dict[str, Any]]:
        splits.append(split)
        yield from map(json.loads, lines)

    flexkd.register_rows("reviews", rows)
    result = preflight(job(tmp_path, data__train="own:reviews"))
    assert result.problems == []
    assert file is not None
    assert result.data is not None
    assert result.data.num_rows == file.num_rows
    assert result.data.fingerprint == file.fingerprint
    assert splits == ["train"]
    assert not is_hub_id("own:reviews")
    assert not is_remote("own:reviews")


def test_each_split_may_have_rows_of_its_own_and_some_are_chosen() -> None:
    flexkd.register_rows("parts", lambda split: [{"text": split, "kind": number} for number in range(3)])
    table = read_table("own:parts", split="test", where={"kind": [1, 2]})
    assert [row.values for row in table.rows] == [{"text": "test", "kind": 1}, {"text": "test", "kind": 2}]
    flexkd.register_rows("more", lambda split: [{"text": "more"}])
    assert len(read_table("own:parts + own:more").rows) == 4


def _fails(split: str) -> list[dict[str, Any]]:
    raise OSError(f"no database of {split}")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (_fails, "own:mine: its function raised OSError (no database of train) for the split 'train'."),
        (lambda: [], "own:mine: its function raised TypeError ("),
        (lambda split: None, "own:mine: its function raised TypeError ("),
        (lambda split: [{"text": "a"}, "b"], "own:mine: row 2 is 'b'. Let each row be a dict"),
        (lambda split: [{1: "a"}], "own:mine: row 1 is {1: 'a'}."),
        (lambda split: [], "own:mine: no rows. Give a source with at least one row."),
    ],
)
def test_what_gives_no_rows_is_one_error(tmp_path: Path, function: Any, words: str) -> None:
    flexkd.register_rows("mine", function)
    problem = preflight(job(tmp_path, data__train="own:mine")).problems[0]
    assert problem.startswith(words)


def test_names_are_known_or_refused() -> None:
    flexkd.register_rows("reviews", lambda split: [])
    with pytest.raises(
        DataError, match=re.escape("own:review: no rows of that name in this process. Registered: reviews.")
    ):
        read_table("own:review")
    with pytest.raises(RecipeError, match="register_rows: 'a/b' is no name"):
        flexkd.register_rows("a/b", lambda split: [])
    with pytest.raises(RecipeError, match="register_rows: 3 cannot be called"):
        flexkd.register_rows("three", 3)  # type: ignore[arg-type]
