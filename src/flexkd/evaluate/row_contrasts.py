"""Methods compared row by row: test rows that one repairs or breaks, and differences over rows resampled jointly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import stats

from flexkd.compare_record import CompareRecord, RowContrast
from flexkd.data.sources.json_lines import read_lines
from flexkd.evaluate.rouge import bootstrap_interval
from flexkd.facts.metrics import LOWER_IS_BETTER, ROUGE

RowValues = Mapping[str, float]
"""Value of a row metric for each test row of one student, by the row's id."""

RowParts = Mapping[str, tuple[float, float]]
"""What each test row of one model adds to a metric, by the row's id: to a sum, and to the weight that divides it."""

_TOKEN_SUMS: Final = {"nll": "nll", "token_agreement": "agreements"}
"""Metrics of texts that are sums over tokens, each token the same weight, and the names of these sums of a row."""

_ROW_METRICS: Final = {"single_label": "accuracy", "multi_label": "subset_accuracy", "regression": "mse"}
_RESAMPLES: Final = 4000
_ROUNDING: Final = 1e-12


def row_metric(problem: str, metric: str) -> str:
    """The metric that is compared row by row: one that is the mean of a value of each row.

    Args:
        problem: As in a recipe.
        metric: That of the task; taken if it is such a mean.
    """
    if problem == "generation":
        return metric if metric in ROUGE else "rougeL"
    return _ROW_METRICS[problem]


def read_row_values(path: Path, problem: str, metric: str, model: str = "student") -> dict[str, float] | None:
    """The values of a model's rows, from the predictions that its task has written; None where there are none.

    Rows without a label or a reference have no value.

    Args:
        metric: From `row_metric`.
        model: Its name in the file.

    Raises:
        ArtifactError: The file is damaged.
    """
    if not path.is_file():
        return None
    values = read_lines(path, lambda row: (str(row["id"]), _row_value(row, problem, metric, model)))
    return {id_: value for id_, value in values if value is not None}


def read_row_parts(path: Path, problem: str, metric: str, model: str) -> RowParts | None:
    """What each row adds to a metric, from the predictions that a task has written.

    A metric that is a mean over rows gives each row the weight 1; one that is a mean over tokens their number.

    Args:
        model: Its name in the file.

    Returns:
        None where the metric is no such ratio of sums over rows, or there are no predictions.

    Raises:
        ArtifactError: The file is damaged.
    """
    if problem == "generation" and metric in _TOKEN_SUMS and path.is_file():
        sums = read_lines(path, lambda row: (str(row["id"]), row["models"][model]["likelihood"]))
        parts = {id_: (of_row[_TOKEN_SUMS[metric]], of_row["tokens"]) for id_, of_row in sums if of_row is not None}
        return parts if all(part is not None for part, _ in parts.values()) else None
    if row_metric(problem, metric) != metric:
        return None
    values = read_row_values(path, problem, metric, model)
    return None if values is None else {id_: (value, 1.0) for id_, value in values.items()}


def _row_value(row: Mapping[str, Any], problem: str, metric: str, model: str) -> float | None:
    """Value of one row; with several decodings, their mean."""
    if problem == "generation":
        answers = row["models"][model]["answers"].values()
        scores = [answer["rouge"][metric] for answer in answers if answer["rouge"] is not None]
        return float(np.mean(scores)) if scores and None not in scores else None
    label, logits = row["label"], [math.nan if value is None else value for value in row["logits"][model]]
    if label is None or (isinstance(label, list) and None in label):
        return None
    if problem == "single_label":
        return float(int(np.argmax(logits)) == label)
    if problem == "multi_label":
        return float([float(value > 0) for value in logits] == [float(value) for value in label])
    return float((logits[0] - label) ** 2)


