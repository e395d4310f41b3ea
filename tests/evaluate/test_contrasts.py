"""Means over seeds, differences to a reference, named contrasts, and the words that they allow."""

import numpy as np
import pytest
from scipy import stats

from flexkd.compare_record import CompareCell, CompareRecord
from flexkd.evaluate.contrasts import paired_differences, with_contrasts
from flexkd.evaluate.significance import contrast_notes
from flexkd.evaluate.statistics import seeds_needed
from tests.references import paired as reference


def cells_of(values: dict[str, list[float | None]]) -> list[CompareCell]:
    return [CompareCell(m, seed, {"accuracy": v}, 1.0) for m, series in values.items() for seed, v in enumerate(series)]


def test_paired_differences_agree_with_a_second_derivation() -> None:
    values = {"a": [0.70, 0.72, 0.69, 0.73], "b": [0.71, 0.75, 0.70, 0.73], "c": [0.80, 0.82, 0.79, 0.83]}
    cells = [CompareCell(m, s, {"accuracy": v}, 1.0) for m, numbers in values.items() for s, v in enumerate(numbers)]
    first, second, third = paired_differences(cells, list(values), [0, 1, 2, 3], "accuracy", "a")
    assert (first.difference, first.p_value) == (None, None)
    differences = np.array(values["b"]) - np.array(values["a"])
    error = differences.std(ddof=1) / 2
    width = stats.t.ppf(0.975, 3) * error
    assert second.difference == pytest.approx(differences.mean())
    assert (second.low, second.high) == pytest.approx((differences.mean() - width, differences.mean() + width))
    assert second.p_value == pytest.approx(2 * stats.t.sf(differences.mean() / error, 3))
    assert second.std == pytest.approx(np.std(values["b"], ddof=1))
    assert third.difference == pytest.approx(0.1)


def test_equal_values_have_no_spread_and_no_test() -> None:
    """Three times one value: its deviation is 0, without a warning of lost digits."""
    cells = [CompareCell(m, s, {"accuracy": v}, 1.0) for m, v in (("a", 0.52), ("b", 0.52)) for s in range(3)]
    first, second = paired_differences(cells, ["a", "b"], [0, 1, 2], "accuracy", "a")
    assert (first.mean, first.std) == pytest.approx((0.52, 0.0))
    assert (second.difference, second.low, second.high, second.p_value) == (0.0, None, None, None)


def test_a_seed_without_a_value_leaves_its_method_without_a_comparison() -> None:
    values: dict[str, list[float | None]] = {"a": [0.5, 0.6], "b": [0.7, None], "c": [0.8, 0.7]}
    cells = [CompareCell(m, s, {"accuracy": v}, 1.0) for m, given in values.items() for s, v in enumerate(given)]
    _, second, third = paired_differences(cells, list(values), [0, 1], "accuracy", "a")
    assert (second.mean, second.difference) == (None, None)
    assert third.difference == pytest.approx(0.2)
    against_b = paired_differences(cells, list(values), [0, 1], "accuracy", "b")
    assert [row.difference for row in against_b] == [None, None, None]
    assert against_b[2].mean == pytest.approx(0.75)


PAIRS = [("b", "a"), ("c", "a"), ("c", "b")]


def record_of(values: dict[str, list[float | None]], pairs: list[tuple[str, str]]) -> CompareRecord:
    seeds = list(range(len(values["a"])))
    cells = cells_of(values)
    record = CompareRecord(
        "accuracy",
        "single_label",
        list(values),
        seeds,
        cells,
        "a",
        paired_differences(cells, list(values), seeds, "accuracy", "a"),
        {"accuracy": 0.9},
    )
    return with_contrasts(record, pairs)


def test_each_contrast_is_tested_against_its_reference_and_corrected_for_all() -> None:
    thousandths = {"a": [700, 720, 690, 730, 710], "b": [710, 750, 680, 730, 720], "c": [800, 760, 790, 880, 720]}
    record = record_of({method: [n / 1000 for n in series] for method, series in thousandths.items()}, PAIRS)
    differences = [[x - y for x, y in zip(thousandths[m], thousandths[r], strict=True)] for m, r in PAIRS]
    exact = [reference.sign_flip_p_value(series) for series in differences]
    assert [contrast.exact_p_value for contrast in record.contrasts] == exact
    assert [contrast.holm_p_value for contrast in record.contrasts] == pytest.approx(reference.holm(exact))
    for contrast, series in zip(record.contrasts, differences, strict=True):
        assert contrast.difference == pytest.approx(sum(series) / 5000)
        assert contrast.effect_size == pytest.approx(reference.effect_size(series))
        assert contrast.p_value == pytest.approx(reference.t_test(series), rel=1e-4)
        assert contrast.seeds_needed == seeds_needed(contrast.effect_size)


def test_a_contrast_without_values_has_no_figures_and_still_counts() -> None:
    record = record_of({"a": [0.5] * 6, "b": [0.6, 0.7, 0.8, 0.6, 0.7, 0.8], "c": [None, *[0.5] * 5]}, PAIRS[:2])
    first, second = record.contrasts
    assert (first.exact_p_value, first.holm_p_value) == (1 / 32, 2 / 32)
    assert (second.difference, second.holm_p_value) == (None, None)
    assert not record.is_significant(first)


def series(num_seeds: int, effect: float) -> list[float | None]:
    """Values that differ from 0.5, and from seed to seed."""
    return [0.5 + effect * (1 + 0.1 * (seed % 3)) for seed in range(num_seeds)]


@pytest.mark.parametrize(
    ("num_seeds", "pairs", "sentences"),
    [
        (
            3,
            PAIRS[:1],
            [
                "The smallest exact p that 3 seeds can give is 0.25.",
                "That is above the 5% level: with fewer than 6 seeds, chance alone may explain any difference.",
            ],
        ),
        (
            6,
            PAIRS,
            [
                "The smallest exact p that 6 seeds can give is 0.031; after Holm's correction for 3 contrasts it is "
                "0.094.",
                "That is above the 5% level: with fewer than 7 seeds, chance alone may explain any difference.",
            ],
        ),
        (
            7,
            PAIRS,
            [
                "The smallest exact p that 7 seeds can give is 0.016; after Holm's correction for 3 contrasts it is "
                "0.047.",
                "Significant at the 5% level: c against a (0.047); c against b (0.047). Chance alone may explain the "
                "others.",
            ],
        ),
        (
            6,
            PAIRS[:1],
            [
                "The smallest exact p that 6 seeds can give is 0.031.",
                "No contrast is at the 5% level: chance alone may explain each difference.",
            ],
        ),
    ],
)
def test_the_notes_say_what_so_many_seeds_allow(
    num_seeds: int, pairs: list[tuple[str, str]], sentences: list[str]
) -> None:
    around = [0.5 + 0.001 * (-1) ** seed for seed in range(num_seeds)]
    record = record_of({"a": [0.5] * num_seeds, "b": [*around], "c": series(num_seeds, 0.2)}, pairs)
    notes = contrast_notes(record)
    assert notes[:-1] == sentences
    assert notes[-1].startswith("Seeds needed: for a paired t-test")


def test_a_record_of_an_earlier_version_has_no_notes() -> None:
    assert contrast_notes(CompareRecord("accuracy", "single_label", ["a"], [0], [], "a", [], {})) == []
