"""The classes of a label column, decided once from the stored values and the names in the file and the recipe."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from flexkd.data.examples.label_values import StoredLabel, fold_case, is_number, short_repr
from flexkd.errors import DataError

LabelNames = Sequence[str] | Mapping[str, str]
"""The classes in their order, or a mapping of stored value to class."""

_KINDS: Final = {"integer": "integers", "boolean": "booleans", "text": "text"}
_WRITABLE: Final = ("integer", "float", "boolean", "text")
_MOST_CLASSES_BY_ACCIDENT: Final = 100
_SHOWN: Final = 12

_Meaning = Callable[[StoredLabel], str | None]


class PlacedLabel(NamedTuple):
    """A label, and where its row is: file and line."""

    label: StoredLabel
    where: str


@dataclass(frozen=True)
class Classes:
    """The classes of a label column.

    Attributes:
        names: The classes in their order.
        is_ordered: Whether the order has a meaning; False where texts are only sorted.
        meanings: By kind and text of a label: its class and None, or None and the reason why it has no class.
        mapping: Which stored value is which class, in words; empty where each value is the name of its class.
        notes: What was concluded about the classes.
    """

    names: tuple[str, ...]
    is_ordered: bool
    meanings: Mapping[tuple[str, str], tuple[str | None, str | None]]
    mapping: str = ""
    notes: tuple[str, ...] = ()


class _LabelCount(NamedTuple):
    """A distinct label, the number of its rows, and where the first of them is."""

    label: StoredLabel
    num_rows: int
    where: str


@dataclass(frozen=True)
class _LabelTable:
    """The distinct labels of a column.

    Attributes:
        name: Name of the column.
        counts: Its distinct labels.
        usual_kind: The kind of most of its rows.
    """

    name: str
    counts: Sequence[_LabelCount]
    usual_kind: str

    @property
    def numbers(self) -> list[_LabelCount]:
        return [entry for entry in self.counts if entry.label.number is not None]

    def of_kind(self, *kinds: str) -> list[_LabelCount]:
        return [entry for entry in self.counts if entry.label.kind in kinds]


@dataclass(frozen=True)
class _Decision:
    """Class names, and the function that gives the class of a label."""

    names: tuple[str, ...]
    meaning: _Meaning
    is_ordered: bool = True
    notes: tuple[str, ...] = ()


def decide_classes(
    labels: Sequence[PlacedLabel], *, column: str, label_names: LabelNames = (), file_names: Sequence[str] = ()
) -> Classes:
    """The classes of a label column and the class of each label.

    Equal contents have equal classes, however they are stored: whole numbers sort as numbers, texts as texts.

    Args:
        labels: Labels of all sources, with the class numbers of a source that stores class names already replaced.
        column: Name of the column, for messages.
        label_names: Names given in the recipe.
        file_names: Class names that a source stores.

    Raises:
        DataError: The classes are ambiguous; the message has a table of the values.
    """
    table = _count_labels(labels, column)
    if isinstance(label_names, Mapping):
        decision = _by_mapping(label_names)
    elif label_names and file_names:
        decision = _renamed(table, label_names, file_names)
    elif label_names or file_names:
        decision = _by_list(table, label_names or file_names)
    else:
        _refuse_fractions(table)
        decision = {"boolean": _booleans, "text": _texts, "integer": _integers}[table.usual_kind](table)
        _refuse_accident(table, decision.names)
    class_names = label_names or file_names
    is_coded = bool(file_names)
    meanings = {
        (entry.label.kind, entry.label.text): _class_of(entry.label, decision, table, class_names, is_coded=is_coded)
        for entry in table.counts
    }
    mapping = _mapping(table, decision.names, meanings)
    notes = tuple(f"data.label: {note}: {mapping}" for note in decision.notes)
    return Classes(decision.names, decision.is_ordered, meanings, mapping, notes)


def one_class_error(where: str, column: str, value: object) -> DataError:
    """The error of rows that all have one label."""
    return DataError(
        f"{where}: every row has the same {column}, {value!r}, so there is nothing to learn."
        " Check data.label and data.where, or give rows of at least two."
    )


def class_table(counts: Iterable[tuple[str, str, int]]) -> str:
    """A table of value, class and number of rows, the most frequent first."""
    ordered = sorted(counts, key=lambda entry: -entry[2])
    lines = [("value", "class", "rows"), *((value, name, f"{count:,}") for value, name, count in ordered[:_SHOWN])]
    widths = [max(len(line[place]) for line in lines) for place in range(3)]
    table = [f"  {value:<{widths[0]}}  {name:<{widths[1]}}  {count:>{widths[2]}}" for value, name, count in lines]
    more = [f"  and {len(ordered) - _SHOWN:,} more values"] if len(ordered) > _SHOWN else []
    return "\n".join([*table, *more])


def _count_labels(labels: Sequence[PlacedLabel], column: str) -> _LabelTable:
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], PlacedLabel] = {}
    for placed in labels:
        if placed.label.kind != "missing":
            key = (placed.label.kind, placed.label.text)
            counts[key] += 1
            first.setdefault(key, placed)
    label_counts = [_LabelCount(first[key].label, count, first[key].where) for key, count in counts.items()]
    of_kind: Counter[str] = Counter()
    for entry in label_counts:
        of_kind[entry.label.kind] += entry.num_rows
    # On a tie the order of _KINDS decides, never the order of the rows.
    return _LabelTable(column, label_counts, max(_KINDS, key=lambda kind: of_kind[kind]))


def _class_of(
    label: StoredLabel, decision: _Decision, table: _LabelTable, class_names: LabelNames, *, is_coded: bool
) -> tuple[str | None, str | None]:
    """The class of a label, or the reason why it has none."""
    name = decision.meaning(label)
    if name is not None:
        return name, None
    is_counted = table.usual_kind == "integer" or is_coded
    if label.number is not None and label.number < 0 and is_counted:
        return None, f"{table.name} is negative: {label.number} (in many public data sets -1 means no label)"
    if label.kind not in _WRITABLE and not table.of_kind(*_WRITABLE):
        return None, f"{table.name} is no number, text or truth: {label.described()}"
    if label.kind not in _WRITABLE:
        return None, f"{table.name} is of another kind: {label.described()}, most are {_KINDS[table.usual_kind]}"
    if isinstance(class_names, Mapping):
        return None, f"{table.name} is no stored value of data.label_names: {short_repr(label.text)}"
    if label.kind == "integer" and is_counted and not any(map(is_number, class_names)):
        return None, f"{table.name} is out of range: {label.number} with {len(decision.names)} label names"
    if label.kind == table.usual_kind or (table.usual_kind == "text" and label.is_text):
        return None, f"{table.name} is not among the label names: {short_repr(label.spelling)}"
    return None, f"{table.name} is of another kind: {label.described()}, most are {_KINDS[table.usual_kind]}"


def _by_mapping(mapping: Mapping[str, str]) -> _Decision:
    spellings = _unique_spellings(mapping)

    def meaning(label: StoredLabel) -> str | None:
        place = str(label.value) if isinstance(label.value, int) and label.kind == "text" else None
        for spelling in (label.text, label.digits, place):
            if spelling is not None and spelling in mapping:
                return mapping[spelling]
        key = spellings.get(fold_case(label.text)) if label.kind in ("text", "boolean") else None
        return None if key is None else mapping[key]

    return _Decision(tuple(dict.fromkeys(mapping.values())), meaning)


def _by_name(names: Collection[str]) -> _Meaning:
    spellings = _unique_spellings(names)

    def meaning(label: StoredLabel) -> str | None:
        if label.kind not in _WRITABLE:
            return None
        exact = next((text for text in (label.text, label.digits) if text is not None and text in names), None)
        return exact or spellings.get(fold_case(label.text))

    return meaning


def _unique_spellings(names: Iterable[str]) -> dict[str, str]:
    """Names by their folded text, without names that differ only in case."""
    names = list(names)
    counts = Counter(map(fold_case, names))
    return {fold_case(name): name for name in names if counts[fold_case(name)] == 1}


def _by_list(table: _LabelTable, names: Sequence[str]) -> _Decision:
    by_name = _by_name(names)
    if table.usual_kind == "text" or any(map(is_number, names)):
        return _Decision(tuple(names), by_name)
    unnamed = [entry for entry in table.of_kind(table.usual_kind) if by_name(entry.label) is None]
    if table.usual_kind == "boolean":
        if unnamed and len(names) != 2:
            raise _ambiguity_error(table, f"true and false are none of the {len(names)} label names", names)
        truth = dict(zip(("false", "true"), names, strict=False)) if unnamed else {}
        return _Decision(
            tuple(names),
            lambda label: by_name(label) or (truth.get(fold_case(label.text)) if label.kind == "boolean" else None),
        )
    start = _first_number(table, [entry.label.number for entry in unnamed if entry.label.number is not None], names)
    places = dict(enumerate(names, start=start))
    notes = (f"the numbers in '{table.name}' start at 1 and are taken for the label names in order",) if start else ()
    return _Decision(
        tuple(names),
        lambda label: by_name(label) or (None if label.number is None else places.get(label.number)),
        notes=notes,
    )


def _first_number(table: _LabelTable, numbers: Sequence[int], names: Sequence[str]) -> int:
    """0 or 1: the class number of the first label name."""
    present, size = {number for number in numbers if number >= 0}, len(names)
    if len(present) < size == len(set(numbers)):
        # Elsewhere -1 means that a row has no label; here it may be the first class.
        raise _ambiguity_error(table, f"{_listed(sorted(set(numbers)))} are as many numbers as label names", names)
    if not present or (0 in present and size not in present):
        return 0
    if present == set(range(1, size + 1)):
        return 1
    listed = _listed(sorted(present))
    raise _ambiguity_error(
        table, f"{listed} are neither 0 to {size - 1} nor 1 to {size}, for {size} label names", names
    )


def _renamed(table: _LabelTable, names: Sequence[str], file_names: Sequence[str]) -> _Decision:
    """Classes where recipe and file both name them: the same names in any order, or new names in the file's order."""
    by_name = _by_name(names)
    matches = [by_name(StoredLabel(name, "text", name)) for name in file_names]
    if all(matches) or set(names) <= set(matches):
        return _by_list(table, names)
    if any(matches) or len(names) != len(file_names):
        raise _ambiguity_error(
            table, f"data.label_names {_listed(names)} are neither the names nor the number of", file_names
        )
    new = _by_mapping(dict(zip(file_names, names, strict=True)))
    note = "the label names are taken for those of the file in order"
    return replace(new, meaning=lambda label: new.meaning(label) or by_name(label), notes=(note,))


