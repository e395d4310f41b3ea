"""Rows that methods repair and break, against counts made by hand, scipy, and resamples drawn one by one."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flexkd.compare_record import CompareRecord, Contrast, RowContrast
from flexkd.evaluate.row_contrasts import (
    read_row_values,
    row_contrasts,
    row_contrasts_note,
    row_metric,
    with_row_contrasts,
)


def named(values: Any) -> dict[str, float]:
    return {f"row-{index}": float(value) for index, value in enumerate(values)}


def drawn(num_rows: int, share: float, seed: int) -> dict[str, float]:
    return named(np.random.default_rng(seed).random(num_rows) < share)


def test_one_seed_gives_mcnemars_exact_test() -> None:
    """Of 40 rows both are right on 20 and wrong on 9; 10 are repaired, 1 is broken."""
    table = {("new", 3): named([1] * 20 + [0] * 9 + [1] * 10 + [0]), ("old", 3): named([1] * 20 + [0] * 19 + [1])}
    (contrast,) = row_contrasts(table, [("new", "old")], [3], "accuracy")
    counts = (contrast.rows, contrast.better, contrast.worse, contrast.rows_better, contrast.rows_worse)
    assert counts == (40, 10, 1, 10, 1)
    by_hand = 2 * sum(math.comb(11, k) for k in (0, 1)) / 2**11
    assert contrast.p_value == pytest.approx(by_hand)
    assert contrast.difference == pytest.approx(9 / 40)
    assert contrast.low < 9 / 40 < contrast.high


def test_over_seeds_a_row_counts_once_in_the_test_and_rows_are_counted_seed_by_seed() -> None:
    """Row 0 is repaired twice, row 1 repaired and broken, row 2 broken once, row 3 the same."""
    table = {
        ("new", 0): named([1, 1, 0, 1]),
        ("old", 0): named([0, 0, 1, 1]),
        ("new", 1): named([1, 0, 1, 0]),
        ("old", 1): named([0, 1, 1, 0]),
    }
    (contrast,) = row_contrasts(table, [("new", "old")], [0, 1], "accuracy")
    assert (contrast.better, contrast.worse) == (1.5, 1.0)
    assert (contrast.rows_better, contrast.rows_worse, contrast.p_value) == (1, 1, 1.0)


def test_the_interval_is_that_of_rows_drawn_one_by_one_and_narrows_with_more_rows() -> None:
    widths = []
    for num_rows in (50, 800):
        table = {
            (m, s): drawn(num_rows, share, 7 * s + len(m)) for m, share in (("new", 0.8), ("old", 0.6)) for s in (0, 1)
        }
        (contrast,) = row_contrasts(table, [("new", "old")], [0, 1], "accuracy")
        values = np.array([[table["new", s][id_] - table["old", s][id_] for s in (0, 1)] for id_ in table["new", 0]])
        generator = np.random.default_rng(5)
        means = [values[generator.integers(num_rows, size=num_rows)].mean() for _ in range(1000)]
        low, high = np.percentile(means, [2.5, 97.5])
        error = 6 * values.mean(1).std() / math.sqrt(num_rows) / math.sqrt(1000)
        assert (contrast.low, contrast.high) == pytest.approx((low, high), abs=2 * error + 1 / num_rows)
        widths.append(contrast.high - contrast.low)
    assert 3 < widths[0] / widths[1] < 5.5, "16 times the rows give a quarter of the width"


def test_all_methods_are_drawn_the_same_rows() -> None:
    """The twin of a method has the same interval, and the difference turned around is the interval turned around."""
    table = {(m, 0): drawn(60, 0.6, seed) for m, seed in (("a", 1), ("twin", 1), ("b", 2))}
    first, twin, back = row_contrasts(table, [("a", "b"), ("twin", "b"), ("b", "a")], [0], "accuracy")
    assert (first.low, first.high) == (twin.low, twin.high)
    assert (back.low, back.high) == pytest.approx((-first.high, -first.low))
    assert (back.better, back.worse, back.p_value) == (first.worse, first.better, first.p_value)


def test_of_an_error_less_is_better_and_rounding_is_no_difference() -> None:
    table = {("new", 0): named([0.1 + 0.2, 1.0, 4.0, 1.0]), ("old", 0): named([0.3, 2.0, 3.0, 5.0])}
    (contrast,) = row_contrasts(table, [("new", "old")], [0], "mse")
    assert (contrast.better, contrast.worse, contrast.difference) == (2, 1, pytest.approx(-1))


def test_a_null_is_below_the_level_in_about_one_of_twenty_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkd.evaluate.row_contrasts.bootstrap_interval", lambda *_, **__: (0.0, 0.0))
    generator = np.random.default_rng(11)
    small = 0
    for _ in range(100):
        first, second = (named(generator.random(200) < 0.7) for _ in range(2))
        (contrast,) = row_contrasts({("a", 0): first, ("b", 0): second}, [("a", "b")], [0], "accuracy")
        small += contrast.p_value <= 0.05
    assert stats.binomtest(small, 100, 0.04).pvalue > 1e-3


def test_values_of_rows_come_from_the_files_that_tasks_write(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"

    def values(problem: str, metric: str, *rows: dict[str, Any]) -> dict[str, float] | None:
        path.write_text("".join(json.dumps({"id": str(index), **row}) + "\n" for index, row in enumerate(rows)))
        return read_row_values(path, problem, metric)

    assert read_row_values(path, "single_label", "accuracy") is None
    logits = [{"student": [0.5, 2.0]}, {"student": [0.5, 0.25]}, {"student": [1.0, 0.0]}]
    labelled = [{"label": label, "logits": row} for label, row in zip((1, 1, None), logits, strict=True)]
    assert values("single_label", "accuracy", *labelled) == {"0": 1.0, "1": 0.0}
    flags = [{"label": [0, 1], "logits": {"student": row}} for row in ([-1.0, 3.0], [1.0, 3.0])]
    assert values("multi_label", "subset_accuracy", *flags) == {"0": 1.0, "1": 0.0}
    assert values("regression", "mse", {"label": 2.0, "logits": {"student": [0.5]}}) == {"0": 2.25}
    answers = {"0": {"rouge": {"rougeL": 0.25}}, "1": {"rouge": {"rougeL": 0.75}}}
    written = [{"models": {"student": {"answers": each}}} for each in (answers, {"0": {"rouge": None}})]
    assert values("generation", "rougeL", *written) == {"0": 0.5}


def test_a_record_compares_with_the_reference_and_in_every_contrast_unless_rows_are_missing() -> None:
    methods = ["plain", "logits", "units", "old"]
    record = CompareRecord("macro_f1", "single_label", methods, [0, 1], [], "plain", [], {})
    assert row_contrasts_note(record) == ""
    table = {(method, seed): drawn(20, 0.5, seed) for method in methods for seed in (0, 1)}
    del table["old", 1]
    named_pairs = [Contrast("units", "logits"), Contrast("units", "plain"), Contrast("old", "logits")]
    after = with_row_contrasts(CompareRecord(**{**vars(record), "contrasts": named_pairs}), table)
    assert [contrast.name for contrast in after.row_contrasts] == [
        "logits against plain",
        "units against plain",
        "units against logits",
    ]
    assert {contrast.metric for contrast in after.row_contrasts} == {"accuracy"}
    assert "of 20 test rows" in row_contrasts_note(after)
    assert isinstance(after.row_contrasts[0], RowContrast)
    assert (row_metric("generation", "rouge2"), row_metric("generation", "nll")) == ("rouge2", "rougeL")
