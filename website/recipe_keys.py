"""The keys of a recipe as a page: type, default, range, meaning and an example of each, read from its JSON schema."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import yaml

from flexkd.recipe.problem import dotted
from flexkd.reference.json_schema import example_recipe, key_schemas, recipe_schema

_TYPES: Final = {
    "string": ("text", "texts"),
    "integer": ("whole number", "whole numbers"),
    "number": ("number", "numbers"),
    "boolean": ("switch", "switches"),
    "null": ("null", "null"),
}
"""Kinds of values as people say them, of one and of several."""
_BOUNDS: Final = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "at most"),
    ("exclusiveMaximum", "below"),
)
_DEFAULT: Final = re.compile(r" ?Default: ([^.]*(?:\.[^ ][^.]*)*)\.")
"""The sentence of a description that says more of a default than one value can."""


def keys_page() -> str:
    """Every key of a recipe in Markdown: a heading for each section, and below it one for each of its keys."""
    schemas = key_schemas()
    parts = []
    for path, schema in schemas.items():
        is_plain = len(path) == 1 and not _sections(schema)
        if is_plain and path == next(iter(schemas)):
            parts.append("## At the top { #top }")
        parts.append(_entry(path, schema, is_required=_is_required(path, schemas)))
    return "\n\n".join(parts) + "\n"


def schema_text() -> str:
    """The JSON schema as the site offers it to editors."""
    return json.dumps(recipe_schema(), indent=2) + "\n"


def _is_required(path: tuple[str, ...], schemas: Mapping[tuple[str, ...], Mapping[str, Any]]) -> bool:
    parents = _sections(recipe_schema() if len(path) == 1 else schemas[path[:-1]])
    return any(path[-1] in section.get("required", ()) for section in parents)


def _sections(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The readings of a key that have keys of their own."""
    return [choice for choice in (schema, *schema.get("anyOf", ())) if "properties" in choice]


def _entry(path: tuple[str, ...], schema: Mapping[str, Any], *, is_required: bool) -> str:
    level = "##" if len(path) == 1 and _sections(schema) else "###"
    default, meaning = _default_and_meaning(schema, is_required=is_required)
    values = "the keys below" if _sections(schema) else range_of(schema)
    return "\n\n".join(
        (
            f"{level} `{dotted(path)}` {{ #{dotted(path)} }}",
            f"| type | default | range |\n|---|---|---|\n| {type_of(schema)} | {default} | {values} |",
            meaning,
            f"```yaml\n{_written(example_recipe(path))}```",
        )
    )


def _written(example: Mapping[str, Any]) -> str:
    """A part of a recipe as people write it, what is short on one line."""
    return yaml.safe_dump(example, sort_keys=False, default_flow_style=None, width=100)


def _default_and_meaning(schema: Mapping[str, Any], *, is_required: bool) -> tuple[str, str]:
    meaning = schema["description"]
    sentence = _DEFAULT.search(meaning)
    if sentence is not None:
        return sentence[1], meaning.replace(sentence[0], "")
    if is_required:
        return "none: it has to be given", meaning
    if "default" not in schema:
        return "the defaults of its keys", meaning
    written = json.dumps(schema["default"]).replace('"', "")
    return f"`{written}`", meaning


def type_of(schema: Mapping[str, Any], *, many: bool = False) -> str:
    """What kind of value a key takes, in words.

    Args:
        many: Several of them, as in a list.
    """
    choices = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    if choices:
        return _either([type_of(choice, many=many) for choice in choices], many=many)
    if "properties" in schema:
        return "sections" if many else "section"
    if "enum" in schema or "const" in schema:
        return "words" if many else "word"
    if schema["type"] == "array":
        return f"list{'s' * many} of {type_of(schema['items'], many=True)}"
    if schema["type"] == "object":
        inner = schema.get("additionalProperties") or next(iter(schema["patternProperties"].values()))
        return f"mapping{'s' * many} to {type_of(inner, many=True)}"
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return _either(["date" if schema.get("format") == "date" else _TYPES[kind][many] for kind in kinds], many=many)


def _either(words: Sequence[str], *, many: bool) -> str:
    """Words joined by or, each once, null last; of four kinds or more, that any single value will do."""
    distinct = sorted(dict.fromkeys(words), key=lambda word: word == "null")
    if len(distinct) < 4:
        return " or ".join(distinct)
    return "single values" if many else "any single value"


def range_of(schema: Mapping[str, Any]) -> str:
    """Which values of that kind a key takes."""
    return "; ".join(dict.fromkeys(text for text in _ranges(schema) if text)) or "any"


def _ranges(schema: Mapping[str, Any]) -> Iterator[str]:
    if "properties" in schema:
        yield f"keys {', '.join(schema['properties'])}"
        return
    values = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else []
    yield ", ".join(f"`{value}`" for value in values)
    yield " and ".join(f"{words} {_number(schema[name])}" for name, words in _BOUNDS if name in schema)
    if schema.get("minItems"):
        yield f"{schema['minItems']} of them" if schema["minItems"] == schema.get("maxItems") else "not empty"
    if schema.get("format") == "date":
        yield "as YYYY-MM-DD"
    elif schema.get("pattern"):
        yield "text as in the example"
    elif schema.get("minLength"):
        yield "not empty"
    if schema.get("type") == "boolean":
        yield "`true`, `false`"
    parts = (schema.get("items"), schema.get("additionalProperties"), *schema.get("patternProperties", {}).values())
    for inner in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *parts):
        if isinstance(inner, Mapping):
            yield from _ranges(inner)


def _number(value: float) -> str:
    """A bound as people write it."""
    return "2^32" if value == 2**32 else f"{value:g}"
