"""The label column of all rows to class indices, flags or numbers, with the names of the classes."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from flexkd.data.examples.label_classes import Classes, LabelNames, PlacedLabel, decide_classes
from flexkd.data.examples.label_values import StoredLabel, short_repr, stored_labels
from flexkd.data.examples.teacher_labels import ModelLabels, output_order
from flexkd.errors import DataError, unknown_name

Label = int | float | tuple[float, ...]
"""A class index, a number to predict, or one 0/1 flag per class."""


@dataclass(frozen=True)
class LabelSpace:
    """What a model predicts.

    Attributes:
        problem: "single_label", "multi_label" or "regression".
        names: One name per model output; the label of index i is names[i].
        is_ordered: Whether the order of the names has a meaning; False where texts are only sorted.
    """

    problem: str
    names: tuple[str, ...]
    is_ordered: bool = field(default=True, compare=False)


class LabelCell(NamedTuple):
    """One cell of the label column, as the source stores it."""

    value: object
    where: str


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one source.

    Attributes:
        is_typed: False where each value is text, as in CSV.
        names: Class names that the source stores; its class numbers are indices of these, from 0.
    """

    cells: Sequence[LabelCell]
    is_typed: bool = True
    names: tuple[str, ...] = ()


class ParsedLabel(NamedTuple):
    """A label, or None and the reason why a cell holds none.

    Attributes:
        is_missing: Whether the cell is empty, rather than wrong.
    """

    label: Label | None
    reason: str | None = None
    is_missing: bool = False


@dataclass(frozen=True)
class ParsedLabels:
    """All labels, by source in the order of its rows.

    Attributes:
        mapping: Which stored value is which class, in words; empty where each value is the name of its class.
        notes: What was concluded about the classes.
    """

    space: LabelSpace
    labels: Sequence[Sequence[ParsedLabel]]
    mapping: str = ""
    notes: tuple[str, ...] = ()


def read_labels(
    columns: Sequence[LabelColumn],
    *,
    column: str,
    problem: str,
    label_names: LabelNames | None = None,
    teacher: ModelLabels | None = None,
) -> ParsedLabels:
    """Parse all labels of all sources together.

    Args:
        columns: The label column of each source; equal contents give equal classes, whatever the type of the file.
        column: Name of the column.
        label_names: Names given in the recipe: the classes in their order, or the class of each stored value.
        teacher: Labels of a teacher that is used without fine-tuning; classes with its names take its order.

    Raises:
        DataError: The labels as a whole make no sense, or their classes are ambiguous.
        VocabularyError: The labels do not fit the teacher's.
    """
    if problem not in _PARSERS:
        raise DataError(unknown_name("task.problem", "problem", problem, _PARSERS))
    class_names = label_names or ()
    if not isinstance(class_names, Mapping):
        repeated = [name for name, count in Counter(class_names).items() if count > 1]
        if repeated:
            raise DataError(f"data.label_names: '{repeated[0]}' appears more than once. Name each class once.")
    names = list(dict.fromkeys(class_names.values())) if isinstance(class_names, Mapping) else list(class_names)
    if problem == "single_label" and len(names) == 1:
        raise DataError(f"data.label_names: one class only, '{names[0]}'. Give at least two.")
    parsed = _PARSERS[problem](columns, column, class_names)
    if teacher is None or (problem == "single_label" and len(parsed.space.names) < 2):
        return parsed  # a single class is refused later, whatever the teacher's classes are
    return _as_teacher(parsed, teacher)


def _as_teacher(parsed: ParsedLabels, teacher: ModelLabels) -> ParsedLabels:
    """The same labels with the classes in the order of the teacher's outputs."""
    order = output_order(teacher, parsed.space)
    notes = (*parsed.notes, *([order.note] if order.note else []))
    if order.is_same:
        return replace(parsed, notes=notes)
    space = replace(parsed.space, names=tuple(parsed.space.names[index] for index in order.classes), is_ordered=True)
    output_of = {index: output for output, index in enumerate(order.classes)}

    def reorder(label: Label | None) -> Label | None:
        if isinstance(label, tuple):
            return tuple(label[index] for index in order.classes)
        return output_of[label] if isinstance(label, int) else label

    labels = [[entry._replace(label=reorder(entry.label)) for entry in source] for source in parsed.labels]
    return ParsedLabels(space, labels, parsed.mapping, notes)


