"""Errors of pydantic as problems of a recipe, with the nearest valid key and what to write."""

import difflib
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Final, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from flexkd.recipe.document import KeyPath, short_repr
from flexkd.recipe.problem import RecipeProblem, dotted, unknown_text
from flexkd.recipe.schema import Recipe
from flexkd.recipe.values import LIST, MAPPING

_BOUNDS: Final = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def problems_of(error: ErrorDetails) -> Iterator[RecipeProblem]:
    """The problems in one error of pydantic: usually one, for an unknown section also those of its keys."""
    path: KeyPath = tuple(step for step in error["loc"] if step not in ("[key]", LIST, MAPPING))
    if error["type"] not in ("extra_forbidden", "invalid_key"):
        yield RecipeProblem(path, _text(error, path))
        return
    yield RecipeProblem(path, unknown_key_text(path))
    if isinstance(error["input"], Mapping) and error["type"] == "extra_forbidden":
        for key in error["input"]:
            if _belongs_to(str(key), path) or _nearest(str(key), [name[-1] for name in key_fields()]):
                yield RecipeProblem((*path, key), unknown_key_text((*path, key)))


@functools.cache
def key_fields() -> Mapping[tuple[str, ...], FieldInfo]:
    """All keys of a recipe, sections included, by path."""
    return dict(_fields_below(Recipe, ()))


def field_path(path: KeyPath) -> tuple[str, ...]:
    """The longest beginning of `path` that is a key of the recipe; the path may go on into a list or mapping."""
    names = tuple(str(step) for step in path)
    return next((names[:end] for end in range(len(names), 0, -1) if names[:end] in key_fields()), ())


def takes_whole_numbers(path: KeyPath) -> bool:
    """Whether the numbers of a key are whole."""
    types = set(_types(key_fields()[field_path(path)].annotation))
    return int in types and float not in types


def _types(annotation: object) -> Iterator[object]:
    """The plain types in an annotation."""
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)


def unknown_key_text(path: KeyPath) -> str:
    """The message for an unknown key: where it belongs, or which key was probably meant."""
    key, parent = str(path[-1]), tuple(str(step) for step in path[:-1])
    siblings = [name[-1] for name in key_fields() if name[:-1] == parent]
    places = _belongs_to(key, path[:-1])
    if places:
        return f"unknown key here. It belongs to {' or '.join(places)}."
    closest = _nearest(key, siblings)
    if closest:
        return f"unknown key. Did you mean '{dotted((*parent, *closest))}'?"
    listed = f" Known here: {', '.join(siblings)}." if siblings else ""
    closest = _nearest(key, [name[-1] for name in key_fields()])
    near = [f"'{dotted(name)}'" for name in key_fields() if closest and name[-1] == closest[0]]
    return f"unknown key.{listed}" + (f" Nearest elsewhere: {' or '.join(near)}." if near else "")


def _belongs_to(key: str, parent: KeyPath) -> list[str]:
    return [dotted(name) for name in key_fields() if name[-1] == key and name[:-1] != parent]


def _nearest(key: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(key, names, n=1)


def _fields_below(section: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for name, field in section.model_fields.items():
        yield (*path, name), field
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _fields_below(part, (*path, name))


def _text(error: ErrorDetails, path: KeyPath) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return f"missing. Add it: {_description(path)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error" and isinstance(value, str):
        return unknown_text(str(path[-1]), value, _literals(path))
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = int(context[name]) if context[name] == int(context[name]) else context[name]
        return f"{short_repr(value)} must be {words} {bound}. {_description(path)}"
    if kind == "model_type":
        keys = ", ".join(name[-1] for name in key_fields() if name[:-1] == field_path(path))
        optional = not key_fields()[field_path(path)].is_required()
        advice = "Remove it to get the defaults, or write" if value is None and optional else "Write"
        return f"{short_repr(value)} is no section. {advice} its keys below it: {keys}."
    type_fault = _type_fault(kind, value, path)
    if type_fault:
        return f"{short_repr(value)} {type_fault}"
    return f"{short_repr(value)}: {error['msg']}. {_description(path)}"


def _type_fault(kind: str, value: object, path: KeyPath) -> str:
    """Which type the value should have, and how to write it; empty for other kinds of error."""
    match kind:
        case "int_type" | "int_from_float":
            return f"is not a whole number. {_as_whole(value)}"
        case "float_type" | "finite_number":
            return f"is not a finite number. {_as_number(value)}"
        case "bool_type":
            return "is not true or false. Write one of the two."
        case "string_type":
            quoted = isinstance(value, int | float)
            return "is not text. " + (f"Put it in quotes: '{short_repr(value)}'." if quoted else _description(path))
        case "string_too_short":
            return f"is empty. {_description(path)}"
        case "literal_error":
            return f"is not one of {', '.join(_literals(path))}. Write one of them."
        case "tuple_type" | "list_type":
            return f"is no list. Write [{short_repr(value)}]."
        case "dict_type":
            return f"is no mapping. {_description(path)}"
    return ""


def _as_whole(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"Write {int(value)}."
    return _as_number(value, "32")


def _as_number(value: object, example: str = "0.1") -> str:
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9_]*[0-9]", value):
        return f"Write {int(value.replace('_', ''))}, with no quotes, '_' or 0 in front."
    return f"Write a number, as {example}."


def _literals(path: KeyPath) -> list[str]:
    annotation = key_fields()[field_path(path)].annotation
    choices = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    return [name for choice in choices for name in get_args(choice)]


def _description(path: KeyPath) -> str:
    text = " ".join((key_fields()[field_path(path)].description or "").split())
    return text if text.endswith(".") else f"{text}."