def _booleans(table: _LabelTable) -> _Decision:
    return _Decision(("false", "true"), lambda label: label.text.casefold() if label.kind == "boolean" else None)


def _texts(table: _LabelTable) -> _Decision:
    texts = [entry for entry in table.counts if entry.label.is_text and entry.label.kind in _WRITABLE]
    spellings: dict[str, list[_LabelCount]] = {}
    for entry in texts:
        spelling = fold_case(entry.label.text) if entry.label.number is None else str(entry.label.number)
        spellings.setdefault(spelling, []).append(entry)
    _refuse_spellings(table, spellings.values())
    names = tuple(sorted(entry.label.text for entry in texts))
    name_set = set(names)
    return _Decision(
        names, lambda label: label.text if label.is_text and label.text in name_set else None, is_ordered=False
    )


def _integers(table: _LabelTable) -> _Decision:
    spellings: dict[int, dict[str, _LabelCount]] = {}
    for entry in table.numbers:
        if entry.label.number is not None and entry.label.number >= 0 and entry.label.digits is not None:
            spellings.setdefault(entry.label.number, {}).setdefault(entry.label.digits, entry)
    _refuse_spellings(table, [list(digits.values()) for digits in spellings.values()])
    classes = sorted(spellings)
    start = min(classes, default=0)
    if start > 1 or classes != list(range(start, start + len(classes))) or (start == len(classes) == 1):
        raise _gap_error(table, classes)
    names = {number: next(iter(spellings[number])) for number in classes}
    return _Decision(tuple(names.values()), lambda label: None if label.number is None else names.get(label.number))


