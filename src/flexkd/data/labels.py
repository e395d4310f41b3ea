"""The label column of all rows to numbers: class indices, flags or a value, with the names of the classes."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from flexkd.errors import DataError, unknown_name

Label = int | float | tuple[float, ...]
"""A class index, a value to regress, or one 0/1 flag per class."""

_INTEGER_TEXT: Final = re.compile(r"[+-]?\d+(\.0+)?", re.ASCII)
_NUMBER_TEXT: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)
_KINDS: Final = {"integer": "integers", "boolean": "booleans", "text": "text"}
_MOST_CLASSES_BY_ACCIDENT: Final = 100


@dataclass(frozen=True)
class LabelSpace:
    """What a model predicts.

    Attributes:
        problem: "single_label", "multi_label" or "regression".
        names: One name per model output; the label of index i is names[i].
    """

    problem: str
    names: tuple[str, ...]


class LabelValue(NamedTuple):
    """A label as it stands in the source."""

    value: object
    where: str


class ReadLabel(NamedTuple):
    """A label that was understood, or the reason why not; both None where there is no label."""

    label: Label | None
    reason: str | None


Reader = Callable[[object], ReadLabel]
_UNLABELLED: Final = ReadLabel(None, None)


@dataclass(frozen=True)
class _Names:
    """Names the user gives, and names the source keeps for class numbers; the first go before the second."""

    given: tuple[str, ...]
    stored: tuple[str, ...]

    @property
    def known(self) -> tuple[str, ...]:
        return self.given or self.stored


def parsed_labels(values: Sequence[LabelValue], problem: str, label_names: Collection[str] = ()) -> list[LabelValue]:
    """Labels of a source that knows only text (CSV): empty is null, numbers and JSON lists are read as such.

    In classification the column decides as a whole: where most labels look like numbers they are numbers, and the
    others stay text, for `label_reader` to refuse.
    """
    stripped = ["" if value is None else str(value).strip() for value, _ in values]
    parse = {"regression": _as_number, "multi_label": _as_list}.get(problem)
    if parse is None:
        present = [text for text in stripped if text]
        num_numbers = sum(text not in label_names and _NUMBER_TEXT.fullmatch(text) is not None for text in present)
        parse = _as_class if num_numbers * 2 > len(present) else _as_text
    kept = set(label_names)
    parsed = [text if text in kept else parse(text) if text else None for text in stripped]
    return [LabelValue(value, place) for value, (_, place) in zip(parsed, values, strict=True)]


def label_reader(
    values: Sequence[LabelValue],
    *,
    column: str,
    problem: str,
    label_names: Sequence[str] | None = None,
    stored_names: Sequence[str] | None = None,
) -> tuple[LabelSpace, Reader]:
    """Looks at all labels once and returns what they mean and the function that reads one.

    Args:
        label_names: The names the user gives. A label is one of them, or its index; where names are themselves
            numbers, integer labels are names.
        stored_names: The names a source keeps for class numbers; used when the user gives none.

    Raises:
        DataError: The labels as a whole make no sense, such as integers with a gap.
    """
    if problem not in _READERS:
        raise DataError(unknown_name("task.problem", "problem", problem, _READERS))
    given = tuple(label_names or ())
    repeated = [name for name, count in Counter(given).items() if count > 1]
    if repeated:
        raise DataError(f"data.label_names: '{repeated[0]}' stands there more than once. Name each class once.")
    present = [value for value in values if value.value is not None]
    names, read = _READERS[problem](present, column, _Names(given, tuple(stored_names or ())))
    return LabelSpace(problem, names), lambda value: _UNLABELLED if value is None else read(value)


def shown(value: object) -> str:
    """A value for a message: ASCII, at most 40 characters."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _as_text(text: str) -> object:
    return text


def _as_number(text: str) -> object:
    try:
        return text if "_" in text else float(text)
    except ValueError:
        return text


def _as_list(text: str) -> object:
    try:
        return json.loads(text) if text.startswith("[") else text
    except (ValueError, RecursionError):
        return text


def _as_class(text: str) -> object:
    if _INTEGER_TEXT.fullmatch(text):
        return int(text.partition(".")[0]) if len(text) < 20 else text
    return float(text) if _NUMBER_TEXT.fullmatch(text) else text


