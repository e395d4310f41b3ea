"""Quality against size: intervals of each size, the knee of the curve, and the smallest size that keeps enough."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from flexkd.display.durations import duration_text
from flexkd.evaluate.row_contrasts import RowParts
from flexkd.evaluate.sizes.knees import FEWEST_POINTS, SENSITIVITY, knee_index
from flexkd.evaluate.statistics import (
    RESAMPLES,
    mean_interval,
    paired_statistics,
    percentile_interval,
    resampled_shares,
    resampled_sums,
)
from flexkd.facts.metrics import LOWER_IS_BETTER, SHARES_OF_ROWS, metric_label
from flexkd.sizes_record import Knee, SizeResult, SizesRecord, number_text

_Floats = npt.NDArray[np.float64]

_WORDS: Final = {"size": "size {}", "hidden_size": "hidden size {}", "num_layers": "{} layers"}


def with_curve(record: SizesRecord, parts: Mapping[str, RowParts], teacher: RowParts | None) -> SizesRecord:
    """The record with intervals, shares of the teacher and the knee.

    Intervals are over the seeds by Student's t, or with one seed over test rows that are drawn again, the same for all
    models, where the main metric is a mean over rows or their tokens.

    Args:
        record: With the costs of all models and their metrics.
        parts: Of the one seed, what each row adds to the main metric, by size; empty with several seeds, and where the
            metric is no mean.
        teacher: Likewise of the teacher.
    """
    qualities = [[_value(record, result.name, seed) for seed in record.seeds] for result in record.sizes]
    table = np.array(qualities, dtype=np.float64)  # a value that is not defined becomes NaN
    if not np.isfinite(table).all():
        reason = f"the {metric_label(record.metric)} of a student is not defined"
        return replace(_with_shares(record, None), knee=Knee(None, reason))
    if len(record.seeds) > 1:
        return _over_seeds(record, table)
    rows = _row_table(record, parts, teacher)
    if rows is None:
        return replace(_with_shares(record, None), knee=_knee(record, table.mean(1), []))
    means = _resampled_means(rows)
    record = replace(record, interval_over="rows", rows=len(rows))
    draws = _paired_draws(rows) if _counts_right_rows(record) else [(means[:, 0], column) for column in means[:, 1:].T]
    record = _with_ends(record, [percentile_interval(of_size) for _, of_size in draws])
    record = _with_shares(record, _share_ends(draws))
    record = _with_gaps(record, [percentile_interval(means[:, -1] - of_size) for of_size in means[:, 1:-1].T])
    return replace(record, knee=_knee(record, table.mean(1), list(means[:, 1:])))


def _value(record: SizesRecord, name: str, seed: int) -> float:
    value = next(cell.metrics[record.metric] for cell in record.cells if (cell.method, cell.seed) == (name, seed))
    return np.nan if value is None else float(value)


def _over_seeds(record: SizesRecord, table: _Floats) -> SizesRecord:
    """Intervals and knee from the values `[sizes, seeds]`."""
    ends = [mean_interval(values) for values in table.tolist()]
    teacher = record.teacher.metrics.get(record.metric)
    shares = [(low / teacher, high / teacher) for low, high in ends] if teacher else None
    record = _with_shares(_with_ends(replace(record, interval_over="seeds"), ends), shares)
    gaps = [paired_statistics(table[-1].tolist(), values) for values in table[:-1].tolist()]
    # A gap that is the same for every seed leaves no interval, and nothing in doubt.
    ends = [
        (gap.difference if gap.low is None else gap.low, gap.difference if gap.high is None else gap.high)
        for gap in gaps
    ]
    record = _with_gaps(record, ends)
    return replace(record, knee=_knee(record, table.mean(1), list(table.T)))


def _row_table(record: SizesRecord, parts: Mapping[str, RowParts], teacher: RowParts | None) -> _Floats | None:
    """Sums and weights `[rows, models, 2]` of the teacher and each size; None where a model has none."""
    tables = [teacher, *(parts.get(result.name) for result in record.sizes)]
    if not all(tables):
        return None
    complete = [table for table in tables if table is not None]
    rows = [id_ for id_ in complete[0] if all(id_ in table for table in complete)]
    return np.array([[table[id_] for table in complete] for id_ in rows]) if rows else None


def _resampled_means(rows: _Floats) -> _Floats:
    """Means `[resamples, models]` over rows that are drawn with replacement, the same for all models.

    Args:
        rows: Sums and weights, from `_row_table`.
    """
    totals = resampled_sums(rows.reshape(len(rows), -1)).reshape(-1, *rows.shape[1:])
    means: _Floats = totals[..., 0] / totals[..., 1]
    return means


def _counts_right_rows(record: SizesRecord) -> bool:
    """Whether the main metric is the share of right rows."""
    return SHARES_OF_ROWS.get(record.metric) == record.problem


def _paired_draws(rows: _Floats) -> list[tuple[_Floats, _Floats]]:
    """Shares of right rows of the teacher and of each size, as a run with one student draws them."""
    right = rows[..., 0] > 0
    return [resampled_shares(right[:, 0], of_size) for of_size in right[:, 1:].T]


def _share_ends(draws: Sequence[tuple[_Floats, _Floats]]) -> list[tuple[float, float]] | None:
    """Ends of the intervals of each size's share of the teacher; None where a teacher has nothing to share."""
    if any((teacher <= 0).any() for teacher, _ in draws):
        return None
    return [percentile_interval(of_size / teacher) for teacher, of_size in draws]