def _gap_error(table: _LabelTable, classes: Sequence[int]) -> DataError:
    start = 1 if classes[0] == 1 and len(classes) > 1 else 0
    missing = next(number for number in range(start, classes[-1] + 2) if number not in classes)
    where = next(entry.where for entry in table.numbers if entry.label.number == classes[-1])
    return _ambiguity_error(
        table,
        f"the integers in '{table.name}' leave a gap: {_listed(classes)}, but no {missing} "
        f"({short_repr(classes[-1])} first appears at {where})",
    )


def _refuse_spellings(table: _LabelTable, groups: Iterable[Sequence[_LabelCount]]) -> None:
    """Refuse two spellings of one number or name, which may be one class or two."""
    for group in groups:
        if len(group) > 1:
            first, second = sorted(short_repr(entry.label.spelling) for entry in group)[:2]
            raise _ambiguity_error(table, f"'{table.name}' writes {first} and {second}, which may be one class or two")


def _ambiguity_error(table: _LabelTable, fault: str, names: Sequence[str] = ()) -> DataError:
    values = sorted(table.of_kind(*_WRITABLE), key=lambda entry: (entry.label.number or 0, entry.label.spelling))
    if len(values) == 1:  # a mapping of one value names no second class
        return one_class_error("data.label", table.name, values[0].label.spelling)
    example = ", ".join(f"{entry.label.spelling!a}: NAME" for entry in values[:_SHOWN])
    more = ", ..." if len(values) > _SHOWN else ""
    advice = f"Set data.label_names to the name of each stored value: {{{example}{more}}}."
    listed_names = f" {_listed(names)}" if names else ""
    value_table = class_table((short_repr(entry.label.spelling), "?", entry.num_rows) for entry in values)
    return DataError(f"data.label: {fault}{listed_names}. {advice}\n{value_table}")


