"""A first recipe names the columns of the rows, and passes the checks as it was written."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from typer.testing import CliRunner

from flexkd.cli import app
from flexkd.draft.recipe_text import write_draft
from flexkd.errors import DataError, RecipeError
from flexkd.facts.names import TASKS
from flexkd.preflight import preflight
from flexkd.recipe import Recipe, load_recipe

WORDS: Final = ("bright", "dull", "warm", "flat", "quick", "slow")


def sentence(number: int, length: int) -> str:
    return " ".join([f"film{number}", *(WORDS[(number + place) % 6] for place in range(length - 1))])


def lines(path: Path, row: Callable[[int], dict[str, Any]], count: int = 80) -> str:
    path.write_text("\n".join(json.dumps(row(number)) for number in range(count)), encoding="utf-8")
    return str(path)


def drafted(folder: Path, task: str, source: str | None, *overrides: str) -> tuple[Recipe, str]:
    """The recipe that was written, read back and checked, and its text."""
    path = folder / "recipe.yaml"
    write_draft(path, task, source, overrides)
    recipe = load_recipe(path)
    if source is not None:
        assert preflight(recipe).problems == []
    return recipe, path.read_text(encoding="utf-8")


def test_columns_are_known_by_their_names(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "rows.jsonl",
        lambda n: {
            "id": f"r {n}",
            "Review": sentence(n, 5 + n % 7),
            "Sentiment": ("bad", "good")[n % 2],
            "stars": n % 5,
        },
    )
    recipe, text = drafted(tmp_path, "classification", source)
    data = recipe.data
    assert (data.text, data.label, data.label_names) == ("Review", "Sentiment", ("bad", "good"))
    assert (recipe.task.problem, data.max_length, recipe.output) == ("single_label", 32, "runs/rows")
    assert "# bad (40), good (40)" in text
    assert "# 80 rows" in text


def test_columns_without_telling_names_are_known_by_their_values(tmp_path: Path) -> None:
    rows = [f"{n},{sentence(n, 30)},{('no', 'yes', 'open')[n % 3]}" for n in range(90)]
    (tmp_path / "rows.csv").write_text("\n".join(["nr,what,verdict", *rows]), encoding="utf-8")
    recipe, _ = drafted(tmp_path, "classification", str(tmp_path / "rows.csv"))
    assert (recipe.data.text, recipe.data.label) == ("what", "verdict")
    assert recipe.data.max_length == 64
    content = "\n".join(["nr;what;verdict", *rows]).replace(",", ";").replace("bright", "tr\u00e8s").encode("cp1252")
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(content))
    recipe, text = drafted(tmp_path / "packed", "classification", f"{tmp_path}/*.csv.gz", "data.encoding=cp1252")
    assert (recipe.data.text, recipe.data.encoding) == ("what", "cp1252")
    assert "# 90 rows" in text


def test_two_texts_and_numbers_that_are_classes(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "pairs.jsonl", lambda n: {"premise": sentence(n, 5), "hypothesis": sentence(n, 3), "label": n % 3}
    )
    recipe, text = drafted(tmp_path, "classification", source)
    assert (recipe.data.text, recipe.data.text_pair, recipe.data.label_names) == ("premise", "hypothesis", None)
    assert "label_names: [name of 0, name of 1, name of 2]" in text


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        (lambda n: n / 7, "regression"),
        (lambda n: ["a", "b"][: n % 3], "multi_label"),
        (lambda n: n % 2 == 0, "single_label"),
    ],
    ids=["fractions", "lists", "truth"],
)
def test_the_kind_of_problem_follows_from_the_labels(tmp_path: Path, label: Callable[[int], Any], problem: str) -> None:
    source = lines(tmp_path / "rows.jsonl", lambda n: {"text": sentence(n, 4), "label": label(n)})
    assert drafted(tmp_path, "classification", source)[0].task.problem == problem


def test_instructions_and_chats(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "rows.jsonl",
        lambda n: {"instruction": sentence(n, 6), "input": "" if n % 2 else sentence(n, 9), "output": sentence(n, 20)},
    )
    recipe, _ = drafted(tmp_path, "instruction", source)
    assert (recipe.data.prompt, recipe.data.context, recipe.data.response) == ("instruction", "input", "output")
    assert (recipe.data.max_length, recipe.data.max_answer_length) == (64, 32)
    chat = lines(
        tmp_path / "chat.jsonl",
        lambda n: {"messages": [{"role": "user", "content": sentence(n, 5)}, {"role": "assistant", "content": "well"}]},
    )
    (tmp_path / "recipe.yaml").unlink()
    assert drafted(tmp_path, "instruction", chat)[0].data.messages == "messages"


def test_the_longer_of_two_texts_is_the_document(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", lambda n: {"a": sentence(n, 4), "b": sentence(n, 60)})
    recipe, _ = drafted(tmp_path, "summarization", source)
    assert (recipe.data.document, recipe.data.summary) == ("b", "a")
    assert recipe.data.max_length == 128


def test_a_run_is_named_after_its_rows(tmp_path: Path) -> None:
    source = lines(tmp_path / "my rows (2).jsonl", lambda n: {"text": sentence(n, 4), "label": n % 2})
    assert drafted(tmp_path, "classification", source)[0].name == "my-rows-2"


def test_splits_of_a_folder_are_taken(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split, first in (("train", 0), ("dev", 100), ("test", 200)):
        lines(
            tmp_path / "data" / f"{split}.jsonl",
            lambda n, first=first: {"text": sentence(n + first, 4), "label": n % 2},
        )
    recipe, _ = drafted(tmp_path, "classification", str(tmp_path / "data"))
    assert recipe.data.validation == recipe.data.test == recipe.data.train


def test_what_the_user_says_stands_in_the_recipe(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", lambda n: {"text": sentence(n, 4), "other": sentence(n, 9), "class": n % 2})
    changes = ("data.text=other", "teacher.model=teachers/mine", "student.size=0.1", "data.label_names=[no, yes]")
    recipe, _ = write_and_read(tmp_path, source, *changes)
    assert (recipe.data.text, recipe.teacher.model, recipe.student.size) == ("other", "teachers/mine", 0.1)
    assert recipe.data.label_names == ("no", "yes")


def write_and_read(folder: Path, source: str, *overrides: str) -> tuple[Recipe, str]:
    """As `drafted`, without a look at models that are not there."""
    path = folder / "recipe.yaml"
    write_draft(path, "classification", source, overrides)
    return load_recipe(path), path.read_text(encoding="utf-8")


@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_without_rows_is_one_to_fill_in(tmp_path: Path, task: str) -> None:
    recipe, text = drafted(tmp_path, task, None)
    assert (recipe.data.train, recipe.task.type) == ("rows.csv", task)
    assert "# a .csv, .tsv, .json, .jsonl or .parquet file" in text


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (("data.label=kind",), DataError, "data.label: there is no column 'kind'. Columns: body, when."),
        ((), DataError, r"data.label: no column looks like it. Columns: body, when. Name it: data.label=COLUMN."),
        (("data.lable=when",), RecipeError, "command line: data.lable: unknown key"),
        (("student.size",), RecipeError, "command line: 'student.size' is no KEY=VALUE."),
    ],
)
def test_what_cannot_be_written_is_said_and_nothing_is(
    tmp_path: Path, overrides: tuple[str, ...], error: type[Exception], message: str
) -> None:
    source = lines(tmp_path / "rows.jsonl", lambda n: {"body": sentence(n, 4), "when": f"{n}"})
    label = () if error is DataError else ("data.label=when",)
    with pytest.raises(error, match=message):
        write_draft(tmp_path / "recipe.yaml", "classification", source, (*label, *overrides))
    assert not (tmp_path / "recipe.yaml").exists()


def test_the_command_writes_no_file_twice_and_says_what_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "rows.jsonl", lambda n: {"text": sentence(n, 4), "label": n % 2})
    first = CliRunner().invoke(app, ["init", "classification", "rows.jsonl"])
    assert (first.exit_code, "flexkd check recipe.yaml" in first.output) == (0, True)
    again = CliRunner().invoke(app, ["init", "classification", "rows.jsonl"])
    assert (again.exit_code, "'recipe.yaml' exists. Name another file" in again.output) == (2, True)
    other = CliRunner().invoke(app, ["init", "summary", "rows.jsonl", "-o", "other.yaml"])
    assert "TASK: unknown task 'summary'" in other.output


def test_rows_are_read_once_and_columns_that_the_user_names_are_described(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flexkd")
    for split in ("train", "validation"):
        rows = [f"{sentence(n, 4)} {split} caf\u00e9;{n % 2}" for n in range(40)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["what;y", *rows]), encoding="cp1252")
    write_draft(tmp_path / "recipe.yaml", "classification", str(tmp_path), ["data.label=y", "data.max_rows=30"])
    said = [record.getMessage() for record in caplog.records if " read as " in record.getMessage()]
    assert len(said) == len(set(said)) == 4, "of each file its encoding and its separator"
    text = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert "# 0 (20), 1 (20); name the classes: label_names: [name of 0, name of 1]" in text


def test_a_recipe_of_flexkd_is_copied_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for name, source, message in (
        ("classification/sst3", None, "TASK: unknown recipe 'classification/sst3'."),
        ("classification/sst2", "rows.csv", "DATA: 'classification/sst2' names its rows. Leave 'rows.csv' out"),
    ):
        with pytest.raises(RecipeError, match=message):
            write_draft(path, name, source)
    assert write_draft(path, "classification/sst2", None) == path.read_text(encoding="utf-8")
    assert load_recipe(path) == load_recipe("classification/sst2")
