"""Intervals of the main metric over test rows: of each model, and of what a student keeps of its teacher."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.nn import functional

from flexkd.evaluate.answers import ModelAnswers
from flexkd.evaluate.classification import Predictions, answers_of, labelled, predicted
from flexkd.evaluate.predictions import right_rows
from flexkd.evaluate.statistics import RESAMPLES, percentile_interval, resampled_shares, resampled_sums
from flexkd.facts.metrics import LOWER_IS_BETTER, ROUGE, SHARES_OF_ROWS
from flexkd.record import RowIntervals

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RowTerms:
    """A metric as a function of sums over rows, so that it can be computed of rows that are drawn again.

    Attributes:
        terms: What each row adds, `[rows, terms]`; NaN for a row that does not count.
        value: The metric of sums `[..., terms]`.
    """

    terms: _Floats
    value: Callable[[_Floats], _Floats]


def classifier_intervals(results: Mapping[str, Predictions], problem: str, metric: str) -> RowIntervals | None:
    """Intervals of all models; None for a metric that is no function of sums over rows.

    Args:
        results: By role or name, all for the same rows; `teacher` and `student` among them.
        problem: As in a recipe.
        metric: Its main metric.
    """
    if SHARES_OF_ROWS.get(metric) == problem:
        right = {name: right_rows(part, problem).numpy() for name, part in results.items()}
        pairs = {name: resampled_shares(right["teacher"], of_model) for name, of_model in right.items()}
        values = {name: second for name, (_, second) in pairs.items()} | {"teacher": pairs["student"][0]}
        how = f"Shares of right and wrong rows drawn {RESAMPLES:,} times, with two rows added (Agresti and Min)."
        return _intervals(values, len(right["teacher"]), metric, how)
    terms = {name: classifier_terms(part, problem, metric) for name, part in results.items()}
    return _of_terms(terms, metric)


def text_intervals(results: Mapping[str, ModelAnswers], metric: str) -> RowIntervals | None:
    """As `classifier_intervals`, of models that write; one that answered fewer rows than the teacher has none."""
    return _of_terms({name: text_terms(answers, metric) for name, answers in results.items()}, metric)


def _of_terms(terms: Mapping[str, RowTerms | None], metric: str) -> RowIntervals | None:
    """Intervals of metrics of sums; None where teacher or student has none."""
    present = {name: part for name, part in terms.items() if part is not None}
    if not {"teacher", "student"} <= present.keys():
        return None
    counted = {name: np.isfinite(part.terms).all(1) for name, part in present.items()}
    rows = counted["teacher"] & counted["student"]
    names = [name for name, of_model in counted.items() if not (rows & ~of_model).any()]
    if not rows.any():
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        # Equally many rows, and therefore the same draws for every model.
        values = {name: present[name].value(resampled_sums(present[name].terms[rows])) for name in names}
    how = f"Test rows drawn again {RESAMPLES:,} times, the same for all models."
    return _intervals(values, int(rows.sum()), metric, how)


def _intervals(values: Mapping[str, _Floats], rows: int, metric: str, description: str) -> RowIntervals | None:
    """Intervals out of the values of all draws; None where teacher or student has draws without a value."""
    teacher, student = values["teacher"], values["student"]
    if not rows or not np.isfinite(teacher).all() or not np.isfinite(student).all():
        return None
    has_share = metric not in LOWER_IS_BETTER and bool((teacher > 0).all())
    return RowIntervals(
        rows=rows,
        models={name: list(percentile_interval(part)) for name, part in values.items() if np.isfinite(part).all()},
        share=list(percentile_interval(student / teacher)) if has_share else [],
        difference=list(percentile_interval(student - teacher)),
        description=description,
    )


def classifier_terms(predictions: Predictions, problem: str, metric: str) -> RowTerms | None:
    """What the labelled rows of a classifier add to a metric; None for one that is no function of sums over rows."""
    keep = labelled(predictions.labels)
    logits, labels = predictions.logits[keep].double(), predictions.labels[keep]
    if not bool(keep.any()) or not bool(logits.isfinite().all()):
        return None
    truth, answers = answers_of(labels, problem), predicted(logits, problem)
    if problem == "regression":
        return _regression_terms(truth.double().numpy(), answers.numpy(), metric)
    if metric == "nll":
        losses = functional.cross_entropy(logits, truth, reduction="none")
        return _mean(losses.numpy())
    if problem == "single_label":
        truth, answers = (functional.one_hot(part, logits.shape[-1]) for part in (truth, answers))
    values = {"macro_f1": _macro_f1, "micro_f1": _micro_f1, "matthews_correlation": _matthews}
    if metric not in values:
        return None
    if problem == "multi_label" and metric == "macro_f1":
        values["macro_f1"] = _macro_f1_of_all
    terms = np.hstack([part.double().numpy() for part in (truth * answers, truth, answers)])
    return RowTerms(terms, values[metric])


def _regression_terms(truth: _Floats, answers: _Floats, metric: str) -> RowTerms | None:
    if metric == "mse":
        return _mean((answers - truth) ** 2)
    if metric != "pearson":
        return None
    first, second = truth - truth.mean(), answers - answers.mean()
    return RowTerms(
        np.stack([np.ones_like(first), first, second, first**2, second**2, first * second], axis=1), _pearson
    )


def text_terms(answers: ModelAnswers, metric: str) -> RowTerms | None:
    """What each row adds to a metric of texts; None for one that is no function of sums over rows or tokens."""
    if metric in ROUGE:
        by_seed = [[np.nan if row is None else row[metric] for row in rows] for rows in answers.rouge.values()]
        return _mean(np.mean(np.array(by_seed, dtype=np.float64), axis=0))
    names = {"nll": "nll", "perplexity": "nll", "token_agreement": "agreements"}
    if metric not in names:
        return None
    rows = [(_sum_of(row, names[metric]), np.nan if row is None else row.tokens) for row in answers.likelihood]
    if metric == "perplexity":
        return RowTerms(np.array(rows, dtype=np.float64), _perplexity)
    return RowTerms(np.array(rows, dtype=np.float64), _ratio)


def _sum_of(row: Any, name: str) -> float:
    value = None if row is None else getattr(row, name)
    return float("nan") if value is None else float(value)


def _mean(values: _Floats) -> RowTerms:
    """A metric that is the mean of a value of each row."""
    return RowTerms(np.stack([values, np.where(np.isnan(values), np.nan, 1.0)], axis=1), _ratio)


def _ratio(sums: _Floats) -> _Floats:
    values: _Floats = sums[..., 0] / sums[..., 1]
    return values


def _perplexity(sums: _Floats) -> _Floats:
    values: _Floats = np.exp(_ratio(sums))
    return values


def _counts(sums: _Floats) -> tuple[_Floats, _Floats, _Floats]:
    """True positives, labels and predictions of each class."""
    hits, labels, answers = np.split(sums, 3, axis=-1)
    return hits, labels, answers


def _macro_f1(sums: _Floats) -> _Floats:
    """Over the classes that occur as label or as prediction."""
    hits, labels, answers = _counts(sums)
    occurs = labels + answers > 0
    values: _Floats = (2 * hits / np.where(occurs, labels + answers, 1)).sum(-1) / occurs.sum(-1)
    return values


def _macro_f1_of_all(sums: _Floats) -> _Floats:
    """Over all classes; one that never occurs and is never predicted has F1 0."""
    hits, labels, answers = _counts(sums)
    values: _Floats = (2 * hits / np.maximum(labels + answers, 1)).mean(-1)
    return values


def _micro_f1(sums: _Floats) -> _Floats:
    hits, labels, answers = _counts(sums)
    values: _Floats = 2 * hits.sum(-1) / np.maximum((labels + answers).sum(-1), 1)
    return values


def _matthews(sums: _Floats) -> _Floats:
    """The correlation of several classes, from the counts alone; NaN where all labels or predictions are the same."""
    hits, labels, answers = _counts(sums)
    rows = labels.sum(-1)
    spread = (rows**2 - (answers**2).sum(-1)) * (rows**2 - (labels**2).sum(-1))
    values: _Floats = (hits.sum(-1) * rows - (labels * answers).sum(-1)) / np.sqrt(np.where(spread > 0, spread, np.nan))
    return values


def _pearson(sums: _Floats) -> _Floats:
    count, first, second, first_squares, second_squares, products = np.moveaxis(sums, -1, 0)
    spread = (count * first_squares - first**2) * (count * second_squares - second**2)
    values: _Floats = (count * products - first * second) / np.sqrt(np.where(spread > 0, spread, np.nan))
    return values
