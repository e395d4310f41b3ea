"""What a page shows of a classifier class by class: its figures, which classes it confuses, and rows it has wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from flexkd.record import ClassRecord, Disagreement, Number, RunRecord
from flexkd.report.wording import Row, Table, metric_text

_LONGEST_TEXT: Final = 600
_MOST_CLASSES_SHOWN: Final = 12
"""With more classes, those that lose most come first and the table of all is folded away."""
_MOST_CLASSES_WITH_COUNTS: Final = 12
"""Of a matrix whose cells show numbers; with more they show shades alone."""
_MOST_CLASSES_OF_A_MATRIX: Final = 60
_CONFUSIONS: Final = 10
_FEW_ROWS: Final = 10
_ROLES: Final = ("teacher", "student")


@dataclass(frozen=True)
class MatrixCell:
    """Rows of one label with one prediction.

    Attributes:
        count: Number of rows.
        share: Of the rows of the label, from 0 to 1.
        is_right: Whether label and prediction are the same class.
    """

    count: int
    share: float
    is_right: bool


@dataclass(frozen=True)
class Matrix:
    """The confusion matrix of one model: a row for each label, a column for each prediction.

    Attributes:
        model: Whose it is.
        names: Of the classes.
        cells: Rows of cells.
        has_counts: Whether the cells are wide enough for numbers.
    """

    model: str
    names: Sequence[str]
    cells: Sequence[Sequence[MatrixCell]]
    has_counts: bool


@dataclass(frozen=True)
class ClassView:
    """Everything about classes; empty where a record holds nothing about them.

    Attributes:
        first: The classes, or of many those that lose most.
        all: All of many classes.
        note: How to read the figures.
        matrices: Of teacher and student.
        matrix_note: How to read them, or why there are none.
        confusions: The most frequent pairs of label and wrong prediction.
    """

    first: Table | None = None
    all: Table | None = None
    note: str = ""
    matrices: Sequence[Matrix] = ()
    matrix_note: str = ""
    confusions: Table | None = None


@dataclass(frozen=True)
class ExampleGroup:
    """Rows of one kind under their heading."""

    title: str
    examples: Sequence[Mapping[str, object]] = field(default_factory=list)


def class_view(record: RunRecord) -> ClassView:
    """Figures of each class, confusion matrices and the most frequent confusions."""
    classes = record.classes
    if not classes:
        return ClassView()
    has_many = len(classes) > _MOST_CLASSES_SHOWN
    first = sorted(classes, key=_f1_change)[:_MOST_CLASSES_SHOWN] if has_many else classes
    return ClassView(
        first=_class_table(first),
        all=_class_table(classes) if has_many else None,
        note=_class_note(record, has_many=has_many),
        matrices=_matrices(record),
        matrix_note=_matrix_note(record),
        confusions=_confusions_table(record),
    )


def _f1_change(entry: ClassRecord) -> float:
    """How much better the student is than the teacher in F1; a value that is not defined counts as 0."""
    return float((entry.f1["student"] or 0) - (entry.f1["teacher"] or 0))


def _class_table(classes: Sequence[ClassRecord]) -> Table:
    """Teacher beside student in F1, precision and recall."""
    columns = ["class", "rows", *_ROLES, "change", *_ROLES, *_ROLES]
    groups = [("", 2), ("F1", 3), ("precision", 2), ("recall", 2)]
    rows = []
    for entry in classes:
        figures = [values[role] for values in (entry.f1, entry.precision, entry.recall) for role in _ROLES]
        cells = [metric_text(value) for value in figures]
        cells.insert(2, _change(entry))
        rows.append(Row(entry.name, [f"{entry.support:,}", *cells]))
    return Table(columns, rows, groups)


def _change(entry: ClassRecord) -> str:
    has_both = entry.f1["student"] is not None and entry.f1["teacher"] is not None
    return f"{_f1_change(entry):+.3f}" if has_both else "n/a"


def _class_note(record: RunRecord, *, has_many: bool) -> str:
    classes = record.classes
    rare = sum(entry.support < _FEW_ROWS for entry in classes)
    parts = ["Figures of scikit-learn on the test rows; n/a: 0/0, as the precision of a class that is never predicted."]
    if has_many:
        parts.insert(0, f"The {_MOST_CLASSES_SHOWN} of {len(classes)} classes whose F1 falls most.")
    if rare:
        parts.append(f"{rare:,} of {len(classes):,} classes have fewer than {_FEW_ROWS} test rows: take care there.")
    return " ".join(parts)


def _matrices(record: RunRecord) -> list[Matrix]:
    names = [entry.name for entry in record.classes]
    if len(names) > _MOST_CLASSES_OF_A_MATRIX:
        return []
    return [
        Matrix(role, names, _cells(record.confusion[role], record.classes), len(names) <= _MOST_CLASSES_WITH_COUNTS)
        for role in _ROLES
        if role in record.confusion
    ]


def _cells(counts: Sequence[Sequence[int]], classes: Sequence[ClassRecord]) -> list[list[MatrixCell]]:
    by_pair = {(label, prediction): count for label, prediction, count in counts}
    return [
        [
            MatrixCell(count, count / max(entry.support, 1), label == prediction)
            for prediction in range(len(classes))
            for count in (by_pair.get((label, prediction), 0),)
        ]
        for label, entry in enumerate(classes)
    ]


def _matrix_note(record: RunRecord) -> str:
    if not record.confusion:
        return ""
    if len(record.classes) > _MOST_CLASSES_OF_A_MATRIX:
        return f"Confusion matrices: left out, {len(record.classes):,} classes do not fit on a page."
    note = "A row is a label, a column a prediction: rows of the diagonal are right."
    shades = " The stronger the colour of a cell, the larger its share of the rows of the label."
    return f"{note}{shades}"


def _confusions_table(record: RunRecord) -> Table | None:
    """Pairs of label and wrong prediction, of the student the most frequent first; None for two classes or fewer."""
    if len(record.classes) < 3 or not record.confusion:
        return None
    counts: dict[tuple[int, int], dict[str, int]] = {}
    for role, of_model in record.confusion.items():
        for label, prediction, count in of_model:
            if label != prediction:
                counts.setdefault((label, prediction), {})[role] = count
    order = sorted(counts, key=lambda pair: tuple(-counts[pair].get(role, 0) for role in reversed(_ROLES)))
    names = [entry.name for entry in record.classes]
    rows = [
        Row(names[label], [names[prediction], *(f"{counts[label, prediction].get(role, 0):,}" for role in _ROLES)])
        for label, prediction in order[:_CONFUSIONS]
    ]
    return Table(["label", "taken for", *_ROLES], rows)


def example_groups(record: RunRecord) -> list[ExampleGroup]:
    """Rows that were lost, gained, and wrong in both; rows without a label, and those of a regression, as they are."""
    if record.problem == "regression":
        return _filled([("The answers that differ most", record.disagreements)])
    groups: dict[str, list[Disagreement]] = {"lost": [], "gained": [], "both_wrong": [], "": []}
    wrong = {example.id for example in record.both_wrong}
    for example in record.disagreements:
        if example.label is None:
            groups[""].append(example)
        elif example.label == example.teacher:
            groups["lost"].append(example)
        elif example.label == example.student:
            groups["gained"].append(example)
        elif example.id not in wrong:
            groups["both_wrong"].append(example)
    groups["both_wrong"] = [*record.both_wrong, *([] if record.both_wrong else groups["both_wrong"])]
    return _filled(
        [
            (f"Lost: the teacher is right, the student wrong{_count(record, 'lost')}", groups["lost"]),
            (f"Gained: the student is right, the teacher wrong{_count(record, 'gained')}", groups["gained"]),
            (f"Both wrong{_count(record, 'both_wrong')}: hard rows, or wrong labels", groups["both_wrong"]),
            ("Different answers to rows without a label", groups[""]),
        ]
    )


def _count(record: RunRecord, outcome: str) -> str:
    """In how many of the labelled rows; empty in records of earlier versions."""
    total = sum(record.outcomes.values())
    return f" ({record.outcomes[outcome]:,} of {total:,} rows)" if total else ""


def _filled(groups: Sequence[tuple[str, Sequence[Disagreement]]]) -> list[ExampleGroup]:
    return [ExampleGroup(title, [_shown(example) for example in examples]) for title, examples in groups if examples]


def _shown(example: Disagreement) -> dict[str, object]:
    """A row with its label and the answers and confidences of both models."""

    def colour(answer: str) -> str:
        return "" if example.label is None else "right" if answer == example.label else "wrong"

    def confidence(value: Number | None) -> str:
        return "" if value is None else f"{value:.0%}"

    return {
        "texts": [text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " ..." for text in example.texts],
        "label": example.label,
        "teacher": example.teacher,
        "student": example.student,
        "teacher_class": colour(example.teacher),
        "student_class": colour(example.student),
        "teacher_confidence": confidence(example.teacher_confidence),
        "student_confidence": confidence(example.student_confidence),
    }
