"""The label column of all rows to numbers: class indices, flags or a value, with the names of the classes."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from flexkd.data.examples.label_classes import Classes, LabelNames, PlacedLabel, decide_classes
from flexkd.data.examples.label_values import StoredLabel, shown, stored_labels
from flexkd.data.examples.teacher_labels import ModelLabels, output_order
from flexkd.errors import DataError, unknown_name

Label = int | float | tuple[float, ...]
"""A class index, a value to regress, or one 0/1 flag per class."""


@dataclass(frozen=True)
class LabelSpace:
    """What a model predicts.

    Attributes:
        problem: "single_label", "multi_label" or "regression".
        names: One name per model output; the label of index i is names[i].
        is_ordered: Whether the order of the names says something; False where texts are merely sorted.
    """

    problem: str
    names: tuple[str, ...]
    is_ordered: bool = field(default=True, compare=False)


class LabelValue(NamedTuple):
    """A label as it stands in the source."""

    value: object
    where: str


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one source.

    Attributes:
        is_typed: False where each value is text, as in CSV.
        names: Those that the source keeps for its class numbers, which count them from 0.
    """

    values: Sequence[LabelValue]
    is_typed: bool = True
    names: tuple[str, ...] = ()


class ReadLabel(NamedTuple):
    """A label that was understood, or the reason why not.

    Attributes:
        is_missing: Whether the row has no label, rather than a wrong one.
    """

    label: Label | None
    reason: str | None = None
    is_missing: bool = False


@dataclass(frozen=True)
class ReadLabels:
    """All labels, source by source in the order of their rows.

    Attributes:
        mapping: Which stored value is which class; empty where each value is its own name.
        notes: What was concluded of the classes and a reader has to know.
    """

    space: LabelSpace
    labels: Sequence[Sequence[ReadLabel]]
    mapping: str = ""
    notes: tuple[str, ...] = ()


def read_labels(
    columns: Sequence[LabelColumn],
    *,
    column: str,
    problem: str,
    label_names: LabelNames | None = None,
    teacher: ModelLabels | None = None,
) -> ReadLabels:
    """Looks at all labels at once and says what each of them means.

    Args:
        columns: The sources; equal contents give equal classes, whatever type of file they stand in.
        column: Name of the column.
        label_names: The names of the recipe: the classes in their order, or the class of each stored value.
        teacher: The labels of a teacher that is used as it is. Classes of the same names take its order.

    Raises:
        DataError: The labels as a whole make no sense, or leave open which of them is which class.
        VocabularyError: They are not the teacher's.
    """
    if problem not in _READERS:
        raise DataError(unknown_name("task.problem", "problem", problem, _READERS))
    class_names = label_names or ()
    if not isinstance(class_names, Mapping):
        repeated = [name for name, count in Counter(class_names).items() if count > 1]
        if repeated:
            raise DataError(f"data.label_names: '{repeated[0]}' stands there more than once. Name each class once.")
    names = list(dict.fromkeys(class_names.values())) if isinstance(class_names, Mapping) else list(class_names)
    if problem == "single_label" and len(names) == 1:
        raise DataError(f"data.label_names: one class only, '{names[0]}'. Give at least two.")
    read = _READERS[problem](columns, column, class_names)
    if teacher is None or (problem == "single_label" and len(read.space.names) < 2):
        return read  # rows without a choice are refused for that, whatever the teacher's classes are
    return _as_teacher(read, teacher)


def _as_teacher(read: ReadLabels, teacher: ModelLabels) -> ReadLabels:
    """The same labels with the classes in the order of the teacher's outputs."""
    order = output_order(teacher, read.space)
    notes = (*read.notes, *([order.note] if order.note else []))
    if order.is_same:
        return replace(read, notes=notes)
    space = replace(read.space, names=tuple(read.space.names[index] for index in order.classes), is_ordered=True)
    output_of = {index: output for output, index in enumerate(order.classes)}

    def moved(label: Label | None) -> Label | None:
        if isinstance(label, tuple):
            return tuple(label[index] for index in order.classes)
        return output_of[label] if isinstance(label, int) else label

    labels = [[one._replace(label=moved(one.label)) for one in source] for source in read.labels]
    return ReadLabels(space, labels, read.mapping, notes)


