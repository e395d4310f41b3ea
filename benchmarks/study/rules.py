"""The rules of the study that can be computed: contrasts seed by seed, and from which mismatch on each one holds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.study.plan import Cell, Contrast, Plan, cells, search_cells
from benchmarks.study.results import CellResult, Results
from flexkd.evaluate.statistics import PairedStatistics, holm, paired_statistics


@dataclass(frozen=True)
class Judgement:
    """One contrast at one mismatch of a setting.

    Attributes:
        num_seeds: Seeds that both methods have finished.
        is_complete: Whether these are all seeds of the plan.
        num_better: Of these, seeds in which the method is better.
        paired: Of the gain, which is above 0 where the method is better; None with fewer than two seeds.
        holm_p_value: The exact p, corrected for the contrasts of this mismatch; None as above.
    """

    contrast: Contrast
    mismatch: int
    num_seeds: int
    is_complete: bool
    num_better: int = 0
    paired: PairedStatistics | None = None
    holm_p_value: float | None = None

    @property
    def is_gain(self) -> bool:
        """Whether the method is better on average."""
        return self.paired is not None and self.paired.difference > 0


@dataclass(frozen=True)
class Verdict:
    """From which mismatch on a contrast holds, and in which direction."""

    mismatch: int
    is_gain: bool


def values_of(plan: Plan, results: Results, setting: str, mismatch: int, method: str, metric: str) -> dict[int, float]:
    """Seed to the metric of a method's finished students."""
    values = {}
    for seed, result in finished_of(plan, results, setting, mismatch, method).items():
        value = result.metrics.get(metric)
        if value is not None:
            values[seed] = value
    return values


def finished_of(plan: Plan, results: Results, setting: str, mismatch: int, method: str) -> dict[int, CellResult]:
    """Seed to result of a method's finished students."""
    finished = {}
    for seed in range(plan.settings[setting].methods[method]):
        result = results.finished(plan, Cell(setting, mismatch, method, seed))
        if result is not None:
            finished[seed] = result
    return finished


def judgements(plan: Plan, results: Results, setting: str) -> list[Judgement]:
    """Every contrast that a setting has both methods of, at each of its mismatches."""
    return [
        judgement
        for mismatch in plan.settings[setting].widths
        for judgement in _with_holm(
            [_judged(plan, results, setting, mismatch, contrast) for contrast in contrasts_of(plan, setting)]
        )
    ]


def contrasts_of(plan: Plan, setting: str) -> list[Contrast]:
    """The contrasts that a setting has both methods of."""
    methods = plan.settings[setting].methods
    return [contrast for contrast in plan.contrasts if contrast.method in methods and contrast.reference in methods]


def _judged(plan: Plan, results: Results, setting: str, mismatch: int, contrast: Contrast) -> Judgement:
    entry = plan.settings[setting]
    method, reference = (
        values_of(plan, results, setting, mismatch, name, entry.metric)
        for name in (contrast.method, contrast.reference)
    )
    seeds = sorted(method.keys() & reference.keys())
    planned = min(entry.methods[contrast.method], entry.methods[contrast.reference])
    paired = None
    if len(seeds) > 1:
        paired = paired_statistics(*([entry.sign * side[seed] for seed in seeds] for side in (method, reference)))
    num_better = sum(entry.sign * (method[seed] - reference[seed]) > 0 for seed in seeds)
    return Judgement(contrast, mismatch, len(seeds), len(seeds) == planned, num_better, paired)


def _with_holm(judged: Sequence[Judgement]) -> list[Judgement]:
    corrected = holm([1.0 if entry.paired is None else entry.paired.exact_p_value for entry in judged])
    return [
        replace(entry, holm_p_value=None if entry.paired is None else p_value)
        for entry, p_value in zip(judged, corrected, strict=True)
    ]


def holds_from(p_values: Mapping[str, Mapping[int, float]], level: float) -> dict[str, int | None]:
    """The smallest mismatch from which on each contrast holds; None: at none.

    A contrast is tested at the largest mismatch first, then at the next smaller one, and so on until a p is above its
    share of the level. The level is shared equally; a contrast that holds at every mismatch leaves its share to the
    others. The chance of any false claim is at most the level.

    Args:
        p_values: Contrast to mismatch to p.

    Source:
        Wiens, 2003 (fixed sequences); Bretz et al., 2009, Statistics in Medicine 28, sec. 2 (shares that are passed on;
        with one mismatch this is Holm's procedure).

    Example:
        >>> holds_from({"a": {2: 0.2, 4: 0.01}, "b": {2: 0.03, 4: 0.001}}, 0.05)
        {'a': 4, 'b': 4}
    """
    order = {name: sorted(values, reverse=True) for name, values in p_values.items()}
    passed = dict.fromkeys(p_values, 0)
    open_names = list(p_values)
    while open_names:
        share = level / len(open_names)
        for name in open_names:
            remaining = order[name][passed[name] :]
            above = [index for index, mismatch in enumerate(remaining) if p_values[name][mismatch] > share]
            passed[name] += above[0] if above else len(remaining)
        finished = [name for name in open_names if passed[name] == len(order[name])]
        if not finished:
            break
        open_names = [name for name in open_names if name not in finished]
    return {name: order[name][count - 1] if count else None for name, count in passed.items()}


def verdicts(plan: Plan, results: Results, setting: str) -> dict[str, Verdict | None]:
    """From which mismatch on each contrast of a setting holds; None: from none, or seeds are missing.

    The direction is that of the largest mismatch. The test is two-sided, so that it may be either.
    """
    judged = sorted(judgements(plan, results, setting), key=lambda entry: -entry.mismatch)
    directions: dict[str, bool] = {}
    p_values: dict[str, dict[int, float]] = {}
    for entry in judged:
        name = entry.contrast.name
        agrees = directions.setdefault(name, entry.is_gain) == entry.is_gain
        is_tested = agrees and entry.is_complete and entry.paired is not None
        p_value = entry.paired.exact_p_value if is_tested and entry.paired is not None else 1.0
        p_values.setdefault(name, {})[entry.mismatch] = p_value
    mismatches = holds_from(p_values, plan.level)
    return {
        name: None if mismatch is None else Verdict(mismatch, directions[name]) for name, mismatch in mismatches.items()
    }


def last_fall(plan: Plan, results: Results, setting: str, mismatch: int, method: str) -> float | None:
    """Share by which the validation loss fell in the last fifth of the steps, mean over seeds; None: unknown."""
    students = finished_of(plan, results, setting, mismatch, method).values()
    falls = [student.last_fall for student in students if student.last_fall is not None]
    return statistics.fmean(falls) if falls else None


def planned_cells(plan: Plan, setting: str) -> list[Cell]:
    """The cells of a setting, those of its searches first."""
    searched = [cell for search in plan.settings[setting].searches for cell in search_cells(plan, setting, search)]
    return [*searched, *cells(plan, setting)]
