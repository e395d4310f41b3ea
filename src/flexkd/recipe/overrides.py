"""KEY=VALUE on the command line: a dotted key, and a YAML value that replaces the one in the recipe."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flexkd.errors import RecipeError
from flexkd.recipe.document import KeyPath, read_document, short_repr
from flexkd.recipe.problem import dotted

WHERE: Final = "command line"
"""Names the place of an override in messages, instead of a file and line."""


@dataclass(frozen=True)
class Override:
    """One KEY=VALUE of the command line."""

    path: KeyPath
    value: Any

    def covers(self, path: KeyPath) -> bool:
        """Whether the value at `path` comes from this override."""
        return tuple(map(str, path[: len(self.path)])) == tuple(map(str, self.path))


def parse_override(text: str) -> Override:
    """Parse one override like training.learning_rate=1e-5, whose value is YAML.

    Raises:
        RecipeError: The key or the value is missing, or the value is not YAML.

    Example:
        >>> parse_override("student.num_layers=3")
        Override(path=('student', 'num_layers'), value=3)
    """
    key, equals, value = text.partition("=")
    steps = key.strip().split(".")
    if not equals or not all(steps):
        raise RecipeError(f"{WHERE}: {text!r} is no KEY=VALUE. Write it as training.learning_rate=1e-4.")
    if not value.strip():
        raise RecipeError(f"{WHERE}: {key}: no value. Write {key}=null to leave it out.")
    document = read_document(value, f"{WHERE}: {key}")
    if document.duplicates:
        repeated = dotted((*steps, *document.duplicates[0][0]))
        raise RecipeError(f"{WHERE}: {repeated}: appears twice. Keep one.")
    # Layers are the only keys that are numbers.
    path = tuple(int(step) if re.fullmatch(r"-?[0-9]+", step) else step for step in steps)
    return Override(path, document.value)


def parse_overrides(texts: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Parse overrides.

    Returns:
        The valid overrides, and a message for each of the others.
    """
    overrides: list[Override] = []
    messages: list[str] = []
    for text in texts:
        try:
            override = parse_override(text)
        except RecipeError as error:
            messages.append(str(error))
            continue
        if override.path in [earlier.path for earlier in overrides]:
            messages.append(f"{WHERE}: {dotted(override.path)}: given twice. Keep one.")
        overrides.append(override)
    return overrides, messages


def with_value(data: Any, path: KeyPath, value: Any) -> Any:
    """A copy of `data` with `value` at `path`; missing or null sections on the way are created.

    Raises:
        RecipeError: The path leads into a value that is not a section.
    """
    if not path:
        return value
    if data is not None and not isinstance(data, Mapping):
        raise RecipeError(f"holds {short_repr(data)}, which has no key {str(path[0])!r}. Give its whole value.")
    inner = dict(data or {})
    # YAML anchors let two keys share one value; copying on the way down leaves the other key as it was.
    return {**inner, path[0]: with_value(inner.get(path[0]), path[1:], value)}


def without_key(data: Any, path: KeyPath) -> Any:
    """A copy of `data` without the key at `path`; numbers and their text count as the same key."""
    if not isinstance(data, Mapping):
        return data
    first, *below = path
    if not below:
        return {key: value for key, value in data.items() if str(key) != str(first)}
    return {key: without_key(value, tuple(below)) if str(key) == str(first) else value for key, value in data.items()}
