"""T5 and BART as classifiers in a recipe: they teach and learn by name, and what they cannot do is refused before."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from flexkd.errors import DataError, UnsupportedModelError
from flexkd.evaluate.cost import Cost
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline.job import prepare
from flexkd.preflight import checking, preflight
from flexkd.preflight.tokenization import row_end_errors
from flexkd.recipe import Recipe
from flexkd.tasks import classification, classifiers
from tests.job_files import job, write_tokenizer
from tests.tiny import tiny_model

SHORT: dict[str, Any] = {
    "teacher__fine_tune": None,
    "training__max_steps": 1,
    "training__evaluations": 1,
    "training__precision": "float32",
    "teacher__precision": "float32",
}
BY_CONFIG: dict[str, Any] = {"student__start": "config", "student__hidden_size": None}


def recipe_of(folder: Path, kind: str, **changes: Any) -> Recipe:
    teacher = folder / "teacher"
    if not teacher.exists():
        # Without names of its own, a BART of two labels comes back from transformers as one of three.
        names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
        tiny_model(kind, seed=3, num_labels=2, **names).save_pretrained(teacher)
        write_tokenizer(teacher)
    return job(folder, **{**SHORT, **changes})


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))
    fixed = Cost(1000, 4000, 50.0, 10**6, "cpu")
    monkeypatch.setattr(classification, "measure_costs", lambda folders, *_, **__: [fixed] * len(folders))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_R11_an_encoder_decoder_teaches_another_one_to_classify(kind: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, kind, **BY_CONFIG, student__model=str(tmp_path / "teacher"))
    assert preflight(recipe).problems == []
    record = pipeline.distill(recipe)
    assert [(model.role, model.num_layers) for model in record.models if model.role != "baseline"] == [
        ("teacher", 4), ("student_before", 2), ("student", 2)
    ]  # fmt: skip
    assert pipeline.evaluate("student", recipe).metrics["accuracy"] == record.models[2].metrics["accuracy"]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_R11_check_and_run_refuse_to_cut_one_and_their_advice_works(kind: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, kind)
    (problem,) = preflight(recipe).problems
    assert problem.startswith(f"teacher.model: no classifier can be cut out of a '{kind}' model. Known: ")
    assert problem.endswith("Use student.start: pretrained or config.")
    with pytest.raises(UnsupportedModelError, match="no classifier can be cut"):
        prepare(recipe)
    for start in (BY_CONFIG, {**BY_CONFIG, "student__start": "pretrained", "student__num_layers": None}):
        assert preflight(recipe_of(tmp_path, kind, **start, student__model=str(tmp_path / "teacher"))).problems == []


@pytest.mark.parametrize("text", [None, "[SEP] bright"])
def test_R11_rows_without_an_end_are_refused_by_check_and_before_the_teacher_is_loaded(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, "t5", **BY_CONFIG, student__model=str(tmp_path / "teacher"))
    config = tmp_path / "teacher" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text(encoding="utf-8")), "eos_token_id": 2}), encoding="utf-8"
    )
    file = tmp_path / "teacher" / "tokenizer.json"
    if text is None:
        content = json.loads(Tokenizer.from_file(str(file)).to_str())
        content["post_processor"] = None
        file.write_text(json.dumps(content), encoding="utf-8")
        said = "120 of 120 rows hold none"
    else:
        rows = tmp_path / "single_label.jsonl"
        rows.write_text(rows.read_text(encoding="utf-8").replace('"text": "', f'"text": "{text} ', 1), encoding="utf-8")
        said = "of which all rows must hold as many: 1 of 120 rows do not hold 1 (first"
    problems = preflight(recipe).problems
    assert len(problems) == 2
    assert all(said in problem for problem in problems)
    monkeypatch.setattr(classifiers, "classifying_teacher", lambda *_, **__: pytest.fail("the teacher was loaded"))
    with pytest.raises((DataError, ValueError), match="its head reads each row at the last end of text"):
        prepare(recipe)
    # What is on the hub is not seen by check, and refused by the run in the same words.
    unseen = tuple(check for check in checking.CHECKS if check is not row_end_errors)
    monkeypatch.setattr(checking, "CHECKS", unseen)
    with pytest.raises(DataError, match=f"^teacher: .*{said.split(' (')[0].split(' of 120')[0]}"):
        prepare(recipe)