def _with_ends(record: SizesRecord, ends: Sequence[tuple[float, float]]) -> SizesRecord:
    pairs = zip(record.sizes, ends, strict=True)
    return replace(record, sizes=[replace(result, low=low, high=high) for result, (low, high) in pairs])


def _with_gaps(record: SizesRecord, ends: Sequence[tuple[float, float]]) -> SizesRecord:
    """The record with what the largest size is better by than each other one.

    Args:
        ends: Of the intervals of its metric minus that of each other size.
    """
    sign = sign_of(record)
    *others, largest = record.sizes
    gaps = [sorted((sign * low, sign * high)) for low, high in ends]
    pairs = zip(others, gaps, strict=True)
    return replace(
        record, sizes=[*(replace(result, behind_low=low, behind_high=high) for result, (low, high) in pairs), largest]
    )


def sign_of(record: SizesRecord) -> int:
    """1 where more of the main metric is better, else -1."""
    return -1 if record.metric in LOWER_IS_BETTER else 1


def _with_shares(record: SizesRecord, ends: Sequence[tuple[float, float]] | None) -> SizesRecord:
    """The record with shares of the teacher, where a ratio says something."""
    teacher = record.teacher.metrics.get(record.metric)
    if teacher is None or teacher <= 0 or record.metric in LOWER_IS_BETTER:
        return record
    results = []
    for index, result in enumerate(record.sizes):
        quality = result.model.metrics.get(record.metric)
        low, high = (None, None) if ends is None else ends[index]
        share = None if quality is None else quality / teacher
        results.append(replace(result, share=share, share_low=low, share_high=high))
    return replace(record, sizes=results)


def _knee(record: SizesRecord, means: _Floats, trials: Sequence[_Floats]) -> Knee:
    """The knee of the means against parameters, and how often curves of other rows or of single seeds have it too.

    Args:
        record: With what the largest size is better by, where that is known.
        means: Mean quality of each size.
        trials: Other curves.
    """
    sign, rise = sign_of(record), record.sizes[0].behind_low
    parameters = [result.model.parameters for result in record.sizes]
    if len(parameters) < FEWEST_POINTS:
        return Knee(None, f"a knee shows from {FEWEST_POINTS} sizes on")
    if rise is not None and rise <= 0:
        return Knee(None, "the largest size is not better than the smallest beyond what chance alone may explain")
    index = knee_index(parameters, (sign * means).tolist())
    if index is None:
        return Knee(None, "the curve bends too little, or the other way")
    repeats = sum(knee_index(parameters, (sign * trial).tolist()) == index for trial in trials)
    return Knee(record.sizes[index].name, repeats=repeats, trials=len(trials))


def size_words(record: SizesRecord, result: SizeResult) -> str:
    """A size in words."""
    words = _WORDS[record.key].format(number_text(result.value))
    return "1 layer" if words == "1 layers" else words