def _integer(value: object) -> int | None:
    """A class number; a whole float is one too, since a column with gaps is stored as floats."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    if _integer(value) is not None:
        return "integer"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, str):
        return "text" if _is_text(value) else "half of a surrogate pair"
    return type(value).__name__


def _is_text(value: object) -> bool:
    """Whether a label can be written down: half of a surrogate pair, which JSON may hold, cannot."""
    if not isinstance(value, str) or value.isascii():
        return isinstance(value, str)
    try:
        return bool(value.encode())
    except UnicodeEncodeError:
        return False


def _single_label(values: Sequence[LabelValue], column: str, names: _Names) -> tuple[tuple[str, ...], Reader]:
    if len(names.given) == 1:
        raise DataError(f"data.label_names: one class only, '{names.given[0]}'. Give at least two.")
    counts = Counter(_kind(value.value) for value in values)
    if counts["float"] * 4 > len(values) and not names.known:
        example = next(value for value in values if _kind(value.value) == "float")
        raise DataError(
            f"data.label: '{column}' holds numbers between classes (first {example.value} at {example.where})."
            " Set task.problem: regression, or name the column of the classes."
        )
    # On a tie the order of _KINDS decides, never the order of the rows.
    usual = max(_KINDS, key=lambda kind: counts[kind])
    known = names.known or _derived_names(values, column, usual)
    index_of = {name: index for index, name in enumerate(known)}
    takes_names = bool(names.known) or usual == "text"
    has_numeric_names = any(_INTEGER_TEXT.fullmatch(name) for name in names.given)

    def read(value: object) -> ReadLabel:
        if isinstance(value, str) and not value.strip():
            return ReadLabel(None, f"{column} is empty")
        if isinstance(value, str) and takes_names and value.strip() in index_of:
            return ReadLabel(index_of[value.strip()], None)
        kind = _kind(value)
        if kind == "NaN":
            return ReadLabel(None, f"{column} is NaN")
        if kind != usual:
            return ReadLabel(None, f"{column} is of another kind: {kind} {shown(value)}, most are {_KINDS[usual]}")
        if isinstance(value, str) or has_numeric_names:
            name = value if isinstance(value, str) else str(_integer(value))
            index = index_of.get(name)
            return ReadLabel(index, f"{column} is not among the label names: {shown(name)}" if index is None else None)
        return _read_index(int(value) if isinstance(value, bool) else _integer(value), len(known), column)

    return known, read


def _read_index(index: int | None, num_classes: int, column: str) -> ReadLabel:
    assert index is not None
    if index < 0:
        return ReadLabel(None, f"{column} is negative: {index} (in many public data sets -1 means no label)")
    if index >= num_classes:
        return ReadLabel(None, f"{column} is out of range: {index} with {num_classes} label names")
    return ReadLabel(index, None)


def _derived_names(values: Sequence[LabelValue], column: str, usual: str) -> tuple[str, ...]:
    if usual == "boolean":
        return ("false", "true")
    if usual == "text":
        texts = {str(value.value).strip() for value in values if _kind(value.value) == "text"} - {""}
        names = tuple(sorted(texts))
    else:
        names = _integer_names([(number, v.where) for v in values if (number := _integer(v.value)) is not None], column)
    if len(names) > _MOST_CLASSES_BY_ACCIDENT and len(names) * 2 > len(values):
        raise DataError(
            f"data.label: '{column}' holds {len(names):,} different labels in {len(values):,} rows."
            " Name the column of the classes, or give label_names."
        )
    return names


def _integer_names(numbers: Sequence[tuple[int, str]], column: str) -> tuple[str, ...]:
    classes = sorted({number for number, _ in numbers if number >= 0})
    if classes and classes[-1] != len(classes) - 1:
        missing = next(number for number, found in enumerate(classes) if number != found)
        first = next(where for number, where in numbers if number == classes[-1])
        listed = ", ".join(map(str, classes[:8])) + (", ..." if len(classes) > 8 else "")
        raise DataError(
            f"data.label: the integers in '{column}' leave a gap: {listed}, but no {missing}"
            f" ({classes[-1]} first stands at {first}). Give label_names, or correct the rows."
        )
    return tuple(str(number) for number in classes)


def _multi_label(values: Sequence[LabelValue], column: str, names: _Names) -> tuple[tuple[str, ...], Reader]:
    lists = [value.value for value in values if isinstance(value.value, list | tuple)]
    num_named = sum(any(isinstance(item, str) for item in items) for items in lists)
    num_flagged = sum(len(items) > 0 for items in lists) - num_named
    if num_named > num_flagged:
        derived = {item.strip() for items in lists for item in items if _is_text(item)} - {""}
        known = names.known or tuple(sorted(derived))
        return known, lambda value: _read_names(value, known, column)
    sizes = Counter(len(items) for items in lists)
    # The most frequent length, on a tie the longest: independent of the order of the rows.
    size = max(sizes, key=lambda length: (sizes[length], length), default=0)
    known = names.known or tuple(str(index) for index in range(size))
    return known, lambda value: _read_flags(value, len(known), column)


def _read_names(value: object, names: Sequence[str], column: str) -> ReadLabel:
    if not isinstance(value, list | tuple):
        return ReadLabel(None, f"{column} is not a list: {shown(value)}")
    unknown = [item for item in value if not isinstance(item, str) or item.strip() not in names]
    if unknown:
        return ReadLabel(None, f"{column} is not among the label names: {shown(unknown[0])}")
    found = {item.strip() for item in value}
    return ReadLabel(tuple(float(name in found) for name in names), None)


def _read_flags(value: object, size: int, column: str) -> ReadLabel:
    if not isinstance(value, list | tuple):
        return ReadLabel(None, f"{column} is not a list: {shown(value)}")
    if len(value) != size:
        return ReadLabel(None, f"{column} has the wrong length: {len(value)}, not {size}")
    wrong = [item for item in value if not isinstance(item, int | float) or item not in (0, 1)]
    if wrong:
        return ReadLabel(None, f"{column} is not all 0 or 1: {shown(wrong[0])}")
    return ReadLabel(tuple(float(item) for item in value), None)


def _regression(values: Sequence[LabelValue], column: str, names: _Names) -> tuple[tuple[str, ...], Reader]:
    if len(names.given) > 1:
        raise DataError(f"data.label_names: {len(names.given)} names, but a regression has one output. Leave them out.")
    return names.given or (column,), lambda value: _read_value(value, column)


def _read_value(value: object, column: str) -> ReadLabel:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ReadLabel(None, f"{column} is not a number: {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isnan(number):
        return ReadLabel(None, f"{column} is NaN")
    return ReadLabel(None, f"{column} is not finite: {number}") if math.isinf(number) else ReadLabel(number, None)


_READERS: Final = {"single_label": _single_label, "multi_label": _multi_label, "regression": _regression}
