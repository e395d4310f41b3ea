"""The study: its plan is valid, its teacher and students are made once, and its page says what the figures say."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.study import running, teacher
from benchmarks.study.geometry import shares_of_geometry
from benchmarks.study.page import write_page
from benchmarks.study.plan import (
    Cell,
    Contrast,
    Plan,
    Search,
    Setting,
    cells,
    digest_of,
    plan_names,
    read_plan,
    setting_recipe,
)
from benchmarks.study.results import CellResult, Results, SettingResult, append
from benchmarks.study.rules import Verdict, holds_from, judgements, verdicts
from benchmarks.study.running import Study
from benchmarks.study.sections import MOST_ROWS, NUM_CLASSES, labelled
from benchmarks.study.teacher import Documents, TeacherSettings, language_model
from flexkd.evaluate.statistics import holm
from flexkd.pipeline import cells as cells_of_pipeline
from flexkd.recipe.methods import check_comparison
from tests.job_files import job
from tests.tiny import tiny_batch, tiny_model

TINY_TEACHER = TeacherSettings(
    vocabulary=280, width=16, layers=1, heads=2, intermediate=16, length=16, epochs=1, batch_size=4, evaluations=1
)
TEXTS = tuple(f"a package of {word} things, number {index}" for index, word in enumerate(["red", "blue"] * 10))


def tiny_plan(recipe: Path, **changes: Any) -> Plan:
    setting = Setting(
        recipe=str(recipe),
        widths={2: 16, 4: 8},
        metric="accuracy",
        baseline="most frequent class",
        methods={"fine_tuning": 2, "flexkd": 2},
        searches=("rate",),
        search_mismatch=2,
        cpu_minutes=0.001,
    )
    content: dict[str, Any] = {
        "name": "tiny",
        "title": "A tiny study",
        "question": "Does it hold?",
        "level": 0.05,
        "cpu_hours": 1,
        "search_seed": 100,
        "settings": {"tiny": setting.model_copy(update=changes)},
        "searches": {"rate": Search(method="flexkd", key="training.learning_rate", values=(1e-3, 2e-3))},
        "contrasts": (Contrast(method="flexkd", reference="fine_tuning", question="Is it better?"),),
        "rules": ("All seeds have to agree.",),
    }
    return Plan(**content)


@pytest.mark.parametrize("plan_name", plan_names())
def test_the_plan_of_a_study_compares_what_its_names_say(plan_name: str) -> None:
    plan = read_plan(plan_name)
    for name, setting in plan.settings.items():
        for mismatch, width in setting.widths.items():
            recipe = setting_recipe(plan, name, mismatch)
            assert recipe.student.hidden_size == width
            can_rotate = recipe.generation is not None
            check_comparison(recipe, list(setting.methods), (0, 1), can_rotate=can_rotate, width=mismatch * width)
    methods = {method for setting in plan.settings.values() for method in setting.methods}
    assert {name for contrast in plan.contrasts for name in (contrast.method, contrast.reference)} <= methods
    assert {method for search in plan.searches.values() for method in search.methods} <= methods


@pytest.mark.parametrize("plan_name", plan_names())
def test_every_beginning_of_the_list_is_a_balanced_comparison(plan_name: str) -> None:
    plan = read_plan(plan_name)
    for name, setting in plan.settings.items():
        listed = cells(plan, name)
        assert len(set(listed)) == len(listed) == len(setting.widths) * sum(setting.methods.values())
        assert [cell.seed for cell in listed] == sorted(cell.seed for cell in listed)
        first = [cell for cell in listed if cell.seed == 0]
        assert {(cell.mismatch, cell.method) for cell in first} == {
            (m, n) for m in setting.widths for n in setting.methods
        }


def test_a_cell_made_with_other_settings_is_run_again(tmp_path: Path) -> None:
    job(tmp_path)
    plan = tiny_plan(tmp_path / "single_label.yaml", searches=())
    cell = Cell("tiny", 2, "flexkd", 0)
    result = CellResult(cell, digest_of(plan, cell, {}), {}, {"accuracy": 0.5}, 6, 1.0, 1.0)
    append(tmp_path / "cells.jsonl", result)
    append(tmp_path / "cells.jsonl", replace(result, cell=replace(cell, seed=1), digest="of other settings"))
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"cell": {"set')
    append(tmp_path / "cells.jsonl", replace(result, cell=replace(cell, mismatch=4)))
    results = Results.read(tmp_path / "cells.jsonl")
    assert len(results.cells) == 3
    assert results.cpu_seconds == 3.0
    assert results.finished(plan, cell) == result
    assert results.finished(plan, replace(cell, seed=1)) is None


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_teacher_is_trained_once_and_is_a_plain_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = language_model(TINY_TEACHER, Documents(TEXTS, TEXTS[:4]))
    assert folder.is_relative_to(home)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.hidden_size == 16
    assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"]) == TEXTS[0]
    assert json.loads((folder / "study.json").read_text())["evaluations"][-1]["eval_nll"] > 0
    monkeypatch.setattr(teacher, "train", None)
    assert language_model(TINY_TEACHER, Documents(TEXTS, TEXTS[:4])) == folder
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_the_classes_of_sections_are_the_largest_and_none_is_much_larger() -> None:
    sizes = {f"section {index}": 40 - index for index in range(NUM_CLASSES + 2)} | {"perl": 3 * MOST_ROWS + 1}
    rows: list[dict[str, object]] = []
    sections = {}
    for section, size in sizes.items():
        for index in range(size):
            rows.append({"package": f"{section} {index}", "document": "text", "source": f"{section} {index}"})
            sections[f"{section} {index}"] = section
    labels = [row["label"] for row in labelled([*rows, {**rows[0], "package": "of no section"}], sections)]
    assert len(set(labels)) == NUM_CLASSES
    assert "section 15" not in labels
    assert MOST_ROWS * 3 // 4 <= labels.count("perl") <= MOST_ROWS


def test_the_best_directions_keep_most_of_the_geometry_and_the_whole_width_all() -> None:
    model = tiny_model("llama", "causal")
    batch = tiny_batch(model)
    task: Any = SimpleNamespace(writes_text=True, teacher=model, batches=lambda *_, **__: [batch])
    width = model.config.hidden_size
    shares = shares_of_geometry(task, [width // 4, width])
    assert max(shares[str(width // 4)], key=shares[str(width // 4)].__getitem__) == "best directions"
    assert all(0 < share < 1 for share in shares[str(width // 4)].values())
    assert list(shares[str(width)].values()) == pytest.approx([1, 1, 1, 1])
    assert shares_of_geometry(cast("Any", SimpleNamespace(writes_text=False)), [2]) == {}


@pytest.fixture
def students(tmp_path: Path, home: Path) -> Study:
    job(tmp_path)
    plan = tiny_plan(tmp_path / "single_label.yaml", widths={2: 16}, methods={"logit_kd": 1, "flexkd": 2})
    quick = ("teacher.fine_tune=null", "teacher.allow_weak=true", "training.max_steps=3")
    plan = plan.model_copy(update={"settings": {"tiny": plan.settings["tiny"].model_copy(update={"overrides": quick})}})
    return Study(plan, tmp_path / "results" / "cells.jsonl", tmp_path / "work")


def test_a_run_that_is_killed_goes_on_and_runs_no_student_twice(
    students: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def killed_at_the_third(*arguments: Any) -> Any:
        trained.append(arguments[-1].parent.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return cells_of_pipeline.run_cell(*arguments)

    monkeypatch.setattr(running, "run_cell", killed_at_the_third)
    assert len(students.missing()) == 5
    assert students.run(minutes=0) == []
    with pytest.raises(KeyboardInterrupt):
        students.run()
    assert [cell.search for cell in students.results.cells] == ["rate", "rate"]
    later = Study(students.plan, students.results_file, students.work)
    assert len(later.run(minutes=5)) == 3
    assert later.missing() == []
    assert trained == ["rate-0.001", "rate-0.002", "logit_kd-0", "logit_kd-0", "flexkd-0", "flexkd-1"]
    results = later.results
    best = results.best(later.plan, "tiny", "rate")
    result = results.cells[Cell("tiny", 2, "flexkd", 1)]
    assert result.values == {"training.learning_rate": best}
    assert result.steps == 3
    assert result.selection
    assert [entry["step"] for entry in result.evaluations][-1] == 3
    assert results.settings["tiny"].rows["train"] > 50
    assert 0 < results.settings["tiny"].baselines["most frequent class"]["accuracy"] <= 1  # type: ignore[operator]
    (page, *plots) = write_page(later.plan, results, later.results_file.parent)
    assert "| flexkd against fine_tuning | not in this setting |" in page.read_text()
    assert "training.learning_rate" in page.read_text()
    assert all(path.is_file() for path in plots)


@pytest.fixture(scope="module")
def fabricated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Results]:
    """Results of six seeds in which flexkd is worse than fine_tuning at half of the width and better at a quarter."""
    folder = tmp_path_factory.mktemp("fabricated")
    job(folder)
    plan = tiny_plan(folder / "single_label.yaml", methods={"fine_tuning": 6, "flexkd": 6}, searches=())
    finished = {}
    for cell in cells(plan, "tiny"):
        gain = {2: -0.1, 4: 0.1}[cell.mismatch] if cell.method == "flexkd" else 0
        points = [{"step": 4, "eval_loss": 2.0}, {"step": 5, "eval_loss": 1.99}]
        metrics: dict[str, float | None] = {"accuracy": 0.5 + 0.01 * cell.seed + gain}
        finished[cell] = CellResult(cell, digest_of(plan, cell, {}), {}, metrics, 5, 60.0, 60.0, points)
    setting = SettingResult("tiny", {"accuracy": 0.9}, {"most frequent class": {"accuracy": 0.5}}, {"train": 100})
    return plan, Results(finished, {"tiny": setting}, 60.0 * len(finished))


def test_a_contrast_holds_from_the_smallest_mismatch_above_which_all_agree(
    fabricated: tuple[Plan, Results], tmp_path: Path
) -> None:
    plan, results = fabricated
    (at_half, at_quarter) = judgements(plan, results, "tiny")
    assert at_half.paired is not None
    assert at_half.paired.difference == pytest.approx(-0.1)
    assert at_quarter.holm_p_value == pytest.approx(2 / 64)
    assert verdicts(plan, results, "tiny") == {"flexkd against fine_tuning": Verdict(4, is_gain=True)}
    text = write_page(plan, results, tmp_path)[0].read_text()
    assert "| flexkd against fine_tuning | better from d/4 on |" in text
    assert "| most frequent class | 0.5000 | 0.5000 |" in text
    assert "| flexkd | 0.4250 ± 0.0187 (6) | 0.6250 ± 0.0187 (6) |" in text
    assert "fell by 0.5 % at d/2, 0.5 % at d/4" in text
    contrasts = [line.split(" | ") for line in text.splitlines() if " | d/2 | " in line or " | d/4 | " in line]
    assert [cells[-1].rstrip(" |") for cells in contrasts if len(cells) == 8] == ["0 of 6", "6 of 6"]
    assert "| tiny | 24 | 0 | 1.0 | 1 |" in text


def test_a_contrast_can_hold_the_other_way(fabricated: tuple[Plan, Results], tmp_path: Path) -> None:
    plan, results = fabricated
    (contrast,) = plan.contrasts
    turned = contrast.model_copy(update={"method": contrast.reference, "reference": contrast.method})
    plan = plan.model_copy(update={"contrasts": (turned,)})
    text = write_page(plan, results, tmp_path)[0].read_text()
    assert "| fine_tuning against flexkd | worse from d/4 on |" in text


def test_no_contrast_holds_before_all_its_seeds_have_run(fabricated: tuple[Plan, Results], tmp_path: Path) -> None:
    plan, results = fabricated
    results = replace(results, cells={cell: result for cell, result in results.cells.items() if cell.seed < 5})
    assert verdicts(plan, results, "tiny") == {"flexkd against fine_tuning": None}
    text = write_page(plan, results, tmp_path)[0].read_text()
    assert "| flexkd against fine_tuning | seeds are missing |" in text
    assert "| tiny | 20 | 4 | 1.0 | 1 |" in text


def test_a_page_without_any_result_says_so(tmp_path: Path) -> None:
    text = write_page(read_plan(), Results({}, {}, 0.0), tmp_path)[0].read_text()
    assert "Nothing has been run yet." in text


def test_with_one_mismatch_the_rule_is_that_of_holm() -> None:
    p_values = {"a": 0.01, "b": 0.02, "c": 0.03, "d": 0.3}
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    verdict = holds_from({name: {2: p} for name, p in p_values.items()}, 0.05)
    assert verdict == {name: 2 if p <= 0.05 else None for name, p in corrected.items()}
    assert set(verdict.values()) == {2, None}


def test_a_contrast_that_holds_everywhere_leaves_its_share_to_the_others() -> None:
    strong = {2: 0.001, 4: 0.001}
    assert holds_from({"a": strong, "b": {2: 0.2, 4: 0.04}}, 0.05) == {"a": 2, "b": 4}
    assert holds_from({"a": {2: 0.03, 4: 0.001}, "b": {2: 0.2, 4: 0.04}}, 0.05) == {"a": 4, "b": None}
    # A small mismatch says nothing where a larger one fails.
    assert holds_from({"a": {2: 0.001, 4: 0.2}}, 0.05) == {"a": None}


def test_a_seed_whose_students_have_different_teachers_is_run_again(students: Study) -> None:
    assert len(students.run()) == 5
    first, second = (Cell("tiny", 2, "flexkd", seed) for seed in (0, 1))
    other = replace(students.results.cells[first], teacher="another teacher")
    append(students.results_file, other)
    assert students.run() == []
    append(
        students.results_file,
        replace(students.results.cells[Cell("tiny", 2, "logit_kd", 0)], digest="of other settings"),
    )
    assert students.run() == [Cell("tiny", 2, "logit_kd", 0), first]
    assert students.results.cells[first].teacher == students.results.cells[second].teacher