def advice(record: SizesRecord) -> str:
    """Which size is the smallest that keeps the wanted share of the teacher's quality; honest where none does."""
    goal = f"{record.keep * 100:g}% of the teacher's {metric_label(record.metric)}"
    rated = [(result.share, result) for result in record.sizes if result.share is not None]
    if not rated:
        return f"Which size keeps {goal} cannot be said: less of it is better, or it is not defined."
    sure = next((result for _, result in rated if (result.share_low or 0) >= record.keep), None)
    likely = next((result for share, result in rated if share >= record.keep), None)
    if likely is None:
        best = max(rated, key=lambda pair: pair[0])[1]
        return f"No size keeps {goal}: the best, {size_words(record, best)}, keeps {_share_text(best)}."
    words = size_words(record, likely)
    text = f"{capital(words)} is the smallest that keeps {goal}: {_share_text(likely)}."
    if record.interval_over and sure is None:
        text = (
            f"No size keeps {goal} beyond doubt; {words} is the smallest that does on average: {_share_text(likely)}."
        )
    elif sure is not None and sure is not likely:
        text = (
            f"{capital(size_words(record, sure))} is the smallest that keeps {goal} beyond doubt: "
            f"{_share_text(sure)}. {capital(words)} does on average: {_share_text(likely)}."
        )
    return f"{text}{_without_a_model(record)}"


def capital(words: str) -> str:
    """The words as a sentence begins."""
    return words[0].upper() + words[1:]


def _share_text(result: SizeResult) -> str:
    """The share of the teacher, with its interval where there is one."""
    if result.share_low is None or result.share_high is None:
        return f"{result.share:.1%}, without an interval"
    return f"{result.share:.1%}, 95% interval {result.share_low:.1%} to {result.share_high:.1%}"


def _without_a_model(record: SizesRecord) -> str:
    """Which baseline keeps as much, so that keeping it says little."""
    least = record.keep * (record.teacher.metrics.get(record.metric) or 0)
    qualities = {model.name: model.metrics.get(record.metric) for model in record.baselines}
    names = [name for name, quality in qualities.items() if quality is not None and quality >= least]
    return f" So does '{names[0]}', which needs no model: such a share says little here." if names else ""


def knee_text(record: SizesRecord) -> str:
    """Where the curve has its knee and how sure that is, or why it has none."""
    knee = record.knee
    if knee.size is None:
        return f"No knee: {knee.reason}."
    result = next(result for result in record.sizes if result.name == knee.size)
    text = f"Knee: {size_words(record, result)} ({result.model.parameters:,} parameters)."
    if record.interval_over == "seeds":
        return f"{text} The curves of single seeds have it there in {knee.repeats} of {knee.trials} cases."
    if record.interval_over == "rows":
        return f"{text} It is there in {knee.repeats:,} of {knee.trials:,} draws of the test rows."
    return f"{text} Whether chance alone may explain the curve is not known."


def curve_notes(record: SizesRecord) -> list[str]:
    """How the knee and the intervals are determined, and what they do not say."""
    name = metric_label(record.metric)
    knee = (
        f"The knee is determined by Kneedle (Satopaa et al., 2011; sensitivity {SENSITIVITY:g}, no smoothing) on mean "
        f"{name} against parameters, over the sizes that were trained: the point behind which more parameters bring "
        "less than on average. None is marked where the 95% interval of the difference between the largest and the "
        "smallest size holds 0."
    )
    seconds = float(sum(cell.seconds for cell in record.cells))
    added = ", with two rows added (Agresti and Min)" if _counts_right_rows(record) else ""
    intervals = {
        "seeds": f"95% intervals: of the mean over {len(record.seeds)} seeds, by Student's t; other test rows would "
        "change it too.",
        "rows": f"95% intervals: {RESAMPLES:,} times as many test rows drawn again, the same for all models, of "
        f"{record.rows:,}{added}; one seed, so that what other seeds would change is not in them.",
        "": f"There are no intervals: one seed, and {name} is no mean over rows or tokens. Another seed gives some; "
        f"it takes about {duration_text(seconds)} for all sizes, as this one did.",
    }
    return [
        intervals[record.interval_over],
        knee,
        "The same test rows measure and choose: a size that is chosen by them does a little worse on others.",
    ]
