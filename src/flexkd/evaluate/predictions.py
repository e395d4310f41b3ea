"""Predictions on disk, from which every reported number can be recomputed; classes and rows of two models compared."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.data.examples.classification import Example
from flexkd.data.examples.labels import Label, LabelSpace
from flexkd.data.sources.json_lines import write_lines
from flexkd.evaluate.classification import Predictions, answers_of, labelled, predicted
from flexkd.record import ClassRecord, Disagreement


def write_predictions(path: str | Path, predictions: Mapping[str, Predictions]) -> None:
    """Write one JSON line for each row: `id`, `label` (null if there is none) and `logits` by the name of the model.

    Floats keep all their digits. An existing file is replaced whole or not at all.

    Args:
        path: By convention ends in .jsonl.
        predictions: By the name of the model ("teacher", "student"), all for the same rows in the same order.
    """
    write_lines(path, _rows(predictions))


def _rows(predictions: Mapping[str, Predictions]) -> Iterator[dict[str, object]]:
    first = next(iter(predictions.values()))
    assert all(part.ids == first.ids for part in predictions.values()), (
        "all models predict the same rows in the same order"
    )
    logits = {name: part.logits.tolist() for name, part in predictions.items()}
    for index, (id_, label) in enumerate(zip(first.ids, first.labels.tolist(), strict=True)):
        row_logits = {name: [_number(value) for value in values[index]] for name, values in logits.items()}
        values = [_label(value) for value in label] if isinstance(label, list) else _label(label)
        yield {"id": id_, "label": values, "logits": row_logits}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _label(value: int | float) -> int | float | None:
    return None if value == IGNORE_INDEX or not math.isfinite(value) else value


def class_records(predictions: Mapping[str, Predictions], labels: LabelSpace) -> list[ClassRecord]:
    """Precision, recall, F1 and support of each class, by model; empty for a regression and without labelled rows.

    Those of scikit-learn, but None in place of 0 where one of them is 0/0.

    Args:
        predictions: By the name of the model, all for the same rows.
        labels: The classes; of several labels a row each is a decision of its own.
    """
    first = next(iter(predictions.values()))
    if labels.problem == "regression" or not bool(labelled(first.labels).any()):
        return []
    tables = {name: _class_table(part, labels) for name, part in predictions.items()}
    support = next(iter(tables.values()))[3]
    return [
        ClassRecord(
            name,
            int(support[index]),
            *({model: _number(float(table[row][index])) for model, table in tables.items()} for row in range(3)),
        )
        for index, name in enumerate(labels.names)
    ]


def _class_table(predictions: Predictions, labels: LabelSpace) -> tuple[Any, Any, Any, Any]:
    """Precision, recall, F1 and support of one model, each by class."""
    keep = labelled(predictions.labels)
    truth = answers_of(predictions.labels[keep], labels.problem).numpy()
    answers = predicted(predictions.logits[keep], labels.problem).numpy()
    classes = list(range(len(labels.names)))
    if labels.problem == "multi_label":
        # One label more: scikit-learn would take `[rows, 1]` for a binary problem.
        truth, answers = (np.pad(values, ((0, 0), (0, 1))) for values in (truth, answers))
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(
        truth, answers, labels=classes, average=None, zero_division=np.nan
    )
    return precision, recall, f1, support


def confusion_counts(predictions: Predictions, labels: LabelSpace) -> list[list[int]]:
    """Index of the label, index of the prediction, and how many rows have both; pairs without rows are left out."""
    keep = labelled(predictions.labels)
    if labels.problem != "single_label" or not bool(keep.any()):
        return []
    truth, answers = predictions.labels[keep].numpy(), predictions.logits[keep].argmax(-1).numpy()
    matrix = sklearn_metrics.confusion_matrix(truth, answers, labels=list(range(len(labels.names))))
    return [[int(row), int(column), int(matrix[row, column])] for row, column in np.argwhere(matrix)]


def right_rows(predictions: Predictions, problem: str) -> Bool[Tensor, " rows"]:
    """Which of the labelled rows a classifier has right; with several labels, all of them."""
    keep = labelled(predictions.labels)
    is_same = predicted(predictions.logits[keep], problem) == answers_of(predictions.labels[keep], problem)
    return is_same.flatten(1).all(1) if is_same.ndim > 1 else is_same


def outcomes(teacher: Predictions, student: Predictions, problem: str) -> dict[str, int]:
    """Labelled rows by which of the two models is right; empty for a regression, whose answers are near or far."""
    if problem == "regression":
        return {}
    by_teacher, by_student = right_rows(teacher, problem), right_rows(student, problem)
    groups = {
        "both_right": by_teacher & by_student,
        "lost": by_teacher & ~by_student,
        "gained": ~by_teacher & by_student,
        "both_wrong": ~by_teacher & ~by_student,
    }
    return {name: int(rows.sum()) for name, rows in groups.items()}


@dataclass(frozen=True)
class _Answer:
    """Prediction of one model for one row, in words and in numbers; `is_right` is None without a label."""

    text: str
    values: Tensor
    confidence: float | None
    is_right: bool | None


def disagreements(
    examples: Sequence[Example], teacher: Predictions, student: Predictions, labels: LabelSpace, limit: int
) -> list[Disagreement]:
    """Rows for which teacher and student give different answers.

    First the rows where only the teacher is right, then those where only the student is; each group gets half of the
    limit, or what the other does not need. Then, up to the limit, rows where neither is right or which have no label.
    Every group is ordered by the distance of the two answers: total variation for single labels, mean difference in
    probability for several labels, absolute difference in regression, where the answer nearer to the label counts as
    right.
    """
    by_id = {example.id: example for example in examples}
    student_row = {id_: row for row, id_ in enumerate(student.ids)}
    groups: dict[str, list[tuple[float, Disagreement]]] = {"teacher": [], "student": [], "neither": []}
    for row, id_ in enumerate(teacher.ids):
        example = by_id[id_]
        pair = (teacher.logits[row], student.logits[student_row[id_]])
        by_teacher, by_student = _answers(pair, example.label, labels)
        if by_teacher.text == by_student.text:
            continue
        distance = float((by_teacher.values - by_student.values).abs().sum())
        if labels.problem == "single_label":
            distance *= 0.5
        if by_teacher.is_right == by_student.is_right:
            group = "neither"
        else:
            group = "teacher" if by_teacher.is_right else "student"
        groups[group].append((distance, _row_of(example, by_teacher, by_student, labels)))
    teacher_right, student_right, neither = (
        [disagreement for _, disagreement in sorted(group, key=lambda entry: -entry[0])] for group in groups.values()
    )
    share = min(len(teacher_right), max(limit - limit // 2, limit - len(student_right)))
    return [*teacher_right[:share], *student_right[: limit - share], *neither][:limit]


def both_wrong(
    examples: Sequence[Example], teacher: Predictions, student: Predictions, labels: LabelSpace, limit: int
) -> list[Disagreement]:
    """Labelled rows that teacher and student both have wrong, first those of which the two are surest together.

    These are the hard rows, and those whose label is wrong; none for a regression.
    """
    if labels.problem == "regression":
        return []
    rows = labelled(teacher.labels).nonzero().flatten()
    rows = rows[~right_rows(teacher, labels.problem) & ~right_rows(student, labels.problem)]
    of_rows = (_confidence(part.logits[rows], labels.problem) for part in (teacher, student))
    order = sum(of_rows, torch.zeros(())).argsort(descending=True, stable=True)
    by_id = {example.id: example for example in examples}
    shown = []
    for row in rows[order[:limit]].tolist():
        example = by_id[teacher.ids[row]]
        answers = _answers((teacher.logits[row], student.logits[row]), example.label, labels)
        shown.append(_row_of(example, *answers, labels))
    return shown


def _confidence(logits: Float[Tensor, "rows classes"], problem: str) -> Float[Tensor, " rows"]:
    """Probability of a model's own answer to each row; with several labels, the mean over its decisions."""
    if problem == "single_label":
        return logits.double().softmax(-1).amax(-1)
    return logits.double().abs().sigmoid().mean(-1)