def _single_label(columns: Sequence[LabelColumn], column: str, names: LabelNames) -> ReadLabels:
    file_names = _file_names(columns, column, names)
    read_cells = [stored_labels([value for value, _ in source.values], is_typed=source.is_typed) for source in columns]
    stored = [_coded(labels, source, file_names, column) for source, labels in zip(columns, read_cells, strict=True)]
    placed = [
        PlacedLabel(label, where)
        for source, labels in zip(columns, stored, strict=True)
        for label, (_, where) in zip(labels, source.values, strict=True)
    ]
    classes = decide_classes(placed, column=column, label_names=names, file_names=file_names)
    read = _class_reader(classes, column)
    space = LabelSpace("single_label", classes.names, classes.is_ordered)
    return ReadLabels(space, [[read(label) for label in labels] for labels in stored], classes.mapping, classes.notes)


def _file_names(columns: Sequence[LabelColumn], column: str, names: LabelNames) -> tuple[str, ...]:
    """The names that the sources keep for their class numbers, in the order of the first that has any."""
    named = [source.names for source in columns if source.names]
    if not names and any(set(other) != set(named[0]) for other in named):
        other = next(other for other in named if set(other) != set(named[0]))
        raise DataError(
            f"data.label: the sources name the classes of '{column}' differently: {list(named[0])} and {list(other)}."
            " Set data.label_names to all of them, in the order of the classes."
        )
    return named[0] if named else ()


def _coded(
    labels: Sequence[StoredLabel], source: LabelColumn, file_names: Sequence[str], column: str
) -> list[StoredLabel]:
    """The labels of a source, where a class number says the name that is kept for it."""
    names = source.names
    numbers = {label.number for label in labels if label.number is not None and label.number >= 0}
    if not names and sum(label.number is not None for label in labels) * 2 > len(labels):
        # A source without names beside one with names counts as that one does.
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


def _class_reader(classes: Classes, column: str) -> Callable[[StoredLabel], ReadLabel]:
    index_of = {name: index for index, name in enumerate(classes.names)}

    def read(label: StoredLabel) -> ReadLabel:
        if label.kind == "missing":
            return ReadLabel(None, f"{column} is {label.text}", is_missing=True)
        name, reason = classes.meanings[label.kind, label.text]
        return ReadLabel(None, reason) if name is None else ReadLabel(index_of[name])

    return read


def _multi_label(columns: Sequence[LabelColumn], column: str, names: LabelNames) -> ReadLabels:
    file_names = _file_names(columns, column, names)
    cells = [[_parsed_list(value) for value, _ in source.values] for source in columns]
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
        for labels, (_, where) in zip(source_cells, source.values, strict=True)
        if isinstance(labels, list)
        for label in labels
    ]
    classes = decide_classes(placed, column=column, label_names=names, file_names=file_names)
    read_class = _class_reader(classes, column)

    def read(cell: object) -> ReadLabel:
        if not isinstance(cell, list):
            return _no_list(cell, column)
        items = [read_class(label) for label in cell]
        reason = next((item.reason for item in items if item.reason), None)
        present = {item.label for item in items}
        flags = tuple(float(index in present) for index in range(len(classes.names)))
        return ReadLabel(None, reason) if reason else ReadLabel(flags)

    space = LabelSpace("multi_label", classes.names, classes.is_ordered)
    return ReadLabels(
        space, [[read(cell) for cell in source_cells] for source_cells in stored], classes.mapping, classes.notes
    )


def _stored_lists(cells: Sequence[object], source: LabelColumn, file_names: Sequence[str], column: str) -> list[object]:
    """What the items of the lists of one source say; a cell that is no list stays."""
    items = [item for cell in cells if isinstance(cell, list) for item in cell]
    labels = iter(_coded(stored_labels(items, is_typed=True), source, file_names, column))
    return [[next(labels) for _ in cell] if isinstance(cell, list) else cell for cell in cells]