def with_row_contrasts(record: CompareRecord, values: Mapping[tuple[str, int], RowValues]) -> CompareRecord:
    """The record with every method compared row by row with the reference, and so the pairs of each contrast.

    A pair is left out where some of its students have no values.

    Args:
        values: By method and seed.
    """
    pairs = [(method, record.reference) for method in record.methods if method != record.reference]
    pairs += [(contrast.method, contrast.reference) for contrast in record.contrasts]
    complete = [method for method in record.methods if all(values.get((method, seed)) for seed in record.seeds)]
    compared = [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(complete)]
    metric = row_metric(record.problem, record.metric)
    return replace(record, row_contrasts=row_contrasts(values, compared, record.seeds, metric))


def row_contrasts(
    values: Mapping[tuple[str, int], RowValues], pairs: Sequence[tuple[str, str]], seeds: Sequence[int], metric: str
) -> list[RowContrast]:
    """Each pair of a method and its reference over the same rows, resampled alike for all pairs.

    Rows that repair or break are counted seed by seed. The exact test asks whether, over other test rows, the method is
    better as often as worse; its units are rows, whose differences are summed over the seeds first, as one row under
    several seeds is not several rows. With one seed and right or wrong answers it is McNemar's exact test.

    Source:
        McNemar, 1947; the sign test, Arbuthnott, 1710; the percentile interval of paired resamples, Efron and
        Tibshirani, 1993, sec. 13, in use for answers since Koehn, 2004.
    """
    if not pairs:
        return []
    methods = dict.fromkeys(method for pair in pairs for method in pair)
    tables = [values[method, seed] for method in methods for seed in seeds]
    rows = [id_ for id_ in tables[0] if all(id_ in table for table in tables)]
    arrays = {
        method: np.array([[values[method, seed][id_] for seed in seeds] for id_ in rows]).reshape(len(rows), len(seeds))
        for method in methods
    }
    differences = [arrays[method] - arrays[reference] for method, reference in pairs]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return [_contrast(pair, metric, sign, difference) for pair, difference in zip(pairs, differences, strict=True)]


def better_and_worse(record: CompareRecord) -> tuple[str, str]:
    """What rows on which a method is better and worse are called: a classifier repairs and breaks them."""
    return ("repairs", "breaks") if record.problem in ("single_label", "multi_label") else ("better", "worse")


def row_contrasts_note(record: CompareRecord) -> str:
    """How the comparison of rows was made, in a few sentences; empty where none was."""
    if not record.row_contrasts:
        return ""
    metric, rows = record.row_contrasts[0].metric, record.row_contrasts[0].rows
    better, worse = better_and_worse(record)
    test = "McNemar's exact test" if len(record.seeds) == 1 and better == "repairs" else "the exact sign test"
    return (
        f"{better.capitalize()} and {worse}: of {rows:,} test rows those on which a method is better or worse than the "
        f"other with the same seed, in {metric}; mean over seeds. p: {test} over rows, summed over the seeds. The "
        "interval is over test rows that are drawn again, the same for all methods; it says what other rows would "
        "change, and not what other students would."
    )


def _contrast(pair: tuple[str, str], metric: str, sign: int, difference: npt.NDArray[np.float64]) -> RowContrast:
    """One pair, from the differences `[rows, seeds]` of its values."""
    gains, sums = sign * difference, sign * difference.sum(1)
    rows_better, rows_worse = int((sums > _ROUNDING).sum()), int((sums < -_ROUNDING).sum())
    decided = rows_better + rows_worse
    # Every pair draws with the same seed from equally many rows, and therefore the same rows.
    low, high = bootstrap_interval(difference.mean(1).tolist(), resamples=_RESAMPLES)
    return RowContrast(
        method=pair[0],
        reference=pair[1],
        metric=metric,
        rows=len(difference),
        better=float((gains > _ROUNDING).sum(0).mean()),
        worse=float((gains < -_ROUNDING).sum(0).mean()),
        rows_better=rows_better,
        rows_worse=rows_worse,
        p_value=float(stats.binomtest(rows_better, decided).pvalue) if decided else 1.0,
        difference=float(difference.mean()),
        low=low,
        high=high,
    )
