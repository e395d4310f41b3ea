"""The JSON schema of a recipe: what we ship is valid under it, and it refuses what the recipe refuses, key by key."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import pytest
from jsonschema import Draft7Validator
from jsonschema import ValidationError as JsonSchemaError
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from sklearn.metrics import zero_one_loss
from typer.testing import CliRunner

from flexkd.cli import app
from flexkd.errors import RecipeError
from flexkd.facts.own_metrics import OWN_METRICS, OwnMetric
from flexkd.recipe import load_recipe
from flexkd.recipe.document import read_document
from flexkd.recipe.loading import check_values
from flexkd.recipe.messages import key_fields
from flexkd.recipe.overrides import with_value
from flexkd.reference.json_schema import example_recipe, key_examples, key_schemas, recipe_schema
from tests.source_tree import PACKAGE, ROOT

SHIPPED = sorted([*(ROOT / "recipes").rglob("*.yaml"), *(PACKAGE / "demos").rglob("*.yaml")])
BASE: dict[str, Any] = {
    "name": "job",
    "data": {"train": "rows.csv"},
    "teacher": {"model": "models/teacher"},
    "student": {},
}
KEYS = {".".join(path): path for path in key_fields()}
# What an editor and a key by itself judge apart: an editor advises against numbers in quotes and days in seconds, JSON
# has one kind of number, and a rule of the recipe knows the metrics.
NUMBER_IN_QUOTES = "1e-4"
WHOLE_FLOAT = 2.0
WORDS = ("auto", "all", "off", "no such word", "30M", "1.5 b", "30 apples")
JUDGED_APART = {"data.date": (0,), "data.encoding": WORDS, "task.metric": WORDS}
PROBES = (
    None, True, -5, -1, 0, 1, 3, WHOLE_FLOAT, 0.5, 1.0, -0.5, 10**12, "", "auto", "all", "off", "no such word", "30M",
    "1.5 b", "30 apples", NUMBER_IN_QUOTES, [], [1], [1, 1], ["a"], ["a", "b"], [["a", "b"]], [["a"]], {}, {"a": "b"},
    {"a": ["b"]}, {"1": 2}, {"-1": -1}, {"-7": 1}, {"low": 1, "high": 2}, {"low": 1}, {"/": None},
)  # fmt: skip


@cache
def validator() -> Draft7Validator:
    return Draft7Validator(as_json(recipe_schema()))


def as_json(value: Any) -> Any:
    """As an editor sees it: keys are text, dates are text."""
    return json.loads(json.dumps(value, default=str))


@cache
def schemas() -> dict[str, Any]:
    return {".".join(path): as_json(schema) for path, schema in key_schemas().items()}


def faults(values: Any) -> list[str]:
    return [fault_text(error) for error in validator().iter_errors(as_json(values))]


def fault_text(error: JsonSchemaError) -> str:
    """The place of a fault and what is wrong there; of several readings of a section, the one that comes furthest."""
    while error.context:
        error = max(error.context, key=lambda inner: len(inner.absolute_path))
    return f"{'.'.join(map(str, error.absolute_path))}: {error.message}"


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    sections = {key: {**values[key], **part} for key, part in changes.items() if isinstance(values.get(key), dict)}
    return {**values, **changes, **sections}


def test_it_is_a_schema_that_editors_read() -> None:
    Draft7Validator.check_schema(as_json(recipe_schema()))
    assert "$ref" not in json.dumps(as_json(recipe_schema()))


@pytest.mark.parametrize("path", SHIPPED, ids=where)
def test_what_we_ship_is_valid_as_written_and_with_every_key(path: Path) -> None:
    document = read_document(path.read_text(encoding="utf-8"), path.name)
    assert faults(document.value) == []
    assert faults(load_recipe(path).to_values()) == []


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_an_example_that_makes_a_valid_recipe_and_changes_it(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = KEYS[key]
    values = merged(BASE, example_recipe(path))
    # As with --allow-code.
    monkeypatch.setitem(OWN_METRICS, "sklearn.metrics:zero_one_loss", OwnMetric(zero_one_loss, higher_is_better=False))
    recipe, problems = check_values(values)
    assert problems == []
    assert recipe is not None
    assert faults(values) == []
    is_of_task = path[0] == "task"
    plain, _ = check_values(BASE if is_of_task else with_value(BASE, ("task",), values.get("task", {})))
    assert plain is not None
    assert _at(recipe.to_values(), path) != _at(plain.to_values(), path), "it shows the default"


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def test_every_example_belongs_to_a_key_and_stands_in_the_schema() -> None:
    assert key_examples().keys() == key_fields().keys()
    assert all(len(schema["examples"]) == 1 for schema in schemas().values())
    with pytest.raises(RecipeError, match=r"student\.sise: has no example"):
        example_recipe(("student", "sise"))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_says_what_it_means_and_what_it_may_be(key: str) -> None:
    schema = schemas()[key]
    assert schema["description"].endswith(".")
    assert "title" not in schema
    assert {"type", "enum", "const", "anyOf", "oneOf"} & schema.keys(), "an editor would take anything"
    assert schema.get("type") != "object" or {"properties", "additionalProperties"} & schema.keys()


def probes() -> Iterator[tuple[str, Any]]:
    for key, path in KEYS.items():
        is_section = any(len(name) > len(path) and name[: len(path)] == path for name in KEYS.values())
        yield from ((key, value) for value in PROBES if not (is_section and isinstance(value, dict)))


def fields() -> dict[str, FieldInfo]:
    return {".".join(path): field for path, field in key_fields().items()}


def accepts(reader: TypeAdapter[Any], key: str, value: Any) -> bool:
    """Whether a key by itself takes the value, without the rules between keys."""
    if key == "objective.features.layer_map" and isinstance(value, dict):
        value = {int(name) if name.lstrip("-").isdigit() else name: entry for name, entry in value.items()}
    try:
        reader.validate_python(value)
    except ValidationError:
        return False
    return True


def test_the_schema_and_the_recipe_take_and_refuse_the_same_values_of_each_key() -> None:
    validators = {key: Draft7Validator(schema) for key, schema in schemas().items()}
    readers = {key: TypeAdapter(Annotated[field.annotation, field]) for key, field in fields().items()}
    differing = {
        (key, json.dumps(value))
        for key, value in probes()
        if validators[key].is_valid(value) is not accepts(readers[key], key, value)
        and value != NUMBER_IN_QUOTES
        and not (isinstance(value, float) and value.is_integer())
        and value not in JUDGED_APART.get(key, ())
    }
    assert sorted(differing) == []


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("student", "sise"), 0.5, "student"),
        (("student", "size"), 1.5, "student.size"),
        (("student", "max_parameters"), "30 apples", "student.max_parameters"),
        (("student", "chosen_by"), "score", "student.chosen_by"),
        (("objective", "features", "layer_map"), {"first": 2}, "objective.features.layer_map"),
        (("objective", "logits", "temperature"), 0, "objective.logits.temperature"),
        (("task", "metric"), "acuracy", "task.metric"),
        (("training", "batch_size"), 2.5, "training.batch_size"),
        (("compare", "contrasts"), [["flexkd"]], "compare.contrasts.0"),
        (
            ("compare", "search"),
            {"training.learning_rate": {"low": 1, "hihg": 2}},
            "compare.search.training.learning_rate",
        ),
        (("sutdent",), {}, ""),
    ],
)
def test_a_wrong_recipe_is_refused_at_its_place(path: tuple[str, ...], value: Any, place: str) -> None:
    values = with_value(BASE, path, value)
    assert faults(BASE) == []
    assert check_values(values)[0] is None
    assert [fault.partition(": ")[0] for fault in faults(values)] == [place]


@pytest.mark.parametrize("key", sorted(BASE))
def test_what_a_recipe_cannot_do_without_is_required(key: str) -> None:
    values = {name: part for name, part in BASE.items() if name != key}
    assert faults(values) == [f": '{key}' is a required property"]
    assert check_values(values)[0] is None


def test_the_command_prints_the_schema() -> None:
    result = CliRunner().invoke(app, ["schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == as_json(recipe_schema())
