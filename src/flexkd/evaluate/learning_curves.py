"""Learning curves of a comparison on its validation rows, and the steps that each method needs to reach logit KD."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from flexkd.compare_record import CompareCell, CompareRecord
from flexkd.facts.metrics import LOWER_IS_BETTER
from flexkd.record import Number

CURVE_REFERENCE: Final = "logit_kd"
"""The method whose final value the others are to reach."""

Curve = Sequence[tuple[Number, Number]]
"""Optimizer step and value of each evaluation, in the order of the steps."""


@dataclass(frozen=True)
class StepsToReach:
    """Optimizer steps after which a method has, seed by seed, the value that logit KD has at its end.

    Attributes:
        steps: One for each seed, linear between two evaluations; None where no evaluation has that value.
        is_bound: With some seed the first evaluation already has it: the number of steps is at most this one.
    """

    method: str
    steps: tuple[Number | None, ...]
    is_bound: bool

    def describe(self) -> str:
        """The mean over seeds and its range, in words."""
        reached = [step for step in self.steps if step is not None]
        if not reached:
            return "not reached"
        spread = f"{min(reached):,.0f} to {max(reached):,.0f}"
        if len(reached) < len(self.steps):
            missing = len(self.steps) - len(reached)
            return f"not reached with {missing} of {len(self.steps)} seeds, else {spread}"
        return f"{'at most ' * self.is_bound}{statistics.fmean(reached):,.0f} ({spread})"


@dataclass(frozen=True)
class MeanCurve:
    """The mean over seeds of a method's values at each evaluation, and the smallest and the largest of them."""

    method: str
    steps: tuple[Number, ...]
    means: tuple[float, ...]
    lows: tuple[Number, ...]
    highs: tuple[Number, ...]


def curve_metric(record: CompareRecord) -> str | None:
    """The nll of the validation rows, where every cell measured it, or else the metric of the task.

    The nll changes with every step, while answers that are right or wrong change in jumps. It does not depend on the
    terms of an objective, which a method may lack or weigh in another way.

    Returns:
        None where not every cell has one of the two, as in records of earlier versions.
    """
    candidates = dict.fromkeys(("nll", record.metric))
    return next((name for name in candidates if record.cells and all(_curve(c, name) for c in record.cells)), None)


def mean_curves(record: CompareRecord, metric: str) -> list[MeanCurve]:
    """The curve of each method over its seeds, at the steps at which every seed was evaluated."""
    curves = []
    for method in record.methods:
        by_seed = [dict(_curve(cell, metric)) for cell in record.cells if cell.method == method]
        steps = sorted(set[Number].intersection(*(set(values) for values in by_seed)))
        columns = [[values[step] for values in by_seed] for step in steps]
        means = tuple(map(statistics.fmean, columns))
        curves.append(MeanCurve(method, tuple(steps), means, tuple(map(min, columns)), tuple(map(max, columns))))
    return curves


def steps_to_reference(record: CompareRecord) -> list[StepsToReach]:
    """For each method, the steps to the value that logit KD has at its last evaluation with the same seed.

    For logit KD itself: the first time that it has this value.

    Returns:
        Empty where logit KD is not compared, or curves are missing.
    """
    metric = curve_metric(record)
    if metric is None or CURVE_REFERENCE not in record.methods:
        return []
    cells = {(cell.method, cell.seed): _curve(cell, metric) for cell in record.cells}
    rows = []
    for method in record.methods:
        pairs = [(cells[method, seed], cells[CURVE_REFERENCE, seed][-1][1]) for seed in record.seeds]
        steps = [step_to_reach(curve, value, lower_is_better=metric in LOWER_IS_BETTER) for curve, value in pairs]
        is_bound = any(step == curve[0][0] for step, (curve, _) in zip(steps, pairs, strict=True))
        rows.append(StepsToReach(method, tuple(steps), is_bound))
    return rows


def step_to_reach(curve: Curve, value: Number, *, lower_is_better: bool) -> Number | None:
    """The step at which a curve first has a value or a better one, linear between evaluations.

    Returns:
        The first step of the curve where it has the value from there on; None where it never has it.

    Example:
        >>> step_to_reach([(10, 3.0), (20, 2.0), (30, 1.0)], 1.5, lower_is_better=True)
        25.0
    """
    sign = -1 if lower_is_better else 1
    if sign * curve[0][1] >= sign * value:
        return curve[0][0]
    for (step, before), (next_step, after) in pairwise(curve):
        if sign * after >= sign * value:
            return step + (next_step - step) * (value - before) / (after - before)
    return None


def curves_note(record: CompareRecord) -> str:
    """What the steps to logit KD's final value are, in a sentence; empty where there are none."""
    if not steps_to_reference(record):
        return ""
    return (
        f"Steps to {CURVE_REFERENCE}'s final {curve_metric(record)}: optimizer steps after which a method has, on the "
        f"validation rows, the {curve_metric(record)} that {CURVE_REFERENCE} has at its last evaluation with the same "
        "seed, linear between evaluations; mean over seeds, and range."
    )


def _curve(cell: CompareCell, metric: str) -> list[tuple[Number, Number]]:
    entries: Sequence[Mapping[str, Number]] = cell.evaluations
    return [(entry["step"], entry[f"eval_{metric}"]) for entry in entries if f"eval_{metric}" in entry]
