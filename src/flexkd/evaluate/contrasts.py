"""Figures of a comparison over its seeds: the mean of each method, and the statistics of each named contrast."""

import dataclasses
import statistics
from collections.abc import Sequence

from flexkd.compare_record import CompareCell, CompareRecord, Contrast, PairedDifference
from flexkd.evaluate.statistics import holm, paired_statistics
from flexkd.facts.seeds import LEVEL, fewest_seeds, smallest_p_value


def paired_differences(
    cells: Sequence[CompareCell], methods: Sequence[str], seeds: Sequence[int], metric: str, reference: str
) -> list[PairedDifference]:
    """Mean and spread of each method, and its difference to the reference seed by seed with a paired t-test.

    `low` and `high` are the 95 % confidence interval of the mean difference. A method with an undefined value has
    neither mean nor difference.
    """
    reference_values = _values(cells, reference, seeds, metric)
    table = []
    for method in methods:
        values = _values(cells, method, seeds, metric)
        if values is None:
            table.append(PairedDifference(method, None, None, None, None, None, None))
            continue
        mean, std = statistics.fmean(values), statistics.stdev(values)
        if method == reference or reference_values is None:
            table.append(PairedDifference(method, mean, std, None, None, None, None))
            continue
        paired = paired_statistics(values, reference_values)
        table.append(PairedDifference(method, mean, std, paired.difference, paired.low, paired.high, paired.p_value))
    return table


def with_contrasts(
    record: CompareRecord, contrasts: Sequence[tuple[str, str]], *, named_after_results: bool = False
) -> CompareRecord:
    """The record with the statistics of each contrast, a method and its reference, corrected for their number.

    A contrast with an undefined value has no statistics; it counts in the correction, since it was named.

    Args:
        named_after_results: Whether a student was finished before these contrasts were named.
    """
    return dataclasses.replace(
        record,
        contrasts=_contrasts(record.cells, contrasts, record.seeds, record.metric),
        level=LEVEL,
        smallest_p_value=smallest_p_value(len(record.seeds)),
        fewest_seeds=fewest_seeds(len(contrasts)),
        named_after_results=named_after_results,
    )


def _contrasts(
    cells: Sequence[CompareCell], contrasts: Sequence[tuple[str, str]], seeds: Sequence[int], metric: str
) -> list[Contrast]:
    pairs = []
    for method, reference in contrasts:
        values, base = (_values(cells, name, seeds, metric) for name in (method, reference))
        pairs.append(None if values is None or base is None else paired_statistics(values, base))
    corrected = holm([1.0 if paired is None else paired.exact_p_value for paired in pairs])
    return [
        Contrast(method, reference)
        if paired is None
        else Contrast(
            method,
            reference,
            difference=paired.difference,
            low=paired.low,
            high=paired.high,
            p_value=paired.p_value,
            exact_p_value=paired.exact_p_value,
            holm_p_value=holm_p_value,
            effect_size=paired.effect_size,
            seeds_needed=paired.seeds_needed,
        )
        for (method, reference), paired, holm_p_value in zip(contrasts, pairs, corrected, strict=True)
    ]


def _values(cells: Sequence[CompareCell], method: str, seeds: Sequence[int], metric: str) -> list[float] | None:
    """A method's values of a metric in the order of the seeds; None where one of them is undefined."""
    by_seed = {cell.seed: cell.metrics[metric] for cell in cells if cell.method == method}
    numbers = [float(value) for value in map(by_seed.__getitem__, seeds) if value is not None]
    return numbers if len(numbers) == len(seeds) else None