def _row_of(example: Example, by_teacher: _Answer, by_student: _Answer, labels: LabelSpace) -> Disagreement:
    """A row with what both models say."""
    return Disagreement(
        example.id,
        list(example.texts),
        _truth(example.label, labels),
        by_teacher.text,
        by_student.text,
        by_teacher.confidence,
        by_student.confidence,
    )


def _answers(pair: tuple[Tensor, Tensor], label: Label | None, labels: LabelSpace) -> tuple[_Answer, _Answer]:
    if labels.problem == "regression":
        first, second = (logits.double() for logits in pair)
        assert not isinstance(label, tuple), "a regression label is one value"
        nearer = None if label is None else bool((first - label).abs() < (second - label).abs())
        return (
            _Answer(_shown(float(first)), first, None, nearer),
            _Answer(_shown(float(second)), second, None, None if nearer is None else not nearer),
        )
    answer = _multi_label_answer if labels.problem == "multi_label" else _single_label_answer
    return answer(pair[0], label, labels.names), answer(pair[1], label, labels.names)


def _single_label_answer(logits: Tensor, label: Label | None, names: Sequence[str]) -> _Answer:
    probabilities = logits.double().softmax(-1)
    index = int(logits.argmax())
    is_right = None if label is None else index == label
    return _Answer(names[index], probabilities, float(probabilities[index]), is_right)


def _multi_label_answer(logits: Tensor, label: Label | None, names: Sequence[str]) -> _Answer:
    """The confidence is the mean probability of the decisions over all labels."""
    probabilities = logits.double().sigmoid()
    flags = tuple(float(flag) for flag in (logits > 0).tolist())
    confidence = float(torch.maximum(probabilities, 1 - probabilities).mean())
    is_right = None if label is None else flags == label
    return _Answer(_named(flags, names), probabilities / len(names), confidence, is_right)


def _truth(label: Label | None, labels: LabelSpace) -> str | None:
    if label is None:
        return None
    if isinstance(label, tuple):
        return _named(label, labels.names)
    return _shown(label) if labels.problem == "regression" else labels.names[int(label)]


def _named(flags: Sequence[float], names: Sequence[str]) -> str:
    return ", ".join(name for flag, name in zip(flags, names, strict=True) if flag) or "(none)"


def _shown(value: float) -> str:
    return f"{value:.2f}"
