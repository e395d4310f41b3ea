"""Sanity check of a teacher: its metric on some validation rows against a baseline that needs no model."""

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

SANITY_ROWS: Final = 256
"""Largest number of validation rows that are checked."""

FEWEST_ROWS: Final = 50
"""With fewer rows the interval is so wide that a verdict is a warning and never an error."""

Verdict = Literal["sound", "doubtful", "weak", "undecided"]
"""Better than the baseline; not significantly better; not better; or not decidable from these rows."""

_CONFIDENCE: Final = 0.95
_RESAMPLES: Final = 1000
_CLEAR_GAIN: Final = 0.2
"""Gain in accuracy above which another order of the classes is reported."""

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SanityResult:
    """Result of the sanity check.

    Attributes:
        num_rows: Number of labelled rows that were checked.
        figure: The metric, its interval and the baseline, in words.
        verdict: The conclusion.
        hint: A cause that the predictions suggest; may be empty.
        is_certain: Whether the verdict holds whatever the number of rows.
    """

    num_rows: int
    figure: str
    verdict: Verdict
    hint: str = ""
    is_certain: bool = False

    @property
    def stops(self) -> bool:
        """Whether the run should stop: the teacher is weak, and there are enough rows to say so."""
        return self.verdict == "weak" and (self.is_certain or self.num_rows >= FEWEST_ROWS)


def classifier_sanity(predictions: Predictions, problem: str, names: Sequence[str] = ()) -> SanityResult:
    """Sanity check of a classifier or a regressor.

    Single label: weak if the upper end of the 95 % interval of the accuracy (Wilson) is not above the share of the
    most frequent class, doubtful if the lower end is not. Several labels: the same with micro-F1, its bootstrap
    interval over rows, and the F1 of the best constant answer. Regression: weak if the 95 % interval of Pearson's
    correlation (Fisher's z) does not lie above 0.

    Args:
        predictions: Predictions for validation rows.
        problem: `single_label`, `multi_label` or `regression`.
        names: Names of the classes.
    """
    keep = labelled(predictions.labels)
    logits, labels = predictions.logits[keep].double(), predictions.labels[keep]
    if not len(labels):
        return SanityResult(0, "no validation row has a label", "undecided")
    broken = int((~logits.isfinite()).flatten(1).any(1).sum())
    if broken:
        figure = f"{broken} of {len(labels)} validation rows have outputs that are not finite"
        hint = "Its weights are damaged, or too large for the precision they are computed in (teacher.precision)"
        return SanityResult(len(labels), figure, "weak", hint, is_certain=True)
    if problem == "regression":
        return _regression_sanity(logits[:, 0].numpy(), labels.double().reshape(len(labels), -1)[:, 0].numpy())
    if problem == "multi_label":
        return _multi_label_sanity((logits > 0).numpy(), labels.bool().numpy())
    return _single_label_sanity(logits, labels, names)


def _single_label_sanity(logits: Tensor, labels: Tensor, names: Sequence[str]) -> SanityResult:
    num_rows, classes = logits.shape
    truth, predicted = labels.numpy(), logits.argmax(-1).numpy()
    hits = int((truth == predicted).sum())
    share = float(np.bincount(truth).max() / num_rows)
    interval = stats.binomtest(hits, num_rows).proportion_ci(_CONFIDENCE, method="wilson")
    figure = _figure("accuracy", hits / num_rows, interval.low, interval.high, num_rows)
    if share == 1:
        return SanityResult(num_rows, f"{figure}, which are all of one class", "undecided")
    figure += f", where always naming the most frequent class gives {share:.4g}"
    verdict = _verdict(interval.low, interval.high, share)
    confusion = np.zeros((max(classes, truth.max() + 1), classes))
    np.add.at(confusion, (truth, predicted), 1)
    hint = "" if verdict == "sound" else _permutation_hint(confusion, max(hits, 1), names)
    return SanityResult(num_rows, figure, verdict, hint)


def _permutation_hint(confusion: _Floats, hits: int, names: Sequence[str]) -> str:
    """Names the order of the classes that would make the answers right, if there clearly is one."""
    truth, predicted = optimize.linear_sum_assignment(-confusion)
    total = confusion.sum()
    better = confusion[truth, predicted].sum()
    if (better - hits) / total < _CLEAR_GAIN:
        return ""
    class_names = [names[index] if index < len(names) else str(index) for index in range(confusion.shape[1])]
    swaps = [
        f"'{class_names[answer]}' where the data say '{class_names[label]}'"
        for label, answer in zip(truth, predicted, strict=True)
        if label != answer and label < len(class_names) and confusion[label, answer] > 0
    ]
    return f"It says {', '.join(swaps[:3])}: with its classes in another order its accuracy is {better / total:.4g}"


