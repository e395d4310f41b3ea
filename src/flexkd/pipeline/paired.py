"""Methods of a comparison against a reference, seed by seed: means, spreads and paired t-tests."""

import statistics
from collections.abc import Sequence
from typing import Final

from scipy import stats

from flexkd.record import CompareCell, PairedDifference

CONFIDENCE: Final = 0.95


def paired_differences(
    cells: Sequence[CompareCell], methods: Sequence[str], seeds: Sequence[int], metric: str, reference: str
) -> list[PairedDifference]:
    """Mean and spread of each method, and its difference to the reference seed by seed with a paired t-test.

    `low` and `high` are the 95 % confidence interval of the mean difference. A method with an undefined value has
    neither mean nor difference.
    """
    values = {(cell.method, cell.seed): cell.metrics[metric] for cell in cells}
    reference_values = _defined([values[reference, seed] for seed in seeds])
    table = []
    for method in methods:
        method_values = _defined([values[method, seed] for seed in seeds])
        if method_values is None:
            table.append(PairedDifference(method, None, None, None, None, None, None))
            continue
        mean, std = statistics.fmean(method_values), statistics.stdev(method_values)
        if method == reference or reference_values is None:
            table.append(PairedDifference(method, mean, std, None, None, None, None))
            continue
        difference, low, high, p_value = _paired_test(method_values, reference_values)
        table.append(PairedDifference(method, mean, std, difference, low, high, p_value))
    return table


def _defined(values: Sequence[float | None]) -> list[float] | None:
    """The values as floats; None where one of them is undefined."""
    numbers = [float(value) for value in values if value is not None]
    return numbers if len(numbers) == len(values) else None


def _paired_test(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float, float | None]:
    """The mean difference, its interval, and the p-value of a paired t-test."""
    differences = [value - base for value, base in zip(values, reference, strict=True)]
    difference = statistics.fmean(differences)
    if max(differences) - min(differences) <= 1e-12 * max(map(abs, [*values, *reference])):
        # A t-test of equal differences is 0/0, or made of rounding; there is nothing to estimate.
        return difference, difference, difference, None
    test = stats.ttest_rel(values, reference)
    interval = test.confidence_interval(CONFIDENCE)
    return difference, float(interval.low), float(interval.high), float(test.pvalue)
