"""Statistics of paired values: whether the difference of two methods over the same seeds may be chance."""

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import stats

from flexkd.facts.seeds import LEVEL, smallest_p_value

_INTERVAL_PROBABILITY: Final = 0.95
"""Probability with which the interval of a paired difference covers the true mean difference."""
_POWER: Final = 0.8
_MOST_SEEDS: Final = 100_000
_LARGEST_EFFECT: Final = 20.0
"""Effects from here on need two seeds; beyond it the noncentral t-distribution is evaluated where it overflows."""
RESAMPLES: Final = 1000
"""How often test rows are drawn again."""
_BATCH: Final = 50
"""Resamples that are drawn at a time, so that many rows do not fill the memory."""
_ROUNDING: Final = 1e-12
"""Differences this small, as a share of the values, come from the rounding of float64."""


@dataclass(frozen=True)
class PairedStatistics:
    """What n pairs of values say about the mean of their differences.

    Attributes:
        difference: Mean of value minus reference value.
        low: Lower end of its 95 % confidence interval, by Student's t; None where all differences are equal, which
            leaves no spread to estimate it from.
        high: Upper end.
        p_value: Of the paired t-test; None where all are equal.
        exact_p_value: Of the sign-flip test.
        effect_size: Cohen's d_z, the mean difference divided by the sample standard deviation of the differences; None
            where all are equal.
        seeds_needed: As `seeds_needed` of that effect size.
    """

    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    exact_p_value: float
    effect_size: float | None
    seeds_needed: int | None


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the 95 % confidence interval of the mean of two values or more, by Student's t.

    Example:
        >>> [round(end, 3) for end in mean_interval([0.7, 0.8, 0.9])]
        [0.552, 1.048]
    """
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + _INTERVAL_PROBABILITY) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def percentile_interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Ends of the middle 95 % of values that were drawn again.

    Example:
        >>> [round(end, 6) for end in percentile_interval(np.arange(1001.0))]
        [25.0, 975.0]
    """
    tail = (1 - _INTERVAL_PROBABILITY) / 2
    low, high = np.quantile(values, (tail, 1 - tail)).tolist()
    return low, high


