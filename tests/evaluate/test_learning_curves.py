"""Steps to logit KD's final value, on curves whose crossings are known."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from flexkd.compare_record import CompareCell, CompareRecord
from flexkd.evaluate.learning_curves import (
    curve_metric,
    curves_note,
    mean_curves,
    step_to_reach,
    steps_to_reference,
)

STEPS = (10, 20, 30, 40)


def cell(method: str, seed: int, values: tuple[float, ...], metric: str = "nll") -> CompareCell:
    entries = [
        {"step": step, "eval_loss": 1.0, f"eval_{metric}": value} for step, value in zip(STEPS, values, strict=False)
    ]
    return CompareCell(method, seed, {"accuracy": 0.5}, 1.0, entries)


def record(*cells: CompareCell, **changes: Any) -> CompareRecord:
    methods, seeds = (list(dict.fromkeys(getattr(c, name) for c in cells)) for name in ("method", "seed"))
    plain = CompareRecord("accuracy", "single_label", methods, seeds, list(cells), methods[0], [], {})
    return dataclasses.replace(plain, **changes)


CELLS = (
    # Seed 0 ends at 1.0, seed 1 at 2.0.
    cell("logit_kd", 0, (4.0, 3.0, 2.0, 1.0)),
    cell("logit_kd", 1, (4.0, 3.0, 1.5, 2.0)),
    # Reaches 1.0 half way from 20 to 30, and 2.0 three quarters from 10 to 20.
    cell("fast", 0, (3.0, 1.5, 0.5, 0.25)),
    cell("fast", 1, (5.0, 1.0, 1.0, 1.0)),
    cell("slow", 0, (4.0, 3.5, 3.0, 1.25)),
    cell("slow", 1, (4.0, 3.0, 3.0, 1.0)),
    cell("at_once", 0, (0.5, 0.5, 0.5, 0.5)),
    cell("at_once", 1, (6.0, 4.0, 2.0, 0.0)),
    cell("never", 0, (4.0, 4.0, 4.0, 4.0)),
    cell("never", 1, (4.0, 4.0, 4.0, 2.1)),
)


def test_each_seed_has_to_reach_the_final_value_of_logit_kd_with_the_same_seed() -> None:
    rows = {row.method: row for row in steps_to_reference(record(*CELLS))}
    assert {name: row.steps for name, row in rows.items()} == {
        "logit_kd": (40, pytest.approx(20 + 10 * (3 - 2) / (3 - 1.5))),
        "fast": (25, 17.5),
        "slow": (None, 35),
        "at_once": (10, 30),
        "never": (None, None),
    }
    assert rows["fast"].describe() == "21 (18 to 25)"
    assert rows["slow"].describe() == "not reached with 1 of 2 seeds, else 35 to 35"
    assert rows["at_once"].describe() == "at most 20 (10 to 30)"
    assert rows["never"].describe() == "not reached"
    assert curves_note(record(*CELLS)).startswith("Steps to logit_kd's final nll: optimizer steps after which a method")


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_the_crossing_is_that_of_a_finely_drawn_line(lower_is_better: bool) -> None:
    generator = np.random.default_rng(3)
    for _ in range(50):
        values, target = generator.normal(size=5).tolist(), float(generator.normal())
        curve = list(zip((3, 5, 9, 10, 20), values, strict=True))
        fine = np.linspace(3, 20, 170_001)
        line = np.interp(fine, [step for step, _ in curve], values)
        reached = fine[line <= target] if lower_is_better else fine[line >= target]
        step = step_to_reach(curve, target, lower_is_better=lower_is_better)
        assert (step is None) == (len(reached) == 0)
        assert step is None or step == pytest.approx(reached[0], abs=2e-4)


def test_curves_are_means_over_seeds_at_steps_that_all_have() -> None:
    short = cell("fast", 2, (1.0, 2.0))
    (curve,) = mean_curves(record(*CELLS[2:4], short), "nll")
    assert curve.steps == (10, 20)
    assert curve.means == pytest.approx((3.0, 1.5))
    assert (curve.lows, curve.highs) == ((1.0, 1.0), (5.0, 2.0))


def test_without_nll_in_every_cell_the_metric_of_the_task_is_drawn_and_without_it_nothing() -> None:
    figures = [cell("logit_kd", 0, (0.5, 0.75), "accuracy"), cell("fast", 0, (0.5, 1.0), "accuracy")]
    assert curve_metric(record(*figures)) == "accuracy"
    assert [row.steps for row in steps_to_reference(record(*figures))] == [(20,), (15,)]
    earlier = CompareCell("slow", 0, {"accuracy": 0.5}, 1.0)
    assert curve_metric(record(*CELLS, earlier)) is None
    assert steps_to_reference(record(*CELLS, earlier)) == steps_to_reference(record(*CELLS[2:])) == []
    assert curves_note(record(*CELLS[2:])) == ""
