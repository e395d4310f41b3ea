"""What `flexkd sizes` tells its user to do next: one case for each way that a curve can look."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexkd.compare_record import CompareCell
from flexkd.evaluate.sizes.next_step import next_step
from flexkd.report.page import write_sizes_report
from flexkd.sizes_record import SizesRecord
from tests.report.records import KNEE_CURVE, sizes_record

FLAT = {"0.1": 0.74, "0.2": 0.742, "0.35": 0.741, "0.5": 0.74}
RISING = {"0.1": 0.6, "0.2": 0.64, "0.35": 0.68, "0.5": 0.72}


def learnt(means: dict[str, float], best_at: int, spread: float = 0.004, **changes: Any) -> SizesRecord:
    """Sizes whose students were all best at one of four evaluations of their validation rows."""
    curve = [
        {"step": step, "eval_accuracy": 0.7 - 0.001 * abs(step - best_at), "eval_loss": 1.0}
        for step in (25, 50, 75, 100)
    ]
    cells = [
        CompareCell(size, seed, {"accuracy": mean + shift * sign, "validation_accuracy": 0.7}, 90, curve)
        for sign, (size, mean) in zip((1, -1, 1, -1), means.items(), strict=True)
        for seed, shift in ((0, -spread), (1, 0.0), (2, spread))
    ]
    return sizes_record(dict(means), cells=cells, **changes)


def test_a_smallest_size_as_good_as_the_largest_asks_for_smaller_ones(tmp_path: Path) -> None:
    text = next_step(sizes_record(dict(FLAT)))
    assert text == (
        "Next: smaller ones. Size 0.1 is as good as the largest as far as can be told (the largest is better by "
        "+0.0000 to +0.0000, 95% interval): flexkd sizes RECIPE --sizes 0.025,0.05,0.1,0.2,0.35,0.5."
    )
    write_sizes_report(sizes_record(dict(FLAT)), tmp_path / "page.html")
    assert text in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_smallest_size_that_keeps_enough_asks_for_smaller_ones_though_the_largest_is_better() -> None:
    text = next_step(sizes_record({"0.1": 0.775, "0.2": 0.78, "0.35": 0.785, "0.5": 0.79}))
    assert text.startswith("Next: smaller ones. Size 0.1 keeps enough beyond doubt: flexkd sizes RECIPE --sizes 0.025,")


def test_seeds_that_leave_it_open_are_not_taken_for_equal_sizes() -> None:
    text = next_step(learnt({"0.1": 0.7, "0.2": 0.72, "0.35": 0.73, "0.5": 0.74}, 75, spread=0.04))
    assert text.startswith("Next: more seeds or more test rows. Whether size 0.1, the smallest, is as good as the")
    assert text.endswith("flexkd sizes RECIPE --seeds 0,1,2,3,4.")


def test_a_largest_size_that_is_better_and_keeps_too_little_asks_for_larger_ones() -> None:
    assert next_step(learnt(RISING, 100)) == (
        "Next: larger ones. Size 0.5 is better than size 0.35 (the largest is better by +0.0201 to +0.0599, 95% "
        "interval): flexkd sizes RECIPE --sizes 0.1,0.2,0.35,0.5,0.67,0.83. Its best checkpoint is that of the last "
        "step, 100: a longer training may add to it."
    )


def test_a_curve_that_is_flat_behind_a_size_asks_for_nothing_larger() -> None:
    assert next_step(sizes_record()) == "Next: nothing larger. Size 0.35 keeps enough beyond doubt."
    low = next_step(sizes_record({"0.1": 0.62, "0.2": 0.7, "0.35": 0.7, "0.5": 0.7}))
    assert low.startswith("Next: nothing larger. Size 0.2 is as good as the largest as far as can be told (")
    assert low.endswith("More parameters alone do not keep more: another training may, or another objective.")


def test_a_best_checkpoint_in_the_first_half_asks_for_a_shorter_training() -> None:
    assert next_step(learnt(KNEE_CURVE, 50)).endswith(
        " Its best checkpoint came by step 50 of 100: a shorter training may do as well (training.max_steps: 50)."
    )
    assert next_step(learnt(KNEE_CURVE, 75)).endswith("keeps enough beyond doubt.")


def test_students_that_learnt_nothing_are_no_reason_for_smaller_ones() -> None:
    record = sizes_record(dict.fromkeys(KNEE_CURVE, 0.484))
    assert next_step(record).startswith("Next: another training. No size is better than 'most frequent class'")


def test_without_intervals_seeds_come_first() -> None:
    cells = [CompareCell(size, 3, {"accuracy": mean}, 9) for size, mean in KNEE_CURVE.items()]
    assert next_step(sizes_record(seeds=[3], cells=cells)).endswith("flexkd sizes RECIPE --seeds 3,0,1.")
    earlier = replace(sizes_record(), sizes=[replace(size, behind_low=None) for size in sizes_record().sizes])
    assert next_step(earlier) == ""
    assert next_step(sizes_record({**KNEE_CURVE, "0.2": None})) == ""


@pytest.mark.parametrize(
    ("key", "means", "ending"),
    [
        ("num_layers", FLAT, "--sizes 1,2,4,6,12."),
        ("num_layers", RISING, "--sizes 2,4,6,12,18,24."),
        ("hidden_size", FLAT, "--sizes 32,96,192,256,320."),
        ("hidden_size", RISING, "--sizes 96,192,256,320,352,384."),
    ],
)
def test_other_keys_have_whole_values_up_to_the_teachers(key: str, means: dict[str, float], ending: str) -> None:
    record = sizes_record(dict(means))
    values = (2, 4, 6, 12) if key == "num_layers" else (96, 192, 256, 320)
    sizes = [replace(size, value=value) for size, value in zip(record.sizes, values, strict=True)]
    teacher = replace(record.teacher, num_layers=24, hidden_size=384)
    assert next_step(replace(record, key=key, sizes=sizes, teacher=teacher)).endswith(ending)


def test_where_nothing_smaller_is_left_another_key_comes_next() -> None:
    record = sizes_record(dict(FLAT))
    sizes = [replace(size, value=index + 1) for index, size in enumerate(record.sizes)]
    text = next_step(replace(record, key="num_layers", sizes=sizes))
    assert text.startswith("Next: another key, as nothing smaller is left of student.num_layers. 1 layer is as good")
