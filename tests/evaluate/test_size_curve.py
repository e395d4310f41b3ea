"""Figures and sentences about sizes: intervals over seeds and rows, the knee, and which size keeps enough."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flexkd.compare_record import CompareCell
from flexkd.evaluate.sizes.curve import advice, curve_notes, knee_text, with_curve
from flexkd.sizes_record import SizesRecord
from tests.report.records import KNEE_CURVE, sizes_record

ROWS = 400


def one_seed(means: dict[str, float], teacher: float = 0.8, metric: str = "accuracy", **changes: Any) -> SizesRecord:
    """Sizes of one seed with right and wrong answers to 400 rows; the best rows of one model are those of all."""
    values = {size: answers(mean) for size, mean in means.items()}
    cells = [CompareCell(size, 0, {metric: mean}, 9) for size, mean in means.items()]
    record = sizes_record(dict(means), seeds=[0], cells=cells, metric=metric, **changes)
    return with_curve(record, values, answers(teacher))


def answers(mean: float) -> dict[str, tuple[float, float]]:
    return {str(row): (float(row < round(mean * ROWS)), 1.0) for row in range(ROWS)}


def test_intervals_over_seeds_are_students_t_and_shares_those_of_the_teacher() -> None:
    record = sizes_record()
    values = [KNEE_CURVE["0.2"] + shift for shift in (-0.004, 0.0, 0.004)]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    result = record.sizes[1]
    assert (result.low, result.high) == pytest.approx((low, high))
    assert (result.share, result.share_low, result.share_high) == pytest.approx((0.75 / 0.8, low / 0.8, high / 0.8))
    assert (record.interval_over, record.rows) == ("seeds", 0)
    assert (record.knee.size, record.knee.repeats, record.knee.trials) == ("0.2", 3, 3)


def test_with_one_seed_intervals_are_over_rows_that_are_the_same_for_all_models() -> None:
    record = one_seed(KNEE_CURVE)
    assert (record.interval_over, record.rows) == ("rows", ROWS)
    for result in record.sizes:
        mean = KNEE_CURVE[result.name]
        assert result.low is not None
        assert result.high is not None
        half = 1.96 * (mean * (1 - mean) / ROWS) ** 0.5
        assert (result.low, result.high) == pytest.approx((mean - half, mean + half), abs=0.008)
    # Rows that are right under the student are right under the teacher: drawn together, the share varies less.
    best = record.sizes[-1]
    assert best.share_low is not None
    assert best.share_high is not None
    assert best.low is not None
    assert best.high is not None
    assert best.share_high - best.share_low < 0.6 * (best.high - best.low) / 0.8
    assert (record.knee.size, record.knee.trials) == ("0.2", 1000)
    assert record.knee.repeats > 700
    assert knee_text(record).endswith(f"It is there in {record.knee.repeats:,} of 1,000 draws of the test rows.")


def test_students_that_agree_with_the_teacher_on_few_rows_may_still_differ() -> None:
    few = {str(row): (float(row < 45), 1.0) for row in range(58)}
    cells = [CompareCell(size, 0, {"accuracy": 45 / 58}, 9) for size in ("0.1", "0.2")]
    record = sizes_record({"0.1": 45 / 58, "0.2": 45 / 58}, seeds=[0], cells=cells)
    record = with_curve(record, {"0.1": few, "0.2": few}, few)
    for result in record.sizes:
        assert result.share_low is not None
        assert result.share_high is not None
        assert result.share_low < 0.97 < 1.03 < result.share_high
    assert "with two rows added (Agresti and Min)" in curve_notes(record)[0]


def test_tokens_have_the_same_weight_however_long_their_row() -> None:
    """Rows of one token with 1 nat and rows of nine with 3 nats each: 2.8 nats a token, and not 2 a row."""
    rows = {str(row): (1.0, 1.0) if row % 2 else (27.0, 9.0) for row in range(ROWS)}
    record = sizes_record({"0.1": 2.8, "0.2": 2.8}, seeds=[0], problem="generation")
    record = with_curve(record, {"0.1": rows, "0.2": rows}, rows)
    for result in record.sizes:
        assert result.low is not None
        assert result.high is not None
        assert 2.75 < result.low < 2.8 < result.high < 2.85
        assert (result.share_low, result.share_high) == (1.0, 1.0)


def test_a_metric_that_is_no_mean_over_rows_has_no_interval_with_one_seed() -> None:
    teacher = replace(sizes_record().teacher, metrics={"macro_f1": 0.8})
    sizes = [
        replace(result, model=replace(result.model, metrics={"macro_f1": KNEE_CURVE[result.name]}))
        for result in sizes_record(seeds=[0]).sizes
    ]
    cells = [CompareCell(size, 0, {"macro_f1": mean}, 9) for size, mean in KNEE_CURVE.items()]
    record = sizes_record(seeds=[0], cells=cells, metric="macro_f1", teacher=teacher, sizes=sizes)
    assert (record.interval_over, record.sizes[0].low, record.knee.size) == ("", None, "0.2")
    assert advice(record) == (
        "Size 0.35 is the smallest that keeps 95% of the teacher's macro f1: 96.5%, without an interval."
    )
    assert knee_text(record).endswith("Whether chance alone may explain the curve is not known.")
    assert curve_notes(record)[0].startswith(
        "There are no intervals: one seed, and macro f1 is no mean over rows or tokens."
    )


@pytest.mark.parametrize(
    ("means", "words"),
    [
        pytest.param(
            KNEE_CURVE,
            "Size 0.35 is the smallest that keeps 95% of the teacher's accuracy: 96.5%, 95% interval 95.3% to 97.7%.",
            id="one keeps it whole",
        ),
        pytest.param(
            {"0.1": 0.7, "0.2": 0.765, "0.35": 0.78, "0.5": 0.79},
            "Size 0.35 is the smallest that keeps 95% of the teacher's accuracy beyond doubt: 97.5%, 95% interval "
            "96.3% to 98.7%. Size 0.2 does on average: 95.6%, 95% interval 94.4% to 96.9%.",
            id="a smaller one on average",
        ),
        pytest.param(
            {"0.1": 0.7, "0.2": 0.72, "0.35": 0.74, "0.5": 0.765},
            "No size keeps 95% of the teacher's accuracy beyond doubt; size 0.5 is the smallest that does on average: "
            "95.6%, 95% interval 94.4% to 96.9%.",
            id="none beyond doubt",
        ),
        pytest.param(
            {"0.1": 0.6, "0.2": 0.62, "0.35": 0.7, "0.5": 0.69},
            "No size keeps 95% of the teacher's accuracy: the best, size 0.35, keeps 87.5%, 95% interval 86.3% "
            "to 88.7%.",
            id="none",
        ),
    ],
)
def test_the_advice_names_the_smallest_size_that_keeps_enough_or_says_that_none_does(
    means: dict[str, float], words: str
) -> None:
    assert advice(sizes_record(dict(means))) == words


def test_the_advice_says_where_a_baseline_keeps_as_much() -> None:
    record = sizes_record()
    frequent = replace(record.baselines[0], metrics={"accuracy": 0.77})
    assert advice(replace(record, baselines=[frequent])).endswith(
        " So does 'most frequent class', which needs no model: such a share says little here."
    )


def test_where_less_is_better_a_knee_can_be_but_no_share() -> None:
    errors = {size: 1 - mean for size, mean in KNEE_CURVE.items()}
    cells = [
        CompareCell(size, seed, {"mse": error + 0.001 * seed}, 9) for size, error in errors.items() for seed in (0, 1)
    ]
    teacher = replace(sizes_record().teacher, metrics={"mse": 0.2})
    record = sizes_record(metric="mse", problem="regression", seeds=[0, 1], cells=cells, teacher=teacher)
    assert record.knee.size == "0.2"
    assert [result.share for result in record.sizes] == [None] * 4
    assert advice(record).startswith("Which size keeps 95% of the teacher's mse cannot be said")


@pytest.mark.parametrize(
    ("means", "reason"),
    [
        ({"0.1": 0.62, "0.2": 0.75, "0.35": 0.772}, "a knee shows from 4 sizes on"),
        ({"0.1": 0.70, "0.2": 0.72, "0.35": 0.74, "0.5": 0.76}, "the curve bends too little, or the other way"),
        (
            {"0.1": 0.75, "0.2": 0.77, "0.35": 0.77, "0.5": 0.75},
            "the largest size is not better than the smallest beyond what chance alone may explain",
        ),
        ({"0.1": 0.62, "0.2": None, "0.35": 0.77, "0.5": 0.78}, "the accuracy of a student is not defined"),
    ],
)
def test_without_a_knee_the_reason_is_given(means: dict[str, float | None], reason: str) -> None:
    record = sizes_record(means)
    assert knee_text(record) == f"No knee: {reason}."