def _single_label(columns: Sequence[LabelColumn], column: str, names: LabelNames) -> ParsedLabels:
    file_names = _file_names(columns, column, names)
    cells = [stored_labels([value for value, _ in source.cells], is_typed=source.is_typed) for source in columns]
    stored = [_name_codes(labels, source, file_names, column) for source, labels in zip(columns, cells, strict=True)]
    placed = [
        PlacedLabel(label, where)
        for source, labels in zip(columns, stored, strict=True)
        for label, (_, where) in zip(labels, source.cells, strict=True)
    ]
    classes = decide_classes(placed, column=column, label_names=names, file_names=file_names)
    parse = _class_parser(classes, column)
    space = LabelSpace("single_label", classes.names, classes.is_ordered)
    return ParsedLabels(
        space, [[parse(label) for label in labels] for labels in stored], classes.mapping, classes.notes
    )


def _file_names(columns: Sequence[LabelColumn], column: str, names: LabelNames) -> tuple[str, ...]:
    """The class names that the sources store, in the order of the first source that has any."""
    lists = [source.names for source in columns if source.names]
    different = next((file_names for file_names in lists if set(file_names) != set(lists[0])), None)
    if not names and different is not None:
        raise DataError(
            f"data.label: the sources name the classes of '{column}' differently: {list(lists[0])} and "
            f"{list(different)}. Set data.label_names to all of them, in the order of the classes."
        )
    return lists[0] if lists else ()


def _name_codes(
    labels: Sequence[StoredLabel], source: LabelColumn, file_names: Sequence[str], column: str
) -> list[StoredLabel]:
    """The labels of a source, with class numbers replaced by the class names that the source stores."""
    names = source.names
    numbers = {label.number for label in labels if label.number is not None and label.number >= 0}
    if not names and sum(label.number is not None for label in labels) * 2 > len(labels):
        # A source without names uses the class numbers of a source with names.
        names = tuple(file_names)
        if names and (0 not in numbers or len(names) in numbers):
            raise DataError(
                f"data.label: one source of '{column}' has {len(names)} class names, another the numbers"
                f" {', '.join(map(str, sorted(numbers)[:8]))} without names, which may count from 0 or from 1."
                " Write the names into both."
            )
    return [
        replace(label, kind="text", text=names[label.number], digits=None, number=None)
        if label.number is not None and 0 <= label.number < len(names)
        else label
        for label in labels
    ]


def _class_parser(classes: Classes, column: str) -> Callable[[StoredLabel], ParsedLabel]:
    index_of = {name: index for index, name in enumerate(classes.names)}

    def parse(label: StoredLabel) -> ParsedLabel:
        if label.kind == "missing":
            return ParsedLabel(None, f"{column} is {label.text}", is_missing=True)
        name, reason = classes.meanings[label.kind, label.text]
        return ParsedLabel(None, reason) if name is None else ParsedLabel(index_of[name])

    return parse


def _multi_label(columns: Sequence[LabelColumn], column: str, names: LabelNames) -> ParsedLabels:
    file_names = _file_names(columns, column, names)
    cells = [[_parsed_list(value) for value, _ in source.cells] for source in columns]
    lists = [cell for source in cells for cell in source if isinstance(cell, list)]
    flags = sum(len(items) > 0 and all(map(_is_flag, items)) for items in lists)
    if not file_names and flags * 2 > sum(len(items) > 0 for items in lists):
        return _flags(cells, column, names)
    stored = [
        _stored_lists(source_cells, source, file_names, column)
        for source, source_cells in zip(columns, cells, strict=True)
    ]
    placed = [
        PlacedLabel(label, where)
        for source, source_cells in zip(columns, stored, strict=True)
        for labels, (_, where) in zip(source_cells, source.cells, strict=True)
        if isinstance(labels, list)
        for label in labels
    ]
    classes = decide_classes(placed, column=column, label_names=names, file_names=file_names)
    parse_class = _class_parser(classes, column)

    def parse(cell: object) -> ParsedLabel:
        if not isinstance(cell, list):
            return _no_list(cell, column)
        items = [parse_class(label) for label in cell]
        reason = next((item.reason for item in items if item.reason), None)
        present = {item.label for item in items}
        flags = tuple(float(index in present) for index in range(len(classes.names)))
        return ParsedLabel(None, reason) if reason else ParsedLabel(flags)

    space = LabelSpace("multi_label", classes.names, classes.is_ordered)
    return ParsedLabels(
        space, [[parse(cell) for cell in source_cells] for source_cells in stored], classes.mapping, classes.notes
    )