def _refuse_fractions(table: _LabelTable) -> None:
    fractions = table.of_kind("float")
    if sum(entry.num_rows for entry in fractions) * 4 > sum(entry.num_rows for entry in table.counts):
        raise DataError(
            f"data.label: '{table.name}' holds numbers between classes (first {fractions[0].label.text} at"
            f" {fractions[0].where}). Set task.problem: regression, or name the column of the classes."
        )


def _refuse_accident(table: _LabelTable, names: Sequence[str]) -> None:
    num_rows = sum(entry.num_rows for entry in table.counts)
    if len(names) > _MOST_CLASSES_BY_ACCIDENT and len(names) * 2 > num_rows:
        raise DataError(
            f"data.label: '{table.name}' holds {len(names):,} different labels in {num_rows:,} rows."
            " Name the column of the classes, or give label_names."
        )


def _mapping(
    table: _LabelTable, names: Sequence[str], meanings: Mapping[tuple[str, str], tuple[str | None, str | None]]
) -> str:
    pairs = [
        (entry, name) for entry in table.counts if (name := meanings[entry.label.kind, entry.label.text][0]) is not None
    ]
    if all(fold_case(entry.label.spelling) == fold_case(name) for entry, name in pairs):
        return ""
    ordered = sorted(pairs, key=lambda pair: (names.index(pair[1]), pair[0].label.spelling))
    listed = [
        f"{short_repr(entry.label.spelling)} is {name!a} ({_rows(entry.num_rows)})" for entry, name in ordered[:_SHOWN]
    ]
    return ", ".join(listed) + (", ..." if len(ordered) > _SHOWN else "")


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _listed(values: Sequence[object]) -> str:
    return ", ".join(short_repr(value) for value in values[:8]) + (", ..." if len(values) > 8 else "")
