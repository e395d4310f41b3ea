"""What the guides say runs to the letter, with tiny models and rows in the places that they name."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from flexkd.pipeline.distill import distill
from flexkd.recipe import load_recipe
from flexkd.recipe.document import read_document, write_yaml
from flexkd.record import RunRecord
from tests.job_files import fixed_costs, sentences, write_tokenizer
from tests.tiny import tiny_model
from website.links import DOCS

SMALL = ("training.max_steps=2", "training.batch_size=16", "data.max_length=16", "teacher.allow_weak=true")


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, in which the relative paths of a guide lie; costs are not measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))
    fixed_costs(monkeypatch)


def recipe_of(guide: str) -> Any:
    """The first piece of a recipe in a guide."""
    text = (DOCS / "guides" / f"{guide}.md").read_text(encoding="utf-8")
    block = re.search(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return read_document(block[1], guide).value


def write_rows(path: str, rows: Iterable[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_model(folder: str, model_type: str, *, extra: str = "") -> None:
    tiny_model(model_type, num_labels=2).save_pretrained(folder)
    write_tokenizer(Path(folder), extra=extra)


def run(content: dict[str, Any]) -> RunRecord:
    Path("recipe.yaml").write_text(write_yaml(content), encoding="utf-8")
    return distill(load_recipe("recipe.yaml", SMALL))


def test_a_language_model_teaches_an_encoder_with_words_of_its_own() -> None:
    content = recipe_of("encoder")
    data = content["data"]
    write_rows(
        data["train"],
        ({data["text"]: text, data["label"]: ["bad", "good"][kind]} for text, kind in sentences(120)),
    )
    write_model(content["teacher"]["model"], "llama")
    write_model(content["student"]["model"], "distilbert", extra="shifted")
    record = run(content)
    assert record.taught == "the units with the highest scores, paired by similarity, by correlation"
    assert any(row["features_weighted"] for row in record.history if "loss" in row)
    student = AutoModelForSequenceClassification.from_pretrained(f"runs/{content['name']}/student")
    assert student.config.model_type == "distilbert"


def test_rows_without_labels_teach_beside_a_few_with_them() -> None:
    content = recipe_of("no_labels")
    names = content["data"]["label_names"]
    labelled, unlabelled = content["data"]["train"]
    for seed, path in enumerate((labelled, content["data"]["validation"], content["data"]["test"])):
        write_rows(path, ({"text": text, "label": names[kind]} for text, kind in sentences(40, seed)))
    write_rows(unlabelled, ({"text": text, "label": None} for text, _ in sentences(80, 7)))
    write_model("teacher", "bert")
    content["objective"]["task"]["weight"] = 0
    record = run({"name": "few", "teacher": {"model": "teacher"}, "student": {"hidden_size": 16}, **content})
    assert record.data.rows["train"] > 80
    terms = record.history[0].keys() & {f"{term}_weighted" for term in ("task", "logits", "features")}
    assert terms == {"logits_weighted", "features_weighted"}
