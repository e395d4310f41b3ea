"""Reads predictions.jsonl as an outside program would, to prove that every reported number follows from the file."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.evaluate.answers import ModelAnswers, Question
from flexkd.evaluate.classification import Predictions
from flexkd.evaluate.generation import Answer
from flexkd.evaluate.likelihood import RowLikelihood


def stored_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of the file; not `splitlines`, as a text may hold other line separators."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def stored_answers(path: Path) -> tuple[list[Question], dict[str, ModelAnswers]]:
    """Questions and answers of a generation task; a sum that was not finite is NaN."""
    rows = stored_rows(path)
    questions = [Question(row["id"], row["prompt"], tuple(row["references"])) for row in rows]
    return questions, {name: _model_answers(rows, name) for name in rows[0]["models"]}


def stored_metrics(path: Path) -> dict[str, dict[str, float | None]]:
    """The metrics of each model of a generation task, recomputed from the file."""
    return {name: model.metrics() for name, model in stored_answers(path)[1].items()}


def stored_predictions(path: Path) -> dict[str, Predictions]:
    """Predictions of a classification task; a missing label is -100 among integers and NaN among floats."""
    rows = stored_rows(path)
    ids, labels = tuple(row["id"] for row in rows), _labels([row["label"] for row in rows])
    logits = {name: [_with_nan(row["logits"][name]) for row in rows] for name in rows[0]["logits"]}
    return {name: Predictions(ids, torch.tensor(values), labels) for name, values in logits.items()}


def _model_answers(rows: list[dict[str, Any]], name: str) -> ModelAnswers:
    by_row = [(row["id"], row["models"][name]) for row in rows]
    seeds = list(by_row[0][1]["answers"])
    return ModelAnswers(
        {int(seed): tuple(_answer(id_, part["answers"].get(seed)) for id_, part in by_row) for seed in seeds},
        {int(seed): tuple(part["answers"].get(seed, {"rouge": None})["rouge"] for _, part in by_row) for seed in seeds},
        tuple(_likelihood(id_, part["likelihood"]) for id_, part in by_row),
    )


def _answer(id_: str, entry: dict[str, Any] | None) -> Answer | None:
    return None if entry is None else Answer(id_, entry["text"], entry["num_tokens"], entry["is_cut"])


def _likelihood(id_: str, sums: dict[str, Any] | None) -> RowLikelihood | None:
    if sums is None:
        return None
    kl = _with_nan(sums["kl"]) if "kl" in sums else None
    return RowLikelihood(id_, sums["tokens"], _with_nan(sums["nll"]), sums.get("agreements"), kl)


def _labels(labels: list[Any]) -> Tensor:
    flat = [value for label in labels for value in (label if isinstance(label, list) else [label])]
    if all(value is None or isinstance(value, int) for value in flat):
        return torch.tensor([IGNORE_INDEX if label is None else label for label in labels])
    return torch.tensor([_with_nan(label) for label in labels], dtype=torch.float32)


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(part) for part in value]
    return math.nan if value is None else value
