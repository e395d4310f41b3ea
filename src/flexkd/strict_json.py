"""Records: dataclasses to and from strict JSON, which has no NaN; errors name the field that does not fit."""

import dataclasses
import json
import math
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema

from flexkd.errors import ArtifactError, FlexKDError
from flexkd.files import local_path, written_whole

Number = int | float
"""Both types on purpose: a step is an int, and run-time type checks do not accept an int as a float."""

FORMAT: Final = 1
"""Version of the JSON; a record of another one is refused."""

_AGAIN: Final = "Delete it, to make it again, or restore a copy."
_MOST_SHOWN: Final = 5
_REASONS: Final = {"missing": "is missing", "unexpected_keyword_argument": "is no field of this version"}
"""What pydantic says in the words of Python."""
_NOT_FINITE: Final = {
    "nan": "not a number: the value is undefined, or came out of a 0/0 or an overflow",
    "inf": "above the largest float: an overflow",
    "-inf": "below the smallest float: an overflow, or the logarithm of 0",
}


class Record:
    """Base of the dataclasses in a record: read by pydantic without any conversion, made in code without a check."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        # Strict about every value of a field; the dataclass itself is an object in JSON, and no instance.
        return typing.cast(CoreSchema, {**handler(source), "strict": False})


class StoredRecord(Record):
    """Base of the records that are files; each has a field `format`."""

    def write(self, path: str | Path) -> None:
        """Write the record as strict JSON in UTF-8; a file that is already there is replaced whole or not at all.

        JSON has no NaN: such a value becomes null, and `not_finite` lists its path, what it was and why that happens.
        Keys are text: a dict with other keys does not come back equal.
        """
        not_finite: list[dict[str, object]] = []
        content = typing.cast(dict[str, object], _plain(self, (), not_finite))
        text = json.dumps({**content, "not_finite": not_finite}, indent=1, ensure_ascii=False, allow_nan=False)
        # A lone surrogate (half an emoji in the user's data) has no UTF-8 form: it is written as a JSON escape.
        with written_whole(path) as partial:
            partial.write_bytes(text.encode("utf-8", errors="backslashreplace"))

    @classmethod
    @cache
    def _reader(cls) -> TypeAdapter[Self]:
        return TypeAdapter(cls)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what `write` has written, equal to the record that was written; fields with a default may be missing.

        Raises:
            ArtifactError: No such file, damaged, of another format, or with other fields than this version's.
        """
        content = _content(path)
        try:
            for entry in content.pop("not_finite"):
                _set(content, entry["path"], float(entry["value"]))
            return cls._reader().validate_python(content)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            reason = _described(error, content) if isinstance(error, ValidationError) else str(error)
            what = f"its content is not that of a {cls.__name__} ({reason})"
            raise ArtifactError(f"{path}: damaged, {what}. Run again, or restore a copy.") from error


def read_object(file: Path, *keys: str, advice: str = _AGAIN) -> dict[str, Any]:
    """The JSON object in a file that flexkd has written.

    Args:
        keys: What it holds at least.
        advice: What to do about a damaged file.

    Raises:
        ArtifactError: It is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: damaged, it is not JSON ({error}). {advice}") from error
    missing = sorted(set(keys) - content.keys()) if isinstance(content, dict) else keys
    if missing or not isinstance(content, dict):
        raise ArtifactError(f"{file}: damaged, it is no object with {', '.join(missing)}. {advice}")
    return content


@contextmanager
def damage_named(file: Path, *, advice: str = _AGAIN) -> Iterator[None]:
    """Within it, values of a file that are missing or of another type say which file is damaged.

    Raises:
        ArtifactError: In the place of the error that such a value causes where it is used.
    """
    try:
        yield
    except FlexKDError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ArtifactError(
            f"{file}: damaged, its values are not those of this file ({error!r:.200}). {advice}"
        ) from error


def _content(path: str | Path) -> Any:
    """The JSON of a record of this format."""
    try:
        content = json.loads(local_path(path, where="record").read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error.strerror}). Give the path of a record that flexkd has written."
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged, it is not JSON ({error}). Run again, or restore a copy.") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise ArtifactError(
            f"{path}: record format {version!r} is not known, this version reads {FORMAT}. "
            "Use the flexkd that wrote it, or run again."
        )
    return content


def _described(error: ValidationError, content: object) -> str:
    """What does not fit, each field once."""
    reasons: dict[str, str] = {}
    for entry in error.errors()[:_MOST_SHOWN]:
        reason = _REASONS.get(entry["type"], f"is {entry['input']!r:.60}: {entry['msg']}")
        reasons.setdefault(_place(content, entry["loc"]), reason)
    return "; ".join(f"{place} {reason}" for place, reason in reasons.items())


def _place(content: Any, keys: Sequence[str | int]) -> str:
    """A path of pydantic as Python writes it, without the types of a union at its end."""
    place = ""
    for key in keys:
        if isinstance(content, list) and isinstance(key, int):
            place, content = f"{place}[{key}]", content[key]
        elif isinstance(content, dict):
            place, content = f"{place}.{key}", content.get(key)
    return place.lstrip(".")


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
