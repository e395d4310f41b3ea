"""Whether a teacher knows its task at all: its own metric on some validation rows against what needs no model."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats
from torch import Tensor

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.evaluate.classification import Predictions, labelled
from flexkd.evaluate.likelihood import RowLikelihood

LOOK_ROWS: Final = 256
"""Validation rows that are looked at, at equal distances over the split."""

FEWEST_ROWS: Final = 50
"""Below it the interval is so wide that a verdict is a warning and never an error."""

Verdict = Literal["sound", "doubtful", "weak", "undecided"]
"""Better than what needs no model; not shown to be; shown not to be; or the rows cannot tell."""

_CONFIDENCE: Final = 0.95
_RESAMPLES: Final = 1000
_CLEARLY: Final = 0.2

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SanityLook:
    """What a look at a teacher's answers found.

    Attributes:
        rows: Rows with a label that were looked at.
        figure: The metric, its interval and what it is compared with, in words.
        verdict: What follows from it.
        hint: What the answers themselves tell of the cause; empty where they tell nothing.
        is_certain: Whether the verdict hangs on no number of rows.
    """

    rows: int
    figure: str
    verdict: Verdict
    hint: str = ""
    is_certain: bool = False

    @property
    def stops(self) -> bool:
        """Whether the teacher is shown to be of no use, by enough rows where it takes many."""
        return self.verdict == "weak" and (self.is_certain or self.rows >= FEWEST_ROWS)


def spread_rows(rows: Sequence[dict[str, object]], limit: int = LOOK_ROWS) -> list[dict[str, object]]:
    """At most so many rows at equal distances: a split may be sorted by its labels.

    Example:
        >>> spread_rows([{"id": "a"}, {"id": "b"}, {"id": "c"}, {"id": "d"}], 2)
        [{'id': 'a'}, {'id': 'c'}]
    """
    count = min(limit, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def look_at_classes(predictions: Predictions, problem: str, names: Sequence[str] = ()) -> SanityLook:
    """The look at a classifier or a regressor.

    Single label: weak when the upper end of the 95 % interval of the accuracy (Wilson) is not above the share of the
    most frequent class, doubtful when the lower end is not. Several labels: the same with micro-F1, its interval by
    resampling rows, and the F1 of the best answer that is the same for all rows. Regression: weak when the 95 %
    interval of Pearson's correlation (Fisher's z) does not lie above 0.

    Args:
        predictions: Of validation rows.
        problem: `single_label`, `multi_label` or `regression`.
        names: Of the classes.
    """
    keep = labelled(predictions.labels)
    logits, labels = predictions.logits[keep].double(), predictions.labels[keep]
    if not len(labels):
        return SanityLook(0, "no validation row has a label", "undecided")
    broken = int((~logits.isfinite()).flatten(1).any(1).sum())
    if broken:
        figure = f"{broken} of {len(labels)} validation rows have outputs that are not finite"
        why = "Its weights are damaged, or too large for the precision they are computed in (teacher.precision)"
        return SanityLook(len(labels), figure, "weak", why, is_certain=True)
    if problem == "regression":
        return _look_at_values(logits[:, 0].numpy(), labels.double().reshape(len(labels), -1)[:, 0].numpy())
    if problem == "multi_label":
        return _look_at_label_sets((logits > 0).numpy(), labels.bool().numpy())
    return _look_at_single_labels(logits, labels, names)


def _look_at_single_labels(logits: Tensor, labels: Tensor, names: Sequence[str]) -> SanityLook:
    rows, classes = logits.shape
    truth, chosen = labels.numpy(), logits.argmax(-1).numpy()
    hits = int((truth == chosen).sum())
    share = float(np.bincount(truth).max() / rows)
    interval = stats.binomtest(hits, rows).proportion_ci(_CONFIDENCE, method="wilson")
    figure = _figure("accuracy", hits / rows, interval.low, interval.high, rows)
    if share == 1:
        return SanityLook(rows, f"{figure}, which are all of one class", "undecided")
    figure += f", where always naming the most frequent class gives {share:.4g}"
    verdict = _verdict(interval.low, interval.high, share)
    confusion = np.zeros((max(classes, truth.max() + 1), classes))
    np.add.at(confusion, (truth, chosen), 1)
    return SanityLook(rows, figure, verdict, "" if verdict == "sound" else _permutation(confusion, max(hits, 1), names))


def _permutation(confusion: _Floats, hits: int, names: Sequence[str]) -> str:
    """Says which order of the classes would make the answers right, where one clearly does."""
    truth, chosen = optimize.linear_sum_assignment(-confusion)
    total = confusion.sum()
    better = confusion[truth, chosen].sum()
    if (better - hits) / total < _CLEARLY:
        return ""
    called = [names[index] if index < len(names) else str(index) for index in range(confusion.shape[1])]
    moved = [
        f"'{called[answer]}' where the data say '{called[label]}'"
        for label, answer in zip(truth, chosen, strict=True)
        if label != answer and label < len(called) and confusion[label, answer] > 0
    ]
    return f"It says {', '.join(moved[:3])}: with its classes in another order its accuracy is {better / total:.4g}"


def _look_at_label_sets(chosen: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> SanityLook:
    rows = len(truth)
    both, either = (chosen & truth).sum(1), chosen.sum(1) + truth.sum(1)
    drawn = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), _RESAMPLES)
    resampled = _f1(drawn @ both, drawn @ either)
    low, high = np.quantile(resampled, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    figure = _figure("micro_f1", float(_f1(both.sum(), either.sum())), low, high, rows)
    if (truth == truth[0]).all():
        return SanityLook(rows, f"{figure}, which all have the same labels", "undecided")
    frequent = np.sort(truth.sum(0))[::-1].cumsum()
    constant = float(_f1(frequent, rows * np.arange(1, len(frequent) + 1) + truth.sum()).max())
    figure += f", where the best answer that is the same for all rows gives {constant:.4g}"
    return SanityLook(rows, figure, _verdict(low, high, constant))


def _f1(both: npt.ArrayLike, either: npt.ArrayLike) -> _Floats:
    return np.asarray(2 * np.asarray(both, dtype=np.float64) / np.maximum(either, 1))


def _look_at_values(values: _Floats, truth: _Floats) -> SanityLook:
    rows = len(truth)
    if rows < 4 or np.ptp(truth) == 0:
        return SanityLook(rows, f"{rows} validation rows, too few or too alike for a correlation", "undecided")
    if np.ptp(values) <= 1e-6 * np.abs(values).max():
        return SanityLook(rows, f"it says {values[0]:.4g} for all of {rows} validation rows", "weak")
    result = stats.pearsonr(values, truth)
    interval = result.confidence_interval(_CONFIDENCE)
    figure = _figure("pearson", float(result.statistic), interval.low, interval.high, rows)
    return SanityLook(rows, f"{figure}, where no relation at all gives 0", "sound" if interval.low > 0 else "weak")


def look_at_likelihood(
    rows: Sequence[RowLikelihood], answers: Iterable[Sequence[int]], asked: Iterable[Sequence[int]], outputs: int
) -> SanityLook:
    """The look at a language model: weak when its nll is not below that of a unigram model.

    The unigram model knows how often each token stands in the training answers, plus one for each token.

    Args:
        rows: Likelihood of validation answers.
        answers: Labels of the training rows, -100 where nothing is asked.
        asked: Labels of these validation rows.
        outputs: Tokens that there are.
    """
    counts = np.bincount(_tokens(answers), minlength=outputs) + 1
    tokens = sum(row.tokens for row in rows)
    if not tokens:
        return SanityLook(0, "no validation row has a token to predict", "undecided")
    nll = math.fsum(row.nll for row in rows) / tokens
    unigram = float(np.log(counts.sum()) - np.log(counts[_tokens(asked)]).mean())
    figure = (
        f"nll {nll:.4g} a token on {len(rows)} validation rows, where the frequencies of the training answers' tokens "
        f"give {unigram:.4g}"
    )
    is_broken = not math.isfinite(nll)
    return SanityLook(len(rows), figure, "sound" if nll < unigram else "weak", is_certain=is_broken)


def _tokens(labels: Iterable[Sequence[int]]) -> npt.NDArray[np.int64]:
    parts = [np.asarray(row, dtype=np.int64) for row in labels]
    ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return np.asarray(ids[ids != IGNORE_INDEX])


def _verdict(low: float, high: float, baseline: float) -> Verdict:
    if high <= baseline:
        return "weak"
    return "sound" if low > baseline else "doubtful"


def _figure(metric: str, value: float, low: float, high: float, rows: int) -> str:
    return f"{metric} {value:.4g} (95 % interval {low:.4g} to {high:.4g}) on {rows} validation rows"