def _parsed_list(value: object) -> object:
    """A list, also where a source stores it as text; None where there is none."""
    if isinstance(value, list | tuple):
        return list(value)
    text = value.strip() if isinstance(value, str) else None
    if text == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        return json.loads(text) if text is not None and text.startswith("[") else value
    except (ValueError, RecursionError):
        return value


def _no_list(cell: object, column: str) -> ReadLabel:
    if cell is None:
        return ReadLabel(None, f"{column} is null", is_missing=True)
    return ReadLabel(None, f"{column} is not a list: {shown(cell)}")


def _flag(item: object) -> float | None:
    label = stored_labels([item], is_typed=True)[0]
    if label.kind == "boolean":
        return float(label.text.casefold() == "true")
    return float(label.number) if label.number in (0, 1) and label.digits in ("0", "1") else None


def _is_flag(item: object) -> bool:
    return _flag(item) is not None


def _flags(cells: Sequence[Sequence[object]], column: str, names: LabelNames) -> ReadLabels:
    """One 0 or 1 for each class, in the order of the names."""
    sizes = Counter(len(cell) for source_cells in cells for cell in source_cells if isinstance(cell, list))
    # The most frequent length, on a tie the longest: independent of the order of the rows.
    size = max(sizes, key=lambda length: (sizes[length], length), default=0)
    known = _flag_names(names, size)
    if len(known) == 1:
        raise DataError(f"data.label: '{column}' holds one flag a row. Set task.problem: single_label, or give more.")

    def read(cell: object) -> ReadLabel:
        if not isinstance(cell, list):
            return _no_list(cell, column)
        if len(cell) != len(known):
            return ReadLabel(None, f"{column} has the wrong length: {len(cell)}, not {len(known)}")
        flags = [_flag(item) for item in cell]
        if None in flags:
            return ReadLabel(None, f"{column} is not all 0 or 1: {shown(cell[flags.index(None)])}")
        return ReadLabel(tuple(flag for flag in flags if flag is not None))

    return ReadLabels(
        LabelSpace("multi_label", known), [[read(cell) for cell in source_cells] for source_cells in cells]
    )


def _flag_names(names: LabelNames, size: int) -> tuple[str, ...]:
    if not isinstance(names, Mapping):
        return tuple(names) or tuple(str(index) for index in range(size))
    if set(names) != {str(index) for index in range(size)} or len(set(names.values())) < size:
        raise DataError(
            f"data.label_names: the rows hold {size} flags, which a mapping names by their places 0 to {size - 1};"
            f" it has {', '.join(map(shown, names))}. Give a list of {size} names."
        )
    return tuple(names[str(index)] for index in range(size))


def _regression(columns: Sequence[LabelColumn], column: str, names: LabelNames) -> ReadLabels:
    if len(names) > 1:
        raise DataError(f"data.label_names: {len(names)} names, but a regression has one output. Leave them out.")
    space = LabelSpace("regression", tuple(names) or (column,))
    return ReadLabels(
        space,
        [[_read_value(value, column, is_typed=source.is_typed) for value, _ in source.values] for source in columns],
    )


def _read_value(value: object, column: str, *, is_typed: bool) -> ReadLabel:
    label = stored_labels([value], is_typed=is_typed)[0]
    if label.kind == "missing":
        return ReadLabel(None, f"{column} is {label.text}", is_missing=True)
    try:
        # What float() takes besides, as 1_0, no other program writes.
        number = float(label.text) if label.kind != "boolean" and "_" not in label.text else None
    except ValueError:
        number = None
    if number is None:
        return ReadLabel(None, f"{column} is not a number: {shown(value)}")
    return ReadLabel(None, f"{column} is not finite: {number}") if math.isinf(number) else ReadLabel(number)


_READERS: Final = {"single_label": _single_label, "multi_label": _multi_label, "regression": _regression}
