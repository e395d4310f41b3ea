"""Predictions on disk, so that every reported number can be recomputed, and the rows on which two models differ."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.data.examples.classification import Example
from flexkd.data.examples.labels import Label, LabelSpace
from flexkd.data.sources.json_lines import read_lines, write_lines
from flexkd.errors import ArtifactError
from flexkd.evaluate.classification import Predictions
from flexkd.record import Disagreement


def write_predictions(path: str | Path, predictions: Mapping[str, Predictions]) -> None:
    """Write one JSON line a row: `id`, `label` (null where there is none) and `logits` by model name.

    Floats keep all their digits. A file that is already there is replaced whole or not at all.

    Args:
        path: Ends in .jsonl by habit.
        predictions: By model ("teacher", "student"): the same rows in the same order.
    """
    write_lines(path, _rows(predictions))


def _rows(predictions: Mapping[str, Predictions]) -> Iterator[dict[str, object]]:
    first = next(iter(predictions.values()))
    assert all(one.ids == first.ids for one in predictions.values()), "models were asked about different rows"
    logits = {name: one.logits.tolist() for name, one in predictions.items()}
    for index, (id_, label) in enumerate(zip(first.ids, first.labels.tolist(), strict=True)):
        row_logits = {name: [_number(value) for value in values[index]] for name, values in logits.items()}
        values = [_label(value) for value in label] if isinstance(label, list) else _label(label)
        yield {"id": id_, "label": values, "logits": row_logits}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _label(value: int | float) -> int | float | None:
    return None if value == IGNORE_INDEX or not math.isfinite(value) else value


def read_predictions(path: str | Path) -> dict[str, Predictions]:
    """Read what `write_predictions` has written; a missing label is -100 among integers and NaN among floats.

    Raises:
        ArtifactError: No such file, or a damaged one; with the number of the line.
    """
    rows = read_lines(path, _parsed)
    if any(row[2].keys() != rows[0][2].keys() for row in rows):
        raise ArtifactError(f"{path}: holds not every model for every row. Evaluate again.")
    ids, labels = tuple(row[0] for row in rows), _label_tensor([row[1] for row in rows])
    return {name: Predictions(ids, torch.tensor([row[2][name] for row in rows]), labels) for name in rows[0][2]}


def _parsed(row: Any) -> tuple[str, object, dict[str, list[float]]]:
    """Id, label and logits by model of one line."""
    logits = {
        name: [math.nan if value is None else float(value) for value in values]
        for name, values in row["logits"].items()
    }
    return row["id"], row["label"], logits


def _label_tensor(labels: list[object]) -> Tensor:
    flat = [value for label in labels for value in (label if isinstance(label, list) else [label])]
    if all(value is None or isinstance(value, int) for value in flat):
        return torch.tensor([IGNORE_INDEX if label is None else label for label in labels])
    return torch.tensor([_with_nan(label) for label in labels], dtype=torch.float32)


def _with_nan(label: object) -> object:
    if isinstance(label, list):
        return [_with_nan(value) for value in label]
    return math.nan if label is None else label


@dataclass(frozen=True)
class _Answer:
    """What one model says about one row, in words and in numbers; `right` is None without a label."""

    text: str
    values: Tensor
    confidence: float | None
    right: bool | None


def disagreements(
    examples: Sequence[Example], teacher: Predictions, student: Predictions, labels: LabelSpace, limit: int
) -> list[Disagreement]:
    """Rows on which teacher and student give different answers, the most telling first.

    First those where only the teacher is right, then those where only the student is (half of the places each, or
    what the other leaves), each by the distance between the two answers: total variation for single labels, mean gap
    in probability for several, absolute difference in regression, where the nearer answer is the right one. Places
    that are still free go to rows where both are wrong and to rows without a label.
    """
    by_id = {example.id: example for example in examples}
    student_row = {id_: row for row, id_ in enumerate(student.ids)}
    groups: dict[str, list[tuple[float, Disagreement]]] = {"teacher": [], "student": [], "neither": []}
    for row, id_ in enumerate(teacher.ids):
        example = by_id[id_]
        pair = (teacher.logits[row], student.logits[student_row[id_]])
        taught, said = _answers(pair, example.label, labels)
        if taught.text == said.text:
            continue
        distance = float((taught.values - said.values).abs().sum()) * (0.5 if labels.problem == "single_label" else 1)
        group = "neither" if taught.right == said.right else "teacher" if taught.right else "student"
        truth = _truth(example.label, labels)
        found = Disagreement(
            id_, list(example.texts), truth, taught.text, said.text, taught.confidence, said.confidence
        )
        groups[group].append((distance, found))
    first, second, rest = (
        [found for _, found in sorted(group, key=lambda entry: -entry[0])] for group in groups.values()
    )
    share = min(len(first), max(limit - limit // 2, limit - len(second)))
    return [*first[:share], *second[: limit - share], *rest][:limit]


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
    chosen = int(logits.argmax())
    return _Answer(
        names[chosen], probabilities, float(probabilities[chosen]), None if label is None else chosen == label
    )


def _multi_label_answer(logits: Tensor, label: Label | None, names: Sequence[str]) -> _Answer:
    """Its confidence is the mean over labels of the probability of the decision made."""
    probabilities = logits.double().sigmoid()
    flags = tuple(float(flag) for flag in (logits > 0).tolist())
    confidence = float(torch.maximum(probabilities, 1 - probabilities).mean())
    return _Answer(
        _named(flags, names), probabilities / len(names), confidence, None if label is None else flags == label
    )


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