def _multi_label_sanity(predicted: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> SanityResult:
    num_rows = len(truth)
    # Of each row: F1 = 2 * hits / decisions, over the sums of any set of rows.
    hits, decisions = (predicted & truth).sum(1), predicted.sum(1) + truth.sum(1)
    resamples = np.random.default_rng(0).multinomial(num_rows, np.full(num_rows, 1 / num_rows), _RESAMPLES)
    resampled = _f1(resamples @ hits, resamples @ decisions)
    low, high = np.quantile(resampled, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    figure = _figure("micro_f1", float(_f1(hits.sum(), decisions.sum())), low, high, num_rows)
    if (truth == truth[0]).all():
        return SanityResult(num_rows, f"{figure}, which all have the same labels", "undecided")
    frequent = np.sort(truth.sum(0))[::-1].cumsum()
    constant = float(_f1(frequent, num_rows * np.arange(1, len(frequent) + 1) + truth.sum()).max())
    figure += f", where the best answer that is the same for all rows gives {constant:.4g}"
    return SanityResult(num_rows, figure, _verdict(low, high, constant))


def _f1(hits: npt.ArrayLike, decisions: npt.ArrayLike) -> _Floats:
    return np.asarray(2 * np.asarray(hits, dtype=np.float64) / np.maximum(decisions, 1))


def _regression_sanity(values: _Floats, truth: _Floats) -> SanityResult:
    num_rows = len(truth)
    if num_rows < 4 or np.ptp(truth) == 0:
        return SanityResult(
            num_rows, f"{num_rows} validation rows, too few or too alike for a correlation", "undecided"
        )
    if np.ptp(values) <= 1e-6 * np.abs(values).max():
        return SanityResult(num_rows, f"it says {values[0]:.4g} for all of {num_rows} validation rows", "weak")
    result = stats.pearsonr(values, truth)
    interval = result.confidence_interval(_CONFIDENCE)
    figure = _figure("pearson", float(result.statistic), interval.low, interval.high, num_rows)
    return SanityResult(
        num_rows, f"{figure}, where no relation at all gives 0", "sound" if interval.low > 0 else "weak"
    )


def language_model_sanity(
    by_row: Sequence[RowLikelihood],
    training_labels: Iterable[Sequence[int]],
    validation_labels: Iterable[Sequence[int]],
    vocab_size: int,
) -> SanityResult:
    """Sanity check of a language model: weak if its nll is not below that of a unigram model.

    The unigram model has the token frequencies of the training answers, with add-one smoothing.

    Args:
        by_row: Likelihood of each validation answer.
        training_labels: Labels of the training rows; -100 is not supervised.
        validation_labels: Labels of the same validation rows.
        vocab_size: Number of tokens.
    """
    counts = np.bincount(_tokens(training_labels), minlength=vocab_size) + 1
    tokens = sum(row.tokens for row in by_row)
    if not tokens:
        return SanityResult(0, "no validation row has a token to predict", "undecided")
    nll = math.fsum(row.nll for row in by_row) / tokens
    unigram = float(np.log(counts.sum()) - np.log(counts[_tokens(validation_labels)]).mean())
    figure = (
        f"nll {nll:.4g} a token on {len(by_row)} validation rows, where the frequencies of the training answers' "
        f"tokens give {unigram:.4g}"
    )
    is_broken = not math.isfinite(nll)
    return SanityResult(len(by_row), figure, "sound" if nll < unigram else "weak", is_certain=is_broken)


def _tokens(labels: Iterable[Sequence[int]]) -> npt.NDArray[np.int64]:
    parts = [np.asarray(row, dtype=np.int64) for row in labels]
    ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return np.asarray(ids[ids != IGNORE_INDEX])


def _verdict(low: float, high: float, baseline: float) -> Verdict:
    if high <= baseline:
        return "weak"
    return "sound" if low > baseline else "doubtful"


def _figure(metric: str, value: float, low: float, high: float, num_rows: int) -> str:
    return f"{metric} {value:.4g} (95 % interval {low:.4g} to {high:.4g}) on {num_rows} validation rows"
