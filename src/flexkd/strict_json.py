"""Dataclasses to and from strict JSON, which has no NaN; errors name the field that does not fit."""

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Final

from flexkd.errors import ArtifactError
from flexkd.files import local_path, written_whole

Number = int | float
"""Both types on purpose: a step is an int, and run-time type checks do not accept an int as a float."""

_Record = typing.TypeVar("_Record")
_NOT_FINITE: Final = {
    "nan": "not a number: the value is undefined, or came out of a 0/0 or an overflow",
    "inf": "above the largest float: an overflow",
    "-inf": "below the smallest float: an overflow, or the logarithm of 0",
}


def write_json(record: object, path: str | Path) -> None:
    """Write a dataclass as strict JSON in UTF-8; a file that is already there is replaced whole or not at all.

    JSON has no NaN: such a value becomes null, and `not_finite` lists its path, what it was and why that happens.
    """
    not_finite: list[dict[str, object]] = []
    content = typing.cast(dict[str, object], _plain(record, (), not_finite))
    text = json.dumps({**content, "not_finite": not_finite}, indent=1, ensure_ascii=False, allow_nan=False)
    # A lone surrogate (half an emoji in the user's data) has no UTF-8 form: it is written as a JSON escape.
    with written_whole(path) as partial:
        partial.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def read_json(kind: type[_Record], path: str | Path, version: int) -> _Record:
    """Read what `write_json` has written; fields with a default may be missing.

    Raises:
        ArtifactError: No such file, damaged, of another version of its `format`, or with other fields.
    """
    try:
        content = json.loads(local_path(path, where="record").read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error.strerror}). Give the path of a record that flexkd has written."
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged, it is not JSON ({error}). Run again, or restore a copy.") from error
    stored_version = content.get("format") if isinstance(content, dict) else None
    if stored_version != version:
        raise ArtifactError(
            f"{path}: record format {stored_version!r} is not known, this version reads {version}. "
            "Use the flexkd that wrote it, or run again."
        )
    try:
        for entry in content.pop("not_finite"):
            _set(content, entry["path"], float(entry["value"]))
        return typing.cast(_Record, _build(kind, content, ""))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}: damaged, its content is not that of a {kind.__name__} ({error}). Run again, or restore a copy."
        ) from error


def _plain(value: object, keys: tuple[str | int, ...], not_finite: list[dict[str, object]]) -> object:
    """A value as dicts, lists and JSON scalars; a float that JSON lacks becomes None and is added to `not_finite`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(inner, (*keys, key), not_finite) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, (*keys, index), not_finite) for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        name = str(float(value))
        not_finite.append({"path": list(keys), "value": name, "reason": _NOT_FINITE[name]})
        return None
    return value


def _set(content: typing.Any, keys: list[str | int], value: float) -> None:
    """Put a value at the end of a path of keys and indices."""
    for key in keys[:-1]:
        content = content[key]
    content[keys[-1]] = value


def _build(kind: typing.Any, value: object, where: str) -> object:
    """Parsed JSON as a value of the annotated type; a ValueError names the field that does not fit."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), value, where)
    if kind is object:
        return value
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        allowed = typing.get_args(kind)
        parts = [option for option in allowed if dataclasses.is_dataclass(option)]
        if parts and value is not None:
            return _build(parts[0], value, where)
        if not any(type(value) is option for option in allowed):
            raise ValueError(f"{where} is {value!r}, expected {kind}")
        return value
    if not isinstance(value, origin or kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r}, expected {kind}")
    if origin is list:
        (inner,) = typing.get_args(kind)
        return [
            _build(inner, entry, f"{where}[{index}]") for index, entry in enumerate(typing.cast(list[object], value))
        ]
    if origin is dict:
        inner = typing.get_args(kind)[1]
        return {
            key: _build(inner, entry, f"{where}.{key}") for key, entry in typing.cast(dict[str, object], value).items()
        }
    return value


def _build_dataclass(kind: type, value: object, where: str) -> object:
    """Parsed JSON as a dataclass; fields with a default may be missing."""
    if not isinstance(value, dict):
        raise ValueError(f"{where or kind.__name__} is {value!r}, expected an object")
    hints = typing.get_type_hints(kind)
    unknown = sorted(value.keys() - hints.keys())
    needed = {
        entry.name
        for entry in dataclasses.fields(kind)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    }
    missing = sorted(needed - value.keys())
    if unknown or missing:
        raise ValueError(f"{where or kind.__name__}: missing fields {missing}, unknown fields {unknown}")
    built = {name: _build(hints[name], entry, f"{where}.{name}".lstrip(".")) for name, entry in value.items()}
    return kind(**built)
