"""Predictions on disk, from which every reported number can be recomputed, and the rows on which two models differ."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.data.examples.classification import Example
from flexkd.data.examples.labels import Label, LabelSpace
from flexkd.data.sources.json_lines import write_lines
from flexkd.evaluate.classification import Predictions
from flexkd.record import Disagreement


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
        disagreement = Disagreement(
            id_,
            list(example.texts),
            _truth(example.label, labels),
            by_teacher.text,
            by_student.text,
            by_teacher.confidence,
            by_student.confidence,
        )
        groups[group].append((distance, disagreement))
    teacher_right, student_right, neither = (
        [disagreement for _, disagreement in sorted(group, key=lambda entry: -entry[0])] for group in groups.values()
    )
    share = min(len(teacher_right), max(limit - limit // 2, limit - len(student_right)))
    return [*teacher_right[:share], *student_right[: limit - share], *neither][:limit]


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