def resampled_sums(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums `[resamples, terms]` over rows that are drawn with replacement, the same rows for all terms.

    Args:
        rows: What each row adds to each sum, `[rows, terms]`.

    Source:
        Efron and Tibshirani, 1993, sec. 13.
    """
    generator, count = np.random.default_rng(0), len(rows)

    def drawn() -> npt.NDArray[np.float64]:
        """How often each row is drawn: a product of matrices in the place of a copy of the rows for each resample."""
        draws = generator.integers(count, size=(_BATCH, count))
        return np.array([np.bincount(draw, minlength=count) for draw in draws], dtype=np.float64)

    return np.concatenate([drawn() @ rows for _ in range(RESAMPLES // _BATCH)])


def resampled_shares(
    first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Shares of right rows of two models that the rows leave possible, `RESAMPLES` draws of each.

    Drawn are the shares of the four outcomes of a pair (both right, one of them, none), from the Dirichlet distribution
    of their counts. Two rows are added, half of one to each outcome, so that models that agree on all of few rows are
    not taken for models that always agree.

    Args:
        first: Which rows the first model has right.
        second: Likewise of the second, in the same order.

    Source:
        Agresti and Min, 2005, who add the two rows to pairs of right and wrong answers.
    """
    outcomes = [(first & second).sum(), (first & ~second).sum(), (~first & second).sum(), (~first & ~second).sum()]
    drawn = np.random.default_rng(0).dirichlet(np.array(outcomes) + 0.5, size=RESAMPLES)
    return drawn[:, 0] + drawn[:, 1], drawn[:, 0] + drawn[:, 2]


def paired_statistics(values: Sequence[float], reference: Sequence[float]) -> PairedStatistics:
    """All statistics of the differences between two series of n >= 2 values that belong together in pairs.

    Source:
        The t-test is Student, 1908, as scipy's `ttest_rel`; d_z is Cohen, 1988, sec. 2.3.5.
    """
    differences = [value - base for value, base in zip(values, reference, strict=True)]
    rounding = _ROUNDING * max(map(abs, [*values, *reference]))
    difference = statistics.fmean(differences)
    exact = sign_flip_p_value(differences, rounding=rounding)
    if max(differences) - min(differences) <= rounding:
        # A t-test of equal differences is 0/0, or made of rounding.
        return PairedStatistics(difference, None, None, None, exact, None, None)
    test = stats.ttest_rel(values, reference)
    interval = test.confidence_interval(_INTERVAL_PROBABILITY)
    effect = 0.0 if abs(difference) <= rounding else difference / statistics.stdev(differences)
    return PairedStatistics(
        difference, float(interval.low), float(interval.high), float(test.pvalue), exact, effect, seeds_needed(effect)
    )


def sign_flip_p_value(differences: Sequence[float], *, rounding: float = 0.0) -> float:
    """Two-sided p of the exact sign-flip test: the share of all 2^n sign patterns with a sum as far from 0.

    If a method makes no difference, each difference could as well have had the other sign; nothing else is assumed, no
    normal distribution for one. Every pattern is counted and none is drawn. The sums of the first and the second half
    of the differences are formed apart, so that time and memory grow with 2^(n/2).

    Args:
        differences: One a pair.
        rounding: Error of a difference; sums that differ by rounding alone are equal.

    Source:
        Fisher, 1935, sec. 21; Pitman, 1937.

    Example:
        >>> sign_flip_p_value([0.1, 0.2, 0.3])
        0.25
    """
    num_pairs = len(differences)
    tolerance = num_pairs * (rounding + _ROUNDING * max(map(abs, differences)))
    least = abs(math.fsum(differences)) - tolerance
    if least <= 0:
        return 1.0
    first = _signed_sums(differences[: num_pairs // 2])
    second = np.sort(_signed_sums(differences[num_pairs // 2 :]))
    num_below = np.searchsorted(second, least - first)
    num_reaching = len(first) * len(second) - int(num_below.sum())
    # The pattern with all signs turned around has the same sum below 0.
    return num_reaching * smallest_p_value(num_pairs)


def _signed_sums(numbers: Sequence[float]) -> npt.NDArray[np.float64]:
    """The sums of n numbers under all 2^n patterns of signs."""
    sums = np.zeros(1)
    for number in numbers:
        sums = np.concatenate([sums + number, sums - number])
    return sums


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: the chance of any false alarm at a level is at most that level.

    Source:
        Holm, 1979.

    Example:
        >>> holm([0.01, 0.04, 0.5])
        [0.03, 0.08, 0.5]
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def seeds_needed(effect_size: float) -> int | None:
    """Seeds with which a paired t-test at the 5 % level finds a true effect of this size in 80 % of comparisons.

    Args:
        effect_size: Cohen's d_z, of either sign.

    Returns:
        None where the effect is 0, or so small that more than 100,000 seeds would be needed.

    Source:
        Cohen, 1988, sec. 2.4.

    Example:
        >>> [seeds_needed(effect) for effect in (0.5, -1.0, 0.0)]
        [34, 10, None]
    """
    if effect_size == 0:
        return None
    effect = min(abs(effect_size), _LARGEST_EFFECT)
    most = 2
    while _power(effect, most) < _POWER:
        most *= 2
        if most > _MOST_SEEDS:
            return None
    numbers = range(max(2, most // 2), most)
    return numbers.start + bisect_left(numbers, _POWER, key=lambda num_seeds: _power(effect, num_seeds))


def _power(effect_size: float, num_seeds: int) -> float:
    """Probability with which a two-sided paired t-test finds a true effect, by the noncentral t-distribution."""
    freedom = num_seeds - 1
    threshold = stats.t.ppf(1 - LEVEL / 2, freedom)
    shift = effect_size * math.sqrt(num_seeds)
    return float(stats.nct.sf(threshold, freedom, shift) + stats.nct.cdf(-threshold, freedom, shift))
