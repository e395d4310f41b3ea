"""Recipes changed by overrides, written out and read back, and their names against the registries."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from flexkd.core.scores import ATTRIBUTIONS, CONTROLS, TARGETS
from flexkd.errors import RecipeError
from flexkd.facts.losses import FEATURE_LOSS_FACTS, LOGIT_LOSS_FACTS, TASK_LOSS_OF
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.document import read_document, write_yaml
from flexkd.recipe.messages import key_fields
from tests.recipe.kinds import BASE, Loaded, Problems


def test_overrides_are_yaml_values_at_dotted_keys(load: Loaded) -> None:
    recipe = load(
        f"{BASE}objective: {{logits: null}}",
        "training.learning_rate=1e-5",
        "objective.logits.weight=0.5",
        "objective.features=null",
        "teacher.fine_tune={}",
        "data.where.source=imdb",
        "scores.layer=[-1, 2]",
        "student={size: 0.5}",
    )
    assert recipe.training.learning_rate == 1e-5
    assert recipe.objective.logits is not None
    assert recipe.objective.logits.weight == 0.5
    assert recipe.objective.features is None
    assert recipe.teacher.fine_tune is not None
    assert recipe.data.where == {"source": "imdb"}
    assert recipe.scores.layer == (-1, 2)
    assert (recipe.student.size, recipe.student.hidden_size) == (0.5, None)


def test_a_layer_is_a_number_in_a_dotted_key(load: Loaded) -> None:
    recipe = load(BASE, "objective.features.layer_map.2=4", "scores.layer=4")
    assert recipe.objective.features is not None
    assert recipe.objective.features.layer_map == {2: 4}


def test_overrides_are_reported_like_the_recipe_after_it(problems: Problems) -> None:
    lines = problems(
        f"{BASE}nmae: 1",
        "training.lerning_rate=1",
        "x",
        "y=",
        "training.epochs=[",
        "training.seed=1",
        "training.seed=2",
        "name.first=3",
        "training.per_device_batch_size=7",
    )
    assert lines[0] == "recipe.yaml:5: nmae: unknown key. Did you mean 'name'?"
    assert sorted(lines[1:]) == [
        "command line: 'x' is no KEY=VALUE. Write it as training.learning_rate=1e-4.",
        "command line: name.first: the recipe holds 'job', which has no key 'first'. Give its whole value.",
        "command line: training.epochs:1: not YAML: expected the node content, but found '<stream end>' in '['. "
        "Check quotes, colons and indentation there.",
        "command line: training.lerning_rate: unknown key. Did you mean 'training.learning_rate'?",
        "command line: training.per_device_batch_size: 7 does not divide batch_size = 32. Nearest: 4 or 8.",
        "command line: training.seed: given twice. Keep one.",
        "command line: y: no value. Write y=null to leave it out.",
    ]


def test_a_rule_that_an_override_breaks_is_the_command_lines(problems: Problems) -> None:
    lines = problems(BASE, "objective.logits=null", "objective.features=null")
    assert lines[0].startswith("command line: objective: the teacher teaches nothing")


def test_values_of_a_search_are_checked_before_the_first_run(load: Loaded, problems: Problems) -> None:
    good = load(f"{BASE}compare: {{search: {{training.learning_rate: [1e-4, 5e-4]}}}}")
    assert good.compare is not None
    assert good.compare.search == {"training.learning_rate": (1e-4, 5e-4)}
    lines = problems(f"{BASE}compare:\n  search:\n    training.lr: [1]\n    training.epochs: [1, fast]\n    name: []\n")
    assert [line.partition(". ")[0] for line in lines] == [
        "recipe.yaml:7: compare.search.training.lr: unknown key",
        "recipe.yaml:8: compare.search.training.epochs: 'fast' leads to training.epochs: 'fast' is not a finite number",
        "recipe.yaml:9: compare.search.name: [] gives nothing to try",
    ]


@pytest.mark.parametrize(
    "more",
    [
        "",
        "training: {learning_rate: 1e-5, report_to: [tensorboard], max_steps: 3}",
        "scores: {layer: [-1, 2]}\nobjective: {features: {layer_map: {1: 2, -1: -1}}}",
        "task: {problem: regression}\ncompare: {search: {training.learning_rate: [1e-5]}}",
        "objective: {logits: null, features: null, baseline: true}",
    ],
)
def test_a_recipe_written_out_is_read_back_as_the_same(load: Loaded, more: str) -> None:
    recipe = load(BASE + more)
    assert load(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    "text", ["1e-5", "010", "no", "12:30:00", "null", "1_000", "2024-01-01", "true", "<<", "~", "="]
)
def test_text_that_looks_like_something_else_survives_being_written(load: Loaded, text: str) -> None:
    recipe = load(BASE.replace("rows.csv", f"rows.csv, text: '{text}'"))
    assert recipe.data.text == text
    assert load(recipe.to_yaml()).data.text == text
    assert read_document(write_yaml({text: text}), "x").value == {text: text}


def test_a_recipe_is_changed_by_overrides_and_checked_again(load: Loaded) -> None:
    recipe = load(BASE)
    changed = override_recipe(recipe, ["training.seed=3"])
    assert changed == recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": 3})})
    with pytest.raises(RecipeError, match=re.escape("command line: training.sed: unknown key.")):
        override_recipe(recipe, ["training.sed=3"])


def test_every_key_says_what_it_means() -> None:
    silent = [".".join(path) for path, field in key_fields().items() if not (field.description or "").endswith(".")]
    assert silent == []


def test_L04_rules_hold_for_recipes_made_in_python() -> None:
    values: dict[str, Any] = {"name": "job", "data": {"train": "a"}, "teacher": {"model": "b"}, "student": {}}
    assert Recipe.model_validate(values).output == "runs/job"
    with pytest.raises(ValidationError, match="objective: the teacher teaches nothing"):
        Recipe.model_validate({**values, "objective": {"logits": None, "features": None}})


def literals(path: str) -> Iterator[str]:
    from flexkd.recipe.messages import _literals

    return iter(_literals(tuple(path.split("."))))


def test_names_in_recipes_are_those_of_the_registries() -> None:
    assert list(literals("objective.logits.loss")) == list(LOGIT_LOSS_FACTS)
    assert list(literals("objective.features.loss")) == list(FEATURE_LOSS_FACTS)
    assert set(literals("task.problem")) == set(TASK_LOSS_OF)
    assert {*literals("scores.attribution"), *CONTROLS} == set(ATTRIBUTIONS)
    assert set(literals("scores.target")) == set(TARGETS)