def _stored_lists(cells: Sequence[object], source: LabelColumn, file_names: Sequence[str], column: str) -> list[object]:
    """The lists of one source with their items as stored labels; a cell that is no list stays as it is."""
    items = [item for cell in cells if isinstance(cell, list) for item in cell]
    labels = iter(_name_codes(stored_labels(items, is_typed=True), source, file_names, column))
    return [[next(labels) for _ in cell] if isinstance(cell, list) else cell for cell in cells]


def _parsed_list(value: object) -> object:
    """The list in a cell, also where it is stored as text; None where the cell is empty."""
    if isinstance(value, list | tuple):
        return list(value)
    text = value.strip() if isinstance(value, str) else None
    if text == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        return json.loads(text) if text is not None and text.startswith("[") else value
    except (ValueError, RecursionError):
        return value


def _no_list(cell: object, column: str) -> ParsedLabel:
    if cell is None:
        return ParsedLabel(None, f"{column} is null", is_missing=True)
    return ParsedLabel(None, f"{column} is not a list: {short_repr(cell)}")


def _flag(item: object) -> float | None:
    label = stored_labels([item], is_typed=True)[0]
    if label.kind == "boolean":
        return float(label.text.casefold() == "true")
    return float(label.number) if label.number in (0, 1) and label.digits in ("0", "1") else None


def _is_flag(item: object) -> bool:
    return _flag(item) is not None


def _flags(cells: Sequence[Sequence[object]], column: str, names: LabelNames) -> ParsedLabels:
    """Labels stored as one 0 or 1 per class, in the order of the names."""
    sizes = Counter(len(cell) for source_cells in cells for cell in source_cells if isinstance(cell, list))
    # The most frequent length, on a tie the longest: independent of the order of the rows.
    size = max(sizes, key=lambda length: (sizes[length], length), default=0)
    class_names = _flag_names(names, size)
    if len(class_names) == 1:
        raise DataError(f"data.label: '{column}' holds one flag a row. Set task.problem: single_label, or give more.")

    def parse(cell: object) -> ParsedLabel:
        if not isinstance(cell, list):
            return _no_list(cell, column)
        if len(cell) != len(class_names):
            return ParsedLabel(None, f"{column} has the wrong length: {len(cell)}, not {len(class_names)}")
        flags = [_flag(item) for item in cell]
        if None in flags:
            return ParsedLabel(None, f"{column} is not all 0 or 1: {short_repr(cell[flags.index(None)])}")
        return ParsedLabel(tuple(flag for flag in flags if flag is not None))

    return ParsedLabels(
        LabelSpace("multi_label", class_names), [[parse(cell) for cell in source_cells] for source_cells in cells]
    )


def _flag_names(names: LabelNames, size: int) -> tuple[str, ...]:
    if not isinstance(names, Mapping):
        return tuple(names) or tuple(str(index) for index in range(size))
    if set(names) != {str(index) for index in range(size)} or len(set(names.values())) < size:
        raise DataError(
            f"data.label_names: the rows hold {size} flags, which a mapping names by their places 0 to {size - 1};"
            f" it has {', '.join(map(short_repr, names))}. Give a list of {size} names."
        )
    return tuple(names[str(index)] for index in range(size))


def _regression(columns: Sequence[LabelColumn], column: str, names: LabelNames) -> ParsedLabels:
    if len(names) > 1:
        raise DataError(f"data.label_names: {len(names)} names, but a regression has one output. Leave them out.")
    space = LabelSpace("regression", tuple(names) or (column,))
    return ParsedLabels(
        space,
        [[_parse_number(value, column, is_typed=source.is_typed) for value, _ in source.cells] for source in columns],
    )


def _parse_number(value: object, column: str, *, is_typed: bool) -> ParsedLabel:
    label = stored_labels([value], is_typed=is_typed)[0]
    if label.kind == "missing":
        return ParsedLabel(None, f"{column} is {label.text}", is_missing=True)
    try:
        # float() also accepts 1_0, which no other program writes.
        number = float(label.text) if label.kind != "boolean" and "_" not in label.text else None
    except ValueError:
        number = None
    if number is None:
        comma = ", with a comma where numbers have a point" if "," in label.text else ""
        return ParsedLabel(None, f"{column} is not a number{comma}: {short_repr(value)}")
    return ParsedLabel(None, f"{column} is not finite: {number}") if math.isinf(number) else ParsedLabel(number)


_PARSERS: Final = {"single_label": _single_label, "multi_label": _multi_label, "regression": _regression}
