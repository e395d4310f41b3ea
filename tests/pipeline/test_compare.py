"""Comparisons: fair cells, kept when finished, and paired statistics that agree with a second derivation."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import flexkd.pipeline.compare
import flexkd.pipeline.search.trials
from flexkd.compare_record import CompareCell, CompareRecord
from flexkd.core.objective import Objective
from flexkd.errors import ArtifactError, RecipeError
from flexkd.facts.methods import METHODS as METHODS_OF_RECIPES
from flexkd.pipeline.compare import compare
from flexkd.pipeline.run import Run
from flexkd.pipeline.start import Start
from flexkd.preflight import preflight
from flexkd.preflight.comparison import comparison_errors
from flexkd.preflight.inputs import read_inputs
from flexkd.recipe import load_recipe, override_recipe
from flexkd.training import time_limit
from flexkd.training.trainer import DistillationTrainer
from tests.job_files import count_optimizer_steps, job, write_tokenizer
from tests.tiny import tiny_model
from tests.training.processes import start_process

METHODS = ("fine_tuning", "flexkd")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        yield folder


def test_R09_cells_share_start_and_order_and_finished_ones_are_kept_unless_of_another_engine(material: Path) -> None:
    starts: dict[str, Tensor] = {}
    seen: list[str] = []
    plain = Run.train

    def watched(self: Run, start: Start, objective: Objective, **options: Any) -> object:
        name = self.folder.name
        seen.append(name)
        starts[name] = start.student.bert.embeddings.word_embeddings.weight.detach().clone()
        return plain(self, start, objective, **options)

    few = {"student__calibration_rows": 8, "scores__rows": 8}
    recipe = job(material, output=str(material / "cells"), teacher__fine_tune__epochs=2, **few)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "train", watched)
        record = compare(recipe, methods=METHODS, seeds=(0, 1))
        assert seen == ["fine_tuning-0", "flexkd-0", "fine_tuning-1", "flexkd-1"]
        for seed in (0, 1):
            assert starts[f"fine_tuning-{seed}"].equal(starts[f"flexkd-{seed}"])
        assert not starts["flexkd-0"].equal(starts["flexkd-1"]), "other rows are scored, so that other units are best"
        (material / "cells" / "cells" / "flexkd-1" / "cell.json").unlink()
        seen.clear()
        again = compare(recipe, methods=METHODS, seeds=(0, 1))
    assert seen == ["flexkd-1"]
    assert again.paired == record.paired
    assert CompareRecord.read(material / "cells" / "compare.json").paired == again.paired
    assert record.reference == "fine_tuning"
    # Every evaluation of every cell, the same after it was read from disk.
    assert [cell.evaluations for cell in again.cells] == [cell.evaluations for cell in record.cells]
    for cell in record.cells:
        best = max(entry["eval_accuracy"] for entry in cell.evaluations)
        assert best == cell.metrics["validation_accuracy"]
        assert {"step", "eval_loss", "eval_nll", "eval_task_raw"} <= cell.evaluations[-1].keys()
        assert not any("second" in name for name in cell.evaluations[-1])
    # What each model says about each test row, the teacher once.
    cells = [f"{method}-{seed}" for method in METHODS for seed in (0, 1)]
    files = {cell: f"{cell}/predictions.jsonl" for cell in cells} | {"the teacher": "predictions.jsonl"}
    said = {name: (material / "cells" / "cells" / file).read_text("utf-8").splitlines() for name, file in files.items()}
    ids = [[json.loads(line)["id"] for line in lines] for lines in said.values()]
    assert all(of_model == ids[0] for of_model in ids)
    assert json.loads(said["the teacher"][0])["logits"].keys() == {"teacher", "most_frequent_class"}
    (rows,) = record.row_contrasts
    assert again.row_contrasts == [rows]
    accuracies = {method: [c.metrics["accuracy"] for c in record.cells if c.method == method] for method in METHODS}
    assert rows.difference == pytest.approx(fmean(accuracies["flexkd"]) - fmean(accuracies["fine_tuning"]))
    assert (rows.better - rows.worse) / rows.rows == pytest.approx(rows.difference)
    assert [(cell.method, cell.seed) for cell in record.cells] == [(m, s) for s in (0, 1) for m in METHODS]
    with pytest.raises(ArtifactError, match=r"was made by another recipe or teacher \(recipe\.training\.max_steps\)"):
        compare(override_recipe(recipe, ["training.max_steps=4"]), methods=METHODS, seeds=(0, 1))
    finished = material / "cells" / "cells" / "flexkd-1" / "cell.json"
    stored = json.loads(finished.read_text("utf-8"))
    # An earlier version knew fewer keys, and skipped any number of bad rows.
    for section, key in (("student", "save_dtype"), ("data", "markup"), ("data", "date")):
        del stored["made_of"]["recipe"][section][key]
    stored["made_of"]["recipe"]["data"]["bad_rows"] = "skip"
    finished.write_text(json.dumps(stored))
    assert compare(recipe, methods=METHODS, seeds=(0, 1)).paired == record.paired
    _check_shared_starts(recipe, material / "cells" / "cells")
    stored["engine"]["student_precision"] = "float64"
    finished.write_text(json.dumps(stored))
    with pytest.raises(
        ArtifactError, match=r"flexkd-1.*cell\.json: belongs to another run: student_precision was 'float64'"
    ):
        compare(recipe, methods=METHODS, seeds=(0, 1))


def _check_shared_starts(recipe: Any, cells: Path) -> None:
    """Students of an earlier version had one start: a comparison goes on with them as it began, or refuses to mix."""
    before = {file: file.read_text("utf-8") for file in cells.glob("*/cell.json")}
    with pytest.raises(ArtifactError, match=r"another recipe or teacher \(recipe\.student\.start_seed\)"):
        compare(override_recipe(recipe, ["compare={starts: shared}"]), methods=METHODS, seeds=(0, 1))
    for file, text in before.items():
        earlier = json.loads(text)
        del earlier["made_of"]["recipe"]["student"]["start_seed"]
        file.write_text(json.dumps(earlier))
    record = compare(recipe, methods=METHODS, seeds=(0, 1))
    assert any(note.startswith("compare.starts: shared: all seeds have the same") for note in record.notes)
    with pytest.raises(ArtifactError, match=r"another recipe or teacher \(recipe\.student\.start_seed\)"):
        compare(override_recipe(recipe, ["compare={starts: by_seed}"]), methods=METHODS, seeds=(0, 1))
    for file, text in before.items():
        file.write_text(text)


def test_the_search_gives_every_method_the_same_values_and_chooses_by_validation(material: Path) -> None:
    recipe = job(material, output=str(material / "searched"), training__max_steps=2, teacher__fine_tune__epochs=2)
    grid = {"training.learning_rate": [1e-9, 3e-3]}
    record = compare(recipe, methods=METHODS, seeds=(0, 1), search=grid)
    for method in METHODS:
        found = [
            json.loads((material / "searched" / "search" / method / str(index) / "trial.json").read_text("utf-8"))
            for index in range(2)
        ]
        best = max(found, key=lambda trial: trial["value"])
        rate = best["made_of"]["recipe"]["training"]["learning_rate"]
        assert f"{method}: training.learning_rate = {rate}" in " ".join(record.notes)


def test_what_cannot_be_compared_is_refused_by_name(material: Path) -> None:
    recipe = job(material)
    with pytest.raises(RecipeError, match="Did you mean 'flexkd'"):
        compare(recipe, methods=("flexkdd", "cka"), seeds=(0, 1))
    with pytest.raises(RecipeError, match="cannot be compared in pairs"):
        compare(recipe, methods=METHODS, seeds=(3,))


def quick(material: Path, name: str, **changes: Any) -> Any:
    """A comparison whose teacher is as it is and whose numbers are float32."""
    plain = {"output": str(material / name), "teacher__fine_tune": None, "training__max_steps": 6}
    precision = {"training__precision": "float32", "teacher__precision": "float32"}
    return job(material, **{**plain, **precision, **changes})


def cell_of(material: Path, name: str, method: str, seed: int) -> Any:
    return json.loads((material / name / "cells" / f"{method}-{seed}" / "cell.json").read_text("utf-8"))


def test_E07_cells_of_a_seed_see_one_order_and_hang_on_no_other_cell(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell trained alone, after the others were there, has the same numbers to the last digit."""
    orders: list[list[str]] = []
    plain_train, plain_loss = Run.train, DistillationTrainer.compute_loss

    def started(*args: Any, **options: Any) -> Any:
        orders.append([])
        return plain_train(*args, **options)

    def watched(self: DistillationTrainer, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        if model.training:
            orders[-1].extend(inputs["example_id"])
        return plain_loss(self, model, inputs, *args, **options)

    monkeypatch.setattr(Run, "train", started)
    monkeypatch.setattr(DistillationTrainer, "compute_loss", watched)
    recipe = quick(material, "cells-of-a-seed")
    compare(recipe, methods=METHODS, seeds=(0, 1))
    assert len(orders[0]) == len(set(orders[0])) + 16, "a whole epoch, and a step"
    assert orders[0] == orders[1] != orders[2]
    assert orders[2] == orders[3]
    before = cell_of(material, "cells-of-a-seed", "flexkd", 1)
    shutil.rmtree(material / "cells-of-a-seed" / "cells" / "flexkd-1")
    compare(recipe, methods=METHODS, seeds=(0, 1))
    after = cell_of(material, "cells-of-a-seed", "flexkd", 1)
    assert orders[4] == orders[3]
    assert after["metrics"] == before["metrics"]
    assert after["made_of"] == before["made_of"]


def test_a_metric_that_is_never_defined_ends_a_comparison_in_nulls(material: Path) -> None:
    """A student that says one class for all rows has no Matthews correlation; this was an error after training."""
    sure = tiny_model("bert", seed=3, num_labels=2)
    with torch.no_grad():
        sure.classifier.bias.copy_(torch.tensor([50.0, -50.0]))
    sure.save_pretrained(material / "sure")
    write_tokenizer(material / "sure")
    changes = {
        "teacher__model": str(material / "sure"),
        "task__metric": "matthews_correlation",
        "training__max_steps": 1,
        "scores__target": "logit",
    }
    record = compare(quick(material, "undefined", **changes), methods=("logit_kd", "flexkd"), seeds=(0, 1))
    assert all(cell.metrics["matthews_correlation"] is None for cell in record.cells)
    assert cell_of(material, "undefined", "flexkd", 0)["metrics"]["validation_matthews_correlation"] is None
    assert all(row.mean is None and row.p_value is None for row in record.paired)


def test_contrasts_of_the_recipe_are_judged_and_checked_before_a_run(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ["fine_tuning", "logit_kd", "flexkd"]
    values = {"fine_tuning": 0.6, "logit_kd": 0.7, "flexkd": 0.72}

    def cell(job: Any, teacher: Any, recipe: Any, method: str, seed: int, folder: Path, **_: Any) -> CompareCell:
        return CompareCell(method, seed, {"accuracy": values[method] + 0.01 * seed * len(method)}, 1.0)

    monkeypatch.setattr(flexkd.pipeline.compare, "run_cell", cell)
    monkeypatch.setattr(flexkd.pipeline.compare, "share_answers", lambda *_: None)
    plain = compare(quick(material, "unnamed"), methods=methods, seeds=(0, 1, 2))
    assert [contrast.name for contrast in plain.contrasts] == [
        "logit_kd against fine_tuning",
        "flexkd against fine_tuning",
    ]
    pairs = [["flexkd", "logit_kd"], ["logit_kd", "fine_tuning"], ["flexkd", "fine_tuning"]]
    named = quick(material, "named", compare={"methods": methods, "contrasts": pairs})
    assert not list(comparison_errors(read_inputs(named, [])))
    record = compare(named)
    assert [[contrast.method, contrast.reference] for contrast in record.contrasts] == pairs
    assert record.contrasts[0].difference == pytest.approx(0.02 - 0.01 * 2)
    assert (record.smallest_p_value, record.fewest_seeds, record.level) == (0.25, 7, 0.05)
    assert [row.p_value for row in record.contrasts[2:]] == [row.p_value for row in record.paired[2:]]
    assert CompareRecord.read(material / "named" / "compare.json") == record
    assert not record.named_after_results
    fewer = quick(material, "named", compare={"methods": methods, "contrasts": pairs[:1]})
    assert [compare(fewer).named_after_results for _ in range(2)] == [True, True], "now named, but after the results"
    assert not compare(named).named_after_results
    changed = [compare(named, seeds=seeds) for seeds in ((0, 1, 3, 4), (0, 1, 2))]
    assert [(again.late_seeds, again.left_out_seeds) for again in changed] == [([3, 4], [2]), ([], [])]
    assert CompareRecord.read(material / "named" / "compare.json") == changed[-1]
    reversed_pairs = [["flexkd", "logit_kd"], ["logit_kd", "flexkd"]]
    for wrong, message in (
        ([["flexkd", "cka"]], "compare.contrasts: unknown method of this comparison 'cka'. Known: fine_tuning, "),
        ([["flexkd", "flexkd"]], "compare.contrasts: ['flexkd', 'flexkd'] is one method"),
        (reversed_pairs, "compare.contrasts: [['flexkd', 'logit_kd'], ['logit_kd', 'flexkd']] names two methods twice"),
    ):
        recipe = quick(material, "wrong", compare={"methods": methods, "contrasts": wrong})
        assert [str(error).startswith(message) for error in comparison_errors(read_inputs(recipe, []))] == [True]
        with pytest.raises(RecipeError, match=re.escape(message)):
            compare(recipe)


def recorded_cells(monkeypatch: pytest.MonkeyPatch, values: Mapping[float, float] | None = None) -> dict[Path, Any]:
    """The recipes of all cells and trials by their folder; nothing is trained.

    Args:
        values: Learning rate -> validation accuracy of a trial; None: all are equally good.
    """
    recipes: dict[Path, Any] = {}

    def cell(job: Any, teacher: Any, recipe: Any, method: str, seed: int, folder: Path, **_: Any) -> CompareCell:
        recipes[folder] = recipe
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cell.json").write_text("{}")
        return CompareCell(method, seed, {"accuracy": 0.5}, 1.0)

    def student(job: Any, recipe: Any, folder: Path, **_: Any) -> tuple[None, list[dict[str, Any]]]:
        recipes[folder] = recipe
        return None, [{"step": 1, "eval_accuracy": values[recipe.training.learning_rate] if values else 0.5}]

    monkeypatch.setattr(flexkd.pipeline.compare, "run_cell", cell)
    monkeypatch.setattr(flexkd.pipeline.search.trials, "train_student", student)
    monkeypatch.setattr(flexkd.pipeline.compare, "share_answers", lambda *_: None)
    return recipes


def test_a_search_does_not_open_what_a_method_does_without(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set below a section that is null, a key would turn plain fine-tuning and logit_kd into flexkd."""
    recipes = recorded_cells(monkeypatch)
    grid = {"objective.features.weight": [0.5, 2.0], "objective.logits.temperature": [1.0, 4.0]}
    methods = ("fine_tuning", "logit_kd", "flexkd")
    record = compare(quick(material, "sections"), methods=methods, seeds=(0, 1), search=grid)
    tried = [folder.parent.name for folder in recipes if folder.parents[1].name == "search"]
    assert {method: tried.count(method) for method in methods} == {"fine_tuning": 0, "logit_kd": 2, "flexkd": 4}
    for folder, recipe in recipes.items():
        method = folder.name.partition("-")[0] if folder.parent.name == "cells" else folder.parent.name
        assert (recipe.objective.features is None) == (method != "flexkd")
        assert (recipe.objective.logits is None) == (method == "fine_tuning")
    chosen = sorted(note.partition(" =")[0] for note in record.notes if "chosen of" in note)
    assert chosen == [
        "flexkd: objective.features.weight",
        "flexkd: objective.logits.temperature",
        "logit_kd: objective.logits.temperature",
    ]
    assert "flexkd: searched with 4 trials, 4 steps in all." in record.notes


def test_the_search_takes_the_best_of_the_validation_rows(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = recorded_cells(monkeypatch, {1e-4: 0.6, 2e-4: 0.8, 3e-4: 0.7})
    grid = {"training.learning_rate": [1e-4, 2e-4, 3e-4]}
    compare(quick(material, "chosen"), methods=METHODS, seeds=(0, 1), search=grid)
    cells = {folder.name: recipe for folder, recipe in recipes.items() if folder.parent.name == "cells"}
    assert set(cells) == {f"{method}-{seed}" for method in METHODS for seed in (0, 1)}
    assert {recipe.training.learning_rate for recipe in cells.values()} == {2e-4}


def test_every_method_changes_what_it_says_and_nothing_else(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = recorded_cells(monkeypatch)
    recipe = quick(material, "all")
    # A BERT has no directions to be turned into, no head over tokens, and one choice in place of the scores stands for
    # all.
    others = ("directions", "heads", "lens", "variance", "activation", "lowest")
    methods = tuple(method for method in METHODS_OF_RECIPES if not any(name in method for name in others))
    compare(recipe, methods=methods, seeds=(0, 1))
    recipes = {folder.name.removesuffix("-1"): cell for folder, cell in cells.items() if folder.name.endswith("-1")}
    assert set(recipes) == set(methods)
    assert recipes["flexkd"].model_copy(update={"compare": None}) == recipe
    losses = {m: r.objective.features.loss for m, r in recipes.items() if r.objective.features is not None}
    named = {
        method: method for method in ("projector", "cka", "procrustes", "gram", "functional_cka", "cosine", "mse")
    } | {"projector_exact": "projector"}
    divergences = [name.removeprefix("flexkd_") for name in methods if name.endswith(("_kl", "shannon"))]
    assert len(divergences) == 8
    assert {recipes[name].objective.logits.loss for name in divergences} == set(divergences)  # type: ignore[union-attr]
    chosen = ("flexkd", "flexkd_random", "scored_features", "random_features")
    chosen += tuple(f"flexkd_{name}" for name in divergences)
    assert losses == {**named, **dict.fromkeys(chosen, "correlation")}
    for method, changed in recipes.items():
        cut = "random" if method in ("flexkd_random", "logit_kd_random") else "auto"
        taught = {"scored_features": "scores", "random_features": "random"}.get(method)
        features = changed.objective.features
        assert changed.student == recipe.student.model_copy(update={"chosen_by": cut})
        assert features is None or (features.chosen_by, features.mapping == "matched") == (taught, taught is not None)
        assert (changed.objective.logits is None) == (method == "fine_tuning")
        same = ("data", "teacher", "scores", "training", "task")
        assert all(getattr(changed, name) == getattr(recipe, name) for name in same)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"seeds": (1, 1)}, {}, r"compare\.seeds: \[1, 1\] names one twice"),
        ({"methods": ("flexkd", "flexkd")}, {}, r"compare\.methods: \['flexkd', 'flexkd'\] names one twice"),
        ({}, {"objective__features": None}, r"flexkd would teach no features: objective\.features is null"),
        (
            {"methods": ("logit_kd", "projector", "cka")},
            {"objective__features__weight": 0},
            "projector, cka would teach no features",
        ),
        ({"methods": ("logit_kd", "flexkd")}, {"objective__logits": None}, "the teacher teaches nothing"),
        ({"search": {"training.lr": (1,)}}, {}, r"training\.lr: unknown key"),
    ],
)
def test_a_comparison_that_would_not_compare_what_it_names_is_refused(
    material: Path, options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        compare(quick(material, "refused", **changes), **{"methods": METHODS, "seeds": (0, 1), **options})


def test_the_random_control_draws_other_units_for_every_seed(material: Path) -> None:
    recipe = job(material, output=str(material / "random"), training__max_steps=1, teacher__fine_tune__epochs=2)
    compare(recipe, methods=("flexkd", "flexkd_random"), seeds=(0, 1))
    units = {}
    for method in ("flexkd", "flexkd_random"):
        for seed in (0, 1):
            with safe_open(material / "random" / "cells" / f"{method}-{seed}" / "scores.safetensors", "pt") as file:
                units[method, seed] = file.get_tensor("start_units").tolist()
    assert units["flexkd", 0] == units["flexkd", 1]
    assert units["flexkd_random", 0] != units["flexkd_random", 1]


MINE = {"mine": ["objective.features.weight=0.1", "student.num_layers=1"]}


def test_a_method_of_the_recipe_is_a_row_of_its_own(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = recorded_cells(monkeypatch)
    recipe = quick(material, "defined", compare={"methods": {"flexkd": None, **MINE}, "seeds": [0, 1]})
    record = compare(recipe)
    assert [(cell.method, cell.seed) for cell in record.cells] == [(m, s) for s in (0, 1) for m in ("flexkd", "mine")]
    plain, changed = (cells[material / "defined" / "cells" / f"{method}-0"] for method in ("flexkd", "mine"))
    assert (changed.objective.features.weight, changed.student.num_layers) == (0.1, 1)
    assert changed.model_copy(update={"objective": plain.objective, "student": plain.student}) == plain
    assert plain.model_copy(update={"compare": None}) == recipe.model_copy(update={"compare": None})
    note = "mine: a method of this recipe, with objective.features.weight=0.1, student.num_layers=1."
    stored = CompareRecord.read(material / "defined" / "compare.json")
    assert note in stored.notes
    assert stored.recipe["compare"]["methods"] == {"flexkd": None, **MINE}  # type: ignore[index]
    assert stored == record


def watched_pace(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> list[float]:
    """Each trial of a time limit takes the next of these paces; the list holds those that no trial has taken yet."""
    paces = list(seconds)
    monkeypatch.setattr(time_limit, "_seconds_a_step", lambda *_: paces.pop(0))
    return paces


def steps_of(material: Path, name: str) -> dict[str, int]:
    """Steps of each cell, as its file says."""
    files = sorted((material / name / "cells").glob("*/cell.json"))
    return {file.parent.name: json.loads(file.read_text("utf-8"))["steps"] for file in files}


def test_a_time_limit_gives_every_cell_the_steps_of_the_first(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arm had as many as its own pace allowed; a continued comparison, and a lost plan, keep the number."""
    names = ["fine_tuning-0", "fine_tuning-1", "mine-0", "mine-1"]
    section = {"methods": {"fine_tuning": None, **MINE}, "seeds": [0, 1]}
    recipe = quick(material, "minutes", training__max_minutes=1, compare=section)
    paces = watched_pace(monkeypatch, 20.0, 12.0, 15.0, 30.0)
    record = compare(recipe)
    assert steps_of(material, "minutes") == dict.fromkeys(names, 3)
    assert paces == [12.0, 15.0, 30.0], "one trial, of the first student"
    note = "training.max_minutes = 1: every student takes 3 steps, as many as the first one has time for."
    assert note in record.notes
    folder = material / "minutes"
    shutil.rmtree(folder / "cells" / "fine_tuning-0")
    compare(recipe)
    shutil.rmtree(folder / "cells" / "fine_tuning-0")
    (folder / "steps.json").unlink()
    compare(recipe)
    assert steps_of(material, "minutes") == dict.fromkeys(names, 3)
    assert paces == [12.0, 15.0, 30.0], "no further trial"
    finished = folder / "cells" / "mine-1" / "cell.json"
    content = json.loads(finished.read_text("utf-8"))
    finished.write_text(json.dumps({**content, "steps": 5}))
    message = "the finished students fine_tuning-0 and mine-1 took 3 and 5 steps, which cannot be compared."
    with pytest.raises(ArtifactError, match=message):
        compare(recipe)
    (problem,) = preflight(recipe).problems
    assert message in problem
    del content["steps"]
    finished.write_text(json.dumps(content))
    assert "training.max_minutes: an earlier version trained mine-1." in " ".join(compare(recipe).notes)


def test_students_that_an_earlier_version_left_half_trained_take_equal_steps(
    material: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It planned the steps of each student beside its checkpoints."""
    cells = material / "half" / "cells"
    for name, steps in (("fine_tuning-0", 2), ("flexkd-0", 5), ("flexkd-1", 2)):
        (cells / name / "checkpoints").mkdir(parents=True)
        (cells / name / "checkpoints" / "steps.json").write_text(json.dumps({"steps": steps}))
    paces = watched_pace(monkeypatch, 10.0)
    with caplog.at_level("WARNING", logger="flexkd"):
        compare(quick(material, "half", training__max_minutes=1), methods=METHODS, seeds=(0, 1))
    assert set(steps_of(material, "half").values()) == {2}
    assert paces == [10.0]
    assert [record.message for record in caplog.records if "trained from the start" in record.message] == [
        f"{cells / 'flexkd-0' / 'checkpoints'}: 5 steps, not 2: trained from the start"
    ]


def end_in_the_third_student(path: Path, home: str) -> None:
    """Ends without a word in the third step of the third student, which has a checkpoint of its second."""
    os.environ["FLEXKD_HOME"] = home
    time_limit._seconds_a_step = lambda *_: 20.0  # type: ignore[assignment]
    plain, taken = torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
        taken.append(1)
        if len(taken) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *args, **options)

    torch.optim.AdamW.step = step  # type: ignore[method-assign]
    compare(load_recipe(path))


@pytest.mark.slow
def test_a_killed_comparison_loses_no_finished_cell(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"methods": list(METHODS), "seeds": [0, 1]}
    recipe = quick(material, "killed", training__max_minutes=1, compare=section)
    path, folder = material / "killed.yaml", material / "killed"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    child = start_process(end_in_the_third_student, path, os.environ["FLEXKD_HOME"])
    child.join(timeout=120)
    assert child.exitcode == -signal.SIGKILL
    finished = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.glob("cells/*/cell.json")}
    assert {file.parent.name for file in finished} == {"fine_tuning-0", "flexkd-0"}
    assert not (folder / "compare.json").exists()
    steps = count_optimizer_steps(monkeypatch)
    watched_pace(monkeypatch)
    assert preflight(recipe).problems == []
    record = compare(recipe)
    assert len(steps) == 1 + 3, "the rest of the third student, and the fourth"
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in finished} == finished
    assert len(record.cells) == 4
    assert set(steps_of(material, "killed").values()) == {3}
