"""JSON schema of a recipe, in which an editor finds keys, meanings, defaults, ranges and examples."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, Final

from flexkd.errors import RecipeError
from flexkd.recipe.document import read_document
from flexkd.recipe.messages import key_fields
from flexkd.recipe.overrides import parse_override, with_value
from flexkd.recipe.problem import dotted
from flexkd.recipe.schema import Recipe

# The newest draft that the YAML extensions of all common editors read.
_DRAFT: Final = "http://json-schema.org/draft-07/schema#"
_EXAMPLES_FILE: Final = "examples.yaml"
_FILLED_IN: Final = ("output",)
"""Keys without a default of their own that the recipe fills in from other keys."""


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with every section in its place and no reference between them.

    It knows each key by itself; rules between keys are those of `flexkd check`. Two things that a recipe may hold are
    no part of it, so that an editor advises against them: numbers in quotes, and names of earlier versions.
    """
    schema = Recipe.model_json_schema()
    definitions = schema.pop("$defs")
    whole: dict[str, Any] = _inlined(schema, definitions)
    whole["required"] = [key for key in whole["required"] if key not in _FILLED_IN]
    for path in key_examples():
        _schema_at(whole, path)["examples"] = [_value_at(example_recipe(path), path)]
    return {"$schema": _DRAFT, "title": "Recipe of flexkd", **whole}


def key_schemas() -> dict[tuple[str, ...], dict[str, Any]]:
    """The part of the schema for every key, sections too, by path."""
    whole = recipe_schema()
    return {path: _schema_at(whole, path) for path in key_fields()}


@functools.cache
def key_examples() -> dict[tuple[str, ...], tuple[str, ...]]:
    """An example of every key: the KEY=VALUE that a recipe says there, with other keys that it needs, by path.

    Raises:
        RecipeError: The file of the examples is not valid YAML.
    """
    text = files("flexkd.reference").joinpath(_EXAMPLES_FILE).read_text(encoding="utf-8")
    entries = read_document(text, _EXAMPLES_FILE).value
    return {tuple(key.split(".")): tuple(map(str, overrides)) for key, overrides in entries.items()}


def example_recipe(path: Sequence[str]) -> dict[str, Any]:
    """The part of a recipe that shows a key.

    Raises:
        RecipeError: There is no such key, or it has no example.
    """
    overrides = key_examples().get(tuple(path))
    if overrides is None:
        raise RecipeError(f"{dotted(tuple(path))}: has no example. Give it one in {_EXAMPLES_FILE}.")
    values: dict[str, Any] = {}
    for text in overrides:
        override = parse_override(text)
        values = with_value(values, override.path, override.value)
    return values


def _value_at(values: Any, path: Sequence[str]) -> Any:
    for key in path:
        values = values[key]
    return values


def _schema_at(schema: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The schema of a key; a section that may be null is a choice between its keys and null."""
    for key in path:
        sections = [schema, *schema.get("anyOf", ())]
        schema = next(section for section in sections if "properties" in section)["properties"][key]
    assert isinstance(schema, dict)
    return schema


def _inlined(node: Any, definitions: Mapping[str, Any]) -> Any:
    """The schema with definitions in the place of references, and without what pydantic makes up or repeats."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        section = definitions[node["$ref"].rpartition("/")[2]]
        return _inlined({**section, **{key: value for key, value in node.items() if key != "$ref"}}, definitions)
    return dict(_entries(node, definitions))


def _entries(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if key == "title" or (key == "default" and _is_section(node, definitions) and value is not None):
            continue
        if key == "description":
            yield key, " ".join(value.split())
        elif key == "patternProperties":
            yield key, _inlined(value, definitions)
            yield "additionalProperties", False
        elif key == "properties":
            yield key, {name: _inlined(schema, definitions) for name, schema in value.items()}
        elif key == "anyOf":
            # What a section is about stands at its key already.
            choices = [_inlined(choice, definitions) for choice in value]
            yield key, [{name: part for name, part in choice.items() if name != "description"} for choice in choices]
        else:
            yield key, value if key in ("default", "enum", "required") else _inlined(value, definitions)


def _is_section(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> bool:
    """Whether a key holds a section; its defaults stand at each of its keys."""
    return "properties" in node or any("$ref" in choice for choice in node.get("anyOf", ()))
