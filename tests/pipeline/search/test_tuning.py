"""`flexkd tune`: equal trials for all methods, no test row read, and nothing lost when it is interrupted."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState
from typer.testing import CliRunner

import flexkd
import flexkd.pipeline.search.trials
import flexkd.pipeline.search.tuning
from flexkd.cli import app
from flexkd.errors import ArtifactError, RecipeError, TrainingError
from flexkd.pipeline.compare import compare
from flexkd.pipeline.comparison import Comparison
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.search.tuning import tune
from flexkd.preflight import preflight
from flexkd.recipe import Recipe
from flexkd.run_files import REPORT_FILE
from flexkd.tuning_record import MethodTuning, TuningRecord
from tests.job_files import count_optimizer_steps, job

RANGE = {"training.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}
METHODS = ["fine_tuning", "flexkd"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tuning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        yield folder


def quick(material: Path, name: str, *, steps: int = 3, **compare_keys: Any) -> Recipe:
    section = {"methods": METHODS, "seeds": [0, 1], "search": RANGE, **compare_keys}
    plain = {"teacher__fine_tune": None, "training__precision": "float32", "teacher__precision": "float32"}
    lengths = {"training__max_steps": steps, "training__evaluations": steps}
    return job(material, output=str(material / name), compare=section, **plain, **lengths)


def what_came_out(record: TuningRecord) -> list[list[Any]]:
    """Everything about all trials but their time."""
    return [
        [
            (trial.values, trial.state, trial.value, trial.steps, trial.values_by_step, trial.message)
            for trial in method.trials
        ]
        for method in record.methods
    ]


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test rows that are an error when they are read."""

    def refuse(*_: Any) -> None:
        raise AssertionError("test rows are read")

    monkeypatch.setattr(Job, "predict", refuse)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each step of an optimizer."""
    return count_optimizer_steps(monkeypatch)


def test_a_tuned_student_is_trained_once_and_no_test_row_is_read_before(
    material: Path, steps: list[int], unread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick(material, "once", steps=2, trials=2, methods=["fine_tuning"])
    plain_step = torch.optim.AdamW.step

    def interrupted(*args: Any, **options: Any) -> Any:
        if len(steps) == 3:
            raise KeyboardInterrupt
        return plain_step(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(recipe)
    assert not (material / "once" / "tune.json").exists()
    whole = tune(recipe)
    assert len(steps) == 2 * 2, "the second trial goes on from its first step"
    (method,) = whole.methods
    assert TuningRecord.read(material / "once" / "tune.json") == whole
    assert [len(trial.values_by_step) for trial in method.trials] == [2, 2]
    assert method.best is not None
    best = method.trials[method.best]
    assert best.value == max(float(trial.value or 0) for trial in method.trials)
    assert best.values == method.chosen
    assert what_came_out(tune(recipe)) == what_came_out(whole)
    assert len(steps) == 2 * 2, "finished trials are read"
    monkeypatch.undo()
    monkeypatch.setenv("FLEXKD_HOME", str(material / "home"))
    trained = []
    plain = torch.optim.AdamW.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *args, **options: (trained.append(1), plain(*args, **options)))
        record = compare(recipe, tuned=True)
    assert len(trained) == 2, "the student of the second seed; that of the first is the one of the search"
    first = json.loads((material / "once" / "cells" / "fine_tuning-0" / "cell.json").read_text("utf-8"))
    assert first["metrics"]["validation_accuracy"] == best.value
    assert first["made_of"]["recipe"]["training"]["learning_rate"] == method.chosen["training.learning_rate"]
    assert record.cells[0].seconds >= best.seconds
    assert set(whole.notes) <= set(record.notes)
    assert preflight(recipe).problems == []


class Interruptions:
    """Raises a KeyboardInterrupt at every `every`-th evaluation."""

    def __init__(self, every: int):
        self.every = every
        self.count = 0

    def pass_by(self) -> None:
        self.count += 1
        if self.count % self.every == 0:
            raise KeyboardInterrupt


def made_up_training(
    monkeypatch: pytest.MonkeyPatch, curve: Callable[[Recipe, int], float], interruptions: Interruptions | None = None
) -> list[tuple[str, int]]:
    """Students whose accuracy at each step is made up; what they logged is their checkpoint. Lists all steps."""
    trained: list[tuple[str, int]] = []

    def student(job: Any, recipe: Any, folder: Path, *, callbacks: Any) -> tuple[None, Any]:
        checkpoint = folder / "checkpoints" / "log.json"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = TrainerState(max_steps=recipe.training.max_steps)
        if checkpoint.is_file():
            state.log_history = json.loads(checkpoint.read_text("utf-8"))
            state.global_step = len(state.log_history)
        for callback in callbacks:
            callback.on_train_begin(None, state, None)
        for step in range(state.global_step + 1, state.max_steps + 1):
            trained.append((f"{folder.parent.name} {folder.name}", step))
            state.log_history.append({"step": step, "eval_accuracy": curve(recipe, step)})
            state.global_step = step
            # There before anything is decided on the evaluation, which is the hardest moment to be killed.
            checkpoint.write_text(json.dumps(state.log_history), encoding="utf-8")
            if interruptions:
                interruptions.pass_by()
            for callback in callbacks:
                callback.on_evaluate(None, state, None)
        return None, state.log_history

    monkeypatch.setattr(flexkd.pipeline.search.trials, "train_student", student)
    monkeypatch.setattr(flexkd.pipeline.search.tuning, "share_answers", lambda *_: None)
    monkeypatch.setattr(flexkd.pipeline.search.tuning, "prepare_comparison", one_teacher)
    return trained


@cache
def teacher_of(rows: str) -> Job:
    """The teacher of all made-up trainings on these rows, loaded once."""
    return prepare(quick(Path(rows).parent, "teacher"))


def one_teacher(recipe: Recipe, variants: dict[str, Recipe], seeds: Sequence[int], **_: Any) -> Comparison:
    return Comparison(replace(teacher_of(recipe.data.train), recipe=recipe), variants, list(seeds))


def near_one_thousandth(recipe: Recipe, step: int) -> float:
    rate = recipe.training.learning_rate
    return step / (10 + abs(rate - 1e-3) * 1e4)


def test_a_search_that_is_interrupted_at_every_point_ends_as_one_that_is_not(
    material: Path, monkeypatch: pytest.MonkeyPatch, unread: None
) -> None:
    whole_steps = made_up_training(monkeypatch, near_one_thousandth)
    whole = tune(quick(material, "whole", trials=8, methods=["flexkd"]))
    states = [trial.state for method in whole.methods for trial in method.trials]
    assert {"complete", "pruned"} == set(states)
    interruptions = Interruptions(5)
    steps = made_up_training(monkeypatch, near_one_thousandth, interruptions)
    recipe, ended = quick(material, "interrupted", trials=8, methods=["flexkd"]), None
    while ended is None:
        try:
            ended = tune(recipe)
        except KeyboardInterrupt:
            assert interruptions.count < 200
    assert what_came_out(ended) == what_came_out(whole)
    assert steps == whole_steps, "no step is taken twice, and none after the end of a trial"


def test_the_budget_is_equal_and_what_was_stopped_is_said(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_training(monkeypatch, lambda recipe, step: step * recipe.training.learning_rate)
    recipe = quick(material, "edge", trials=9)
    (material / "edge.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    result = CliRunner().invoke(app, ["tune", str(material / "edge.yaml")], catch_exceptions=False)
    assert result.exit_code == 0
    record = TuningRecord.read(material / "edge" / "tune.json")
    for method in record.methods:
        steps = sum(trial.steps for trial in method.trials)
        pruned = sum(trial.state == "pruned" for trial in method.trials)
        assert method.budget == f"9 trials, {pruned} pruned, {steps} steps in all"
        assert steps < 9 * 3
        assert method.chosen["training.learning_rate"] == max(
            trial.values["training.learning_rate"] for trial in method.trials if trial.state == "complete"
        )
        (edge,) = method.edges
        assert "is at the upper end of its range: widen it in compare.search" in edge
        assert f"{method.method}: edge: {edge}" in record.notes
    printed = " ".join(result.stdout.split())
    assert f"values: {material / 'edge' / 'tune.json'}" in printed
    assert all(note in printed for note in record.notes)
    assert re.search(rf"flexkd +9 +{pruned} +0 +{steps} ", printed)
    folders = sorted(path.parent.name for path in (material / "edge" / "search" / "flexkd").glob("*/checkpoints"))
    assert folders == [str(record.methods[1].best)], "only the best student is kept"


def test_a_student_that_fails_is_not_chosen(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = [1e-3]

    def curve(recipe: Recipe, step: int) -> float:
        if recipe.training.learning_rate > limit[0]:
            raise TrainingError("the loss is not finite")
        return recipe.training.learning_rate

    made_up_training(monkeypatch, curve)
    search = {"training.learning_rate": [1e-4, 1e-2]}
    (method,) = tune(quick(material, "failing", methods=["flexkd"], search=search)).methods
    assert [(trial.state, trial.message) for trial in method.trials] == [
        ("complete", ""),
        ("failed", "the loss is not finite"),
    ]
    assert method.chosen == {"training.learning_rate": 1e-4}
    assert method.budget == "2 trials, 1 failed, 3 steps in all"
    limit[0] = 0
    with pytest.raises(TrainingError, match=r"flexkd: none of 2 trials came to its end\. The first: the loss is not"):
        tune(quick(material, "all failing", methods=["flexkd"], search=search))


def test_tuned_values_are_those_of_this_recipe_and_of_every_method(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_training(monkeypatch, near_one_thousandth)
    recipe = quick(material, "belongs", trials=2)
    with pytest.raises(ArtifactError, match=r"--tuned: there is no .*tune\.json\. Run flexkd tune"):
        compare(recipe, tuned=True)
    tune(recipe, methods=["flexkd"])
    monkeypatch.setattr("flexkd.pipeline.compare.prepare_comparison", lambda *_, **__: pytest.fail("teacher loaded"))
    with pytest.raises(ArtifactError, match=r"holds no values for fine_tuning\. Run flexkd tune with --methods fin"):
        compare(recipe, tuned=True)
    tune(recipe, methods=["fine_tuning"])
    longer = quick(material, "belongs", trials=2, steps=4)
    with pytest.raises(ArtifactError, match=r"tune\.json: was made by another recipe or teacher .*training\.max_steps"):
        compare(longer, tuned=True)
    monkeypatch.undo()
    monkeypatch.setenv("FLEXKD_HOME", str(material / "home"))
    stored = TuningRecord.read(material / "belongs" / "tune.json")
    assert [method.method for method in stored.methods] == ["fine_tuning", "flexkd"]
    for method in stored.methods:
        method.made_of["teacher"] = "another"
    stored.write(material / "belongs" / "tune.json")
    with pytest.raises(ArtifactError, match=r"tune\.json: was made by another recipe or teacher \(teacher\)"):
        compare(recipe, tuned=True)


def test_finished_trials_belong_to_a_wider_space_and_to_no_narrower_one(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = made_up_training(monkeypatch, near_one_thousandth)
    before = tune(quick(material, "widened", trials=3, methods=["flexkd"]))
    trained.clear()
    wider = {"training.learning_rate": {"low": 1e-6, "high": 1e-1, "log": True}}
    after = tune(quick(material, "widened", trials=5, methods=["flexkd"], search=wider))
    assert what_came_out(after)[0][:3] == what_came_out(before)[0]
    assert {name for name, _ in trained} == {"flexkd 3", "flexkd 4"}
    narrow = {"training.learning_rate": {"low": 1e-7, "high": 2e-7}}
    with pytest.raises(ArtifactError, match=r"which compare\.search does not hold now\. Widen it so that it does"):
        tune(quick(material, "widened", trials=5, methods=["flexkd"], search=narrow))


def test_the_search_of_an_earlier_version_is_read(
    material: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    """It left a finished cell for each combination."""
    recipe = quick(
        material, "earlier", steps=1, search={"training.learning_rate": [1e-4, 1e-3]}, methods=["fine_tuning"]
    )
    compare(recipe)
    folder = material / "earlier"
    for index in range(2):
        trial = json.loads((folder / "search" / "fine_tuning" / str(index) / "trial.json").read_text("utf-8"))
        cell = {name: trial[name] for name in ("made_of", "engine", "seconds", "steps")}
        cell["metrics"] = {"accuracy": index / 2, "validation_accuracy": index / 2}
        (folder / "search" / "fine_tuning" / str(index) / "trial.json").unlink()
        (folder / "search" / "fine_tuning" / str(index) / "cell.json").write_text(json.dumps(cell))
    shutil.rmtree(folder / "cells")
    steps.clear()
    record = compare(recipe)
    assert len(steps) == 1, "the second seed"
    assert record.cells[0].metrics["accuracy"] == 0.5
    assert "fine_tuning: training.learning_rate = 0.001, chosen of" in " ".join(record.notes)


def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexkd import packages

    plain = packages.importlib.util.find_spec
    monkeypatch.setattr(
        packages.importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else plain(name, *rest)
    )
    message = "compare.search: a search that draws values or stops trials needs the package 'optuna'. Run: pip install"
    assert [problem.startswith(message) for problem in preflight(quick(material, "missing")).problems] == [True]
    grid = quick(material, "missing", search={"training.learning_rate": [1e-4, 1e-3]})
    assert preflight(grid).problems == []
    with pytest.raises(packages.MissingDependencyError, match=r"pip install 'flexkd\[tune\]'"):
        tune(quick(material, "missing", search={}))


def test_the_default_space_is_tuned_without_a_word_in_the_recipe(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_training(monkeypatch, near_one_thousandth)
    record = tune(quick(material, "default", search={}, trials=2))
    chosen: dict[str, MethodTuning] = {method.method: method for method in record.methods}
    assert set(chosen["fine_tuning"].chosen) == {"training.learning_rate"}
    assert chosen["flexkd"].trials[0].values == {
        "training.learning_rate": 5e-4,
        "objective.features.weight": 1.0,
        "objective.logits.temperature": 2.0,
    }


def test_a_script_tunes_and_compares_by_the_names_of_the_package(material: Path) -> None:
    plain = {"teacher__fine_tune": None, "training__precision": "float32", "teacher__precision": "float32"}
    recipe = job(material, output=str(material / "script"), training__max_steps=1, training__evaluations=1, **plain)
    rates = [1e-4, 1e-3]
    record = flexkd.tune(recipe, methods=METHODS, search={"training.learning_rate": rates}, trials=1)
    assert record == TuningRecord.read(material / "script" / "tune.json")
    assert [(method.method, len(method.trials)) for method in record.methods] == [(name, 1) for name in METHODS]
    chosen = [method.chosen["training.learning_rate"] for method in record.methods]
    assert set(chosen) <= set(rates)
    compared = flexkd.compare(recipe, methods=METHODS, seeds=(0, 1), tuned=True)
    assert (recipe.folder / REPORT_FILE).is_file(), "the command leaves a page, Python does not"
    assert len(compared.cells) == 4
    for name, rate in zip(METHODS, chosen, strict=True):
        cell = json.loads((material / "script" / "cells" / f"{name}-1" / "cell.json").read_text("utf-8"))
        assert cell["made_of"]["recipe"]["training"]["learning_rate"] == rate
    for wrong, message in (
        ({"trials": 0}, r"compare\.trials"),
        ({"search": {"training.learnin_rate": rates}}, r"Did you mean 'training\.learning_rate'\?"),
        ({"search": {"training.learning_rate": {"low": 1.0}}}, r"compare\.search.*high"),
    ):
        with pytest.raises(RecipeError, match=message):
            flexkd.tune(recipe, methods=METHODS, **wrong)  # type: ignore[arg-type]
