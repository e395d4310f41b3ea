"""Metrics of users: registered in Python, or named as code by a recipe that is allowed to run it."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import balanced_accuracy_score
from typer.testing import CliRunner

import flexkd
from flexkd.cli import app
from flexkd.core.losses.feature import FEATURE_LOSSES
from flexkd.data.sources.own_rows import OWN_ROWS
from flexkd.errors import ArtifactError, FlexKDError, RecipeError
from flexkd.facts.losses import FEATURE_LOSS_FACTS, FeatureLossFacts
from flexkd.facts.metrics import LOWER_IS_BETTER
from flexkd.facts.own_metrics import OWN_METRICS, declare_direction
from flexkd.facts.own_scores import OWN_SCORES
from flexkd.pipeline import distill as pipeline
from flexkd.preflight import preflight
from flexkd.preflight.comparison import cell_recipe, check_cell
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.fingerprints import selection_settings, training_settings
from flexkd.record import RunRecord
from flexkd.run_files import RECORD_FILE
from tests.evaluate.stored import stored_predictions
from tests.job_files import fixed_costs, job, text_job
from tests.source_tree import ROOT

FAST = {"teacher__fine_tune": None, "teacher__allow_weak": True}
CODE = """\
from pathlib import Path

Path("imported").touch()


def errors(labels, predictions):
    return (labels != predictions).sum()
"""


@pytest.fixture(autouse=True)
def _forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Metrics are those of one test; the working folder holds `my_metrics`."""
    lower, path = set(LOWER_IS_BETTER), list(sys.path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_metrics.py").write_text(CODE, encoding="utf-8")
    yield
    OWN_METRICS.clear()
    LOWER_IS_BETTER.clear()
    LOWER_IS_BETTER.update(lower)
    sys.path[:] = path
    sys.modules.pop("my_metrics", None)


def errors(labels: Any, predictions: Any) -> int:
    return int((labels != predictions).sum())


def test_a_registered_metric_chooses_the_checkpoint_and_stands_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_costs(monkeypatch)
    flexkd.register_metric("errors", errors, higher_is_better=False)
    recipe = job(tmp_path, **FAST, task__metric="errors", training__evaluations=3, training__learning_rate=0.01)
    assert recipe.task.higher_is_better is False
    record = pipeline.distill(recipe)
    student = stored_predictions(recipe.folder / "predictions.jsonl")["student"]
    wrong = int((student.logits.argmax(-1) != student.labels).sum())
    model = record.model("student")
    assert model is not None
    assert model.metrics["errors"] == wrong
    assert model.metrics["accuracy"] == pytest.approx(1 - wrong / len(student.labels))
    values = [entry["eval_errors"] for entry in record.evaluations]
    assert len(values) == 3
    # Of equal values the first is the best; the folder keeps its checkpoint beside the last.
    kept = {path.name for path in (recipe.folder / "checkpoints").glob("checkpoint-*")}
    assert f"checkpoint-{record.evaluations[values.index(min(values))]['step']}" in kept


def test_a_recipe_names_a_function_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_costs(monkeypatch)
    name = "sklearn.metrics:balanced_accuracy_score"
    plain = job(tmp_path, **FAST, training__max_steps=2, training__evaluations=1)
    path = tmp_path / "recipe.yaml"
    path.write_text(plain.to_yaml().replace("metric: accuracy", f"metric: {name}"), encoding="utf-8")
    result = CliRunner().invoke(app, ["distill", str(path), "--allow-code"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = RunRecord.read(plain.folder / RECORD_FILE)
    model = record.model("teacher")
    teacher = stored_predictions(plain.folder / "predictions.jsonl")["teacher"]
    assert model is not None
    assert model.metrics[name] == pytest.approx(
        balanced_accuracy_score(teacher.labels.numpy(), teacher.logits.argmax(-1).numpy())
    )
    assert any(note.startswith(f"this recipe runs code: task.metric: '{name}', of ") for note in record.notes)
    assert "this recipe runs code" in (plain.folder / "student" / "README.md").read_text(encoding="utf-8")


def test_a_function_that_changed_under_its_name_goes_on_with_nothing_that_it_made(tmp_path: Path) -> None:
    recipe = job(tmp_path, **FAST, task__metric="accuracy")
    plain, (_, settings) = training_settings(recipe), cell_recipe(recipe, 0, tmp_path)
    assert not any("(code)" in name for name in (*plain, *settings))
    flexkd.register_metric("errors", errors, higher_is_better=False)
    recipe = job(tmp_path, **FAST, task__metric="errors")
    first, (_, cell) = training_settings(recipe), cell_recipe(recipe, 0, tmp_path)
    check_cell(tmp_path / "cell.json", {"recipe": cell}, {"recipe": cell_recipe(recipe, 0, tmp_path)[1]})
    flexkd.register_metric("errors", lambda labels, predictions: int((labels != predictions).sum()) + 1)
    second, (_, changed) = training_settings(recipe), cell_recipe(recipe, 0, tmp_path)
    assert {name for name in first if first[name] != second[name]} == {"task.metric (code)"}
    with pytest.raises(ArtifactError, match=re.escape("(recipe.code.task.metric (code))")):
        check_cell(tmp_path / "cell.json", {"recipe": cell}, {"recipe": changed})


def test_losses_and_scores_of_users_are_told_apart_by_what_they_do(tmp_path: Path) -> None:
    facts = FeatureLossFacts(name="distance", pairs_units=True)
    losses = (lambda first, second: (first - second).abs().mean(), lambda first, second: (first - second).pow(2).mean())
    scores = (lambda gradients, states: gradients.abs(), lambda gradients, states: gradients.pow(2))
    settings: list[dict[str, str]] = []
    for loss, score in zip(losses, scores, strict=True):
        flexkd.register_loss(facts, loss)
        flexkd.register_score("power", score)
        try:
            recipe = job(tmp_path, **FAST, objective__features={"loss": "distance"}, scores__attribution="power")
            settings.append({**selection_settings(recipe), **training_settings(recipe)})
        finally:
            del FEATURE_LOSSES["distance"], FEATURE_LOSS_FACTS["distance"], OWN_SCORES["power"]
    assert {name for name in settings[0] if settings[0][name] != settings[1][name]} == {
        "objective.features.loss (code)",
        "scores.attribution (code)",
    }


def test_the_script_of_the_reference_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_costs(monkeypatch)
    job(tmp_path, **FAST)
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((tmp_path / "single_label.yaml").read_text(encoding="utf-8"))
    recipe["teacher"] = {**recipe["teacher"], "fine_tune": None, "allow_weak": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    text = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    try:
        exec(script, names)
    finally:
        for table, name in (
            (FEATURE_LOSSES, "distance"), (FEATURE_LOSS_FACTS, "distance"), (OWN_SCORES, "root"), (OWN_ROWS, "tickets"),
        ):  # fmt: skip
            table.pop(name, None)  # type: ignore[attr-defined]
    record = names["record"]
    student = record.model("student")
    assert (record.metric, student.metrics["right"]) == ("right", student.metrics["accuracy"])
    assert record.scores[0].attribution == "root"
    assert "distance" in record.choices


def test_a_function_has_the_same_hash_in_every_process() -> None:
    call = (
        "from flexkd.facts.user_code import function_hash as h; print(h(lambda row: row in {'a', 'b', 'c', 'd', 'e'}))"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", call], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(hashes) == 1


COMMANDS = ("check", "plan", "score", "distill", "cache", "generate", "compare", "tune", "sizes")


@pytest.mark.parametrize("command", [*COMMANDS, "evaluate"])
def test_no_command_runs_code_that_was_not_allowed(tmp_path: Path, command: str) -> None:
    job(tmp_path)
    arguments = [command, *(["teacher"] if command == "evaluate" else []), str(tmp_path / "single_label.yaml")]
    result = CliRunner().invoke(app, [*arguments, "task.metric=my_metrics:errors"])
    assert result.exit_code == 2
    assert (
        "task.metric: 'my_metrics:errors' is code on this machine, which a recipe does not run by itself. Read it, "
        "then allow it: --allow-code on the command line, load_recipe(..., allow_code=True) in Python."
    ) in result.output
    assert not (tmp_path / "imported").exists()


def test_check_lists_the_code_and_says_which_way_is_better(tmp_path: Path) -> None:
    job(tmp_path, **FAST)
    path = str(tmp_path / "single_label.yaml")
    values = ["task.metric=my_metrics:errors", "task.higher_is_better=false", "teacher.fine_tune=null"]
    result = CliRunner().invoke(app, ["check", path, *values, "--allow-code"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "note: this recipe runs code: task.metric: 'my_metrics:errors', of " in told
    assert "my_metrics:errors" in LOWER_IS_BETTER
    recipe = flexkd.load_recipe(path, values, allow_code=True)
    assert recipe.task.higher_is_better is False
    # A page that is drawn elsewhere knows it from the record alone.
    OWN_METRICS.clear()
    LOWER_IS_BETTER.discard("my_metrics:errors")
    declare_direction(recipe.model_dump())
    assert "my_metrics:errors" in LOWER_IS_BETTER


@pytest.mark.parametrize(
    ("metric", "begin"),
    [
        ("no_such_module:f", "task.metric: 'no_such_module:f' cannot be loaded (ModuleNotFoundError: No module named"),
        (
            "my_metrics:nothing",
            "task.metric: 'my_metrics:nothing' cannot be loaded (AttributeError: module 'my_metrics'",
        ),
        ("my_metrics:Path", ""),
        ("math:pi", "task.metric: 'math:pi' is 3.14"),
        (":f", "task.metric: ':f' cannot be loaded (ValueError"),
    ],
)
def test_code_that_cannot_be_loaded_is_a_mistake(tmp_path: Path, metric: str, begin: str) -> None:
    job(tmp_path)
    if begin:
        with pytest.raises(RecipeError, match="^" + re.escape(begin)):
            flexkd.load_recipe(tmp_path / "single_label.yaml", [f"task.metric={metric}"], allow_code=True)
    else:  # it can be called, and gives no number
        recipe = flexkd.load_recipe(tmp_path / "single_label.yaml", [f"task.metric={metric}"], allow_code=True)
        (problem,) = preflight(recipe).problems
        assert problem.startswith("task.metric: 'my_metrics:Path' raised TypeError")


def _only_both_classes(labels: Any, predictions: Any) -> float:
    assert len(set(predictions)) > 1, "one class is missing"
    return 1.0


@pytest.mark.parametrize(
    ("function", "begin"),
    [
        (lambda labels, predictions: labels + undefined, "task.metric: 'own' raised NameError (name 'undefined'"),
        (lambda labels: 1.0, "task.metric: 'own' raised TypeError ("),
        (lambda labels, predictions: math.nan, "task.metric: 'own' gives nan where all of "),
        (lambda labels, predictions: math.inf, "task.metric: 'own' gives inf where all of "),
        (
            lambda labels, predictions: "good",
            "task.metric: 'own' returned 'good', which is no number, when called with",
        ),
        (lambda labels, predictions: None, "task.metric: 'own' returned None, which is no number"),
        (lambda labels, predictions: True, "task.metric: 'own' returned True, which is no number"),
        (lambda labels, predictions: labels == predictions, "task.metric: 'own' returned array(["),
        (_only_both_classes, "task.metric: 'own' raised AssertionError (one class is missing"),
    ],
)
def test_a_metric_that_cannot_be_used_is_refused_before_the_first_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], begin: str
) -> None:
    flexkd.register_metric("own", function)
    recipe = job(tmp_path, **FAST, task__metric="own")
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a forward"))
    (problem,) = preflight(recipe).problems
    assert problem.startswith(begin)
    with pytest.raises(FlexKDError) as refused:
        pipeline.distill(recipe)
    assert str(refused.value) == problem


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(1), torch.tensor(0.25), np.array(2.0), 3])
def test_numbers_of_all_kinds_are_numbers(tmp_path: Path, value: Any) -> None:
    flexkd.register_metric("own", lambda labels, predictions: value)
    assert preflight(job(tmp_path, **FAST, task__metric="own")).problems == []


@pytest.mark.parametrize(("problem", "shape"), [("regression", 1), ("multi_label", 2)])
def test_other_problems_hand_over_numbers_and_flags(tmp_path: Path, problem: str, shape: int) -> None:
    """What a run hands over has the shape and the type of what the check does."""
    shapes: list[tuple[int, str, int]] = []

    def own(labels: Any, predictions: Any) -> float:
        assert labels.shape == predictions.shape
        shapes.append((labels.ndim, labels.dtype.kind, len(labels)))
        return float(np.abs(labels - predictions).mean())

    flexkd.register_metric("own", own, higher_is_better=False)
    short = {"epochs": 1, "evaluations": 1, "batch_size": 16}
    recipe = job(tmp_path, problem, teacher__fine_tune=short, teacher__allow_weak=True, task__metric="own")
    record = flexkd_evaluated(recipe)
    assert record["own"] is not None
    kinds = {(ndim, kind) for ndim, kind, _ in shapes}
    assert kinds == {(shape, "f" if problem == "regression" else "i")}


def flexkd_evaluated(recipe: Recipe) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        fixed_costs(patch)
        return dict(pipeline.evaluate("teacher", recipe).metrics)


def test_a_metric_of_texts_chooses_the_checkpoint_of_a_model_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_costs(monkeypatch)
    calls: list[tuple[list[list[str]], list[str]]] = []

    def words(references: list[list[str]], answers: list[str]) -> float:
        calls.append((references, answers))
        return sum(len(answer.split()) for answer in answers) / len(answers)

    flexkd.register_metric("words", words)
    recipe = text_job(
        tmp_path, **FAST, task__metric="words", generation__validation_rows=4, training__max_steps=2,
        training__early_stopping=None,
    )  # fmt: skip
    record = pipeline.distill(recipe)
    assert all("eval_words" in entry for entry in record.evaluations)
    model = record.model("student")
    assert model is not None
    references, answers = calls[-2]
    assert all(isinstance(text, str) for text in [*answers, *(text for row in references for text in row)])
    assert model.metrics["words"] is not None
    nothing = override_recipe(recipe, ["generation.validation_rows=null"])
    assert nothing.task.metric == "words"


@pytest.mark.parametrize("name", ["accuracy", "loss", "kl", "a b", "a:b", ""])
def test_names_that_are_taken_or_none_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"^register_metric: '.*' is .*\. Choose another name\.$"):
        flexkd.register_metric(name, errors)


def test_the_direction_of_a_known_metric_is_not_said_again(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=re.escape("task.higher_is_better: false is said of accuracy, whose direction")
    ):
        job(tmp_path, task__higher_is_better=False)
    with pytest.raises(RecipeError, match=re.escape("register_metric: 3 cannot be called")):
        flexkd.register_metric("three", 3)  # type: ignore[arg-type]
