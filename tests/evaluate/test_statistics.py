"""Statistics of paired values against loops, scipy and identities; a planted effect is found, and chance is not."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from flexkd.evaluate.statistics import (
    holm,
    paired_statistics,
    percentile_interval,
    resampled_shares,
    seeds_needed,
    sign_flip_p_value,
)
from flexkd.facts.seeds import LEVEL, fewest_seeds, smallest_p_value
from tests.references import paired as reference

THOUSANDTH = 0.001
DIFFERENCES = [
    (3, -1),
    (5, 5, 5),
    (4, 0, -2, 0, 7),
    (1, 2, 3, 4, 5, 6),
    (8, -3, 5, 5, -5, 1, 2),
    (12, 9, -1, 7, 7, 3, -2, 10, 4),
    (0, 0, 0),
    (1, -1, 2, -2),
]


@pytest.mark.parametrize("thousandths", DIFFERENCES)
def test_the_sign_flip_test_counts_every_pattern(thousandths: Sequence[int]) -> None:
    """Thousandths are rounded by float64; patterns that tie in whole numbers have to tie here."""
    differences = [THOUSANDTH * number for number in thousandths]
    assert sign_flip_p_value(differences) == reference.sign_flip_p_value(thousandths)
    values = [0.7 + difference for difference in differences]
    paired = paired_statistics(values, [0.7] * len(values))
    assert paired.exact_p_value == reference.sign_flip_p_value(thousandths)


def test_the_sign_flip_test_is_that_of_scipy() -> None:
    random = np.random.default_rng(0)
    for num_pairs in (2, 5, 8, 11):
        differences = random.normal(0.3, 1.0, num_pairs)
        exact = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
        assert sign_flip_p_value(differences.tolist()) == pytest.approx(exact.pvalue, rel=1e-12)


def test_identities_of_the_sign_flip_test() -> None:
    for num_pairs in range(2, 41):
        assert sign_flip_p_value([0.1] * num_pairs) == smallest_p_value(num_pairs) == 2 / 2**num_pairs
        if num_pairs % 2 == 0:
            assert sign_flip_p_value([0.1, -0.1] * (num_pairs // 2)) == 1
    assert sign_flip_p_value([0.3, 0.1]) == 0.5
    assert sign_flip_p_value([0.3, -0.1]) == 1.0
    random = np.random.default_rng(1)
    differences = random.normal(size=9).tolist()
    p_value = sign_flip_p_value(differences)
    for changed in ([-d for d in differences], [1e6 * d for d in differences], sorted(differences)):
        assert sign_flip_p_value(changed) == p_value
    assert sign_flip_p_value([*differences, 0.0]) == p_value, "a seed without a difference says nothing"


def test_the_t_test_and_the_effect_size_agree_with_an_integral() -> None:
    random = np.random.default_rng(2)
    for num_pairs in (3, 4, 9):
        values, base = random.normal(0.8, 0.02, num_pairs).tolist(), random.normal(0.79, 0.02, num_pairs).tolist()
        differences = [value - other for value, other in zip(values, base, strict=True)]
        paired = paired_statistics(values, base)
        assert paired.difference == pytest.approx(sum(differences) / num_pairs, rel=1e-12)
        assert paired.effect_size == pytest.approx(reference.effect_size(differences), rel=1e-10)
        assert paired.p_value == pytest.approx(reference.t_test(differences), rel=1e-4)
        half_width = reference.threshold_at(0.05, num_pairs - 1) * abs(paired.difference / paired.effect_size)
        assert paired.high - paired.difference == pytest.approx(half_width / math.sqrt(num_pairs), rel=1e-4)
        assert paired.difference - paired.low == pytest.approx(half_width / math.sqrt(num_pairs), rel=1e-4)


def test_n_2_and_equal_differences() -> None:
    """With two pairs the t-test is arctan: p = 2 / pi * atan(1 / |t|), one degree of freedom."""
    paired = paired_statistics([0.8, 0.9], [0.7, 0.6])
    assert (paired.difference, paired.effect_size) == pytest.approx((0.2, math.sqrt(2)))
    assert paired.p_value == pytest.approx(2 / math.pi * math.atan(1 / 2))
    assert paired.exact_p_value == 0.5
    equal = paired_statistics([0.8, 0.9, 0.7], [0.7, 0.8, 0.6])
    assert (equal.p_value, equal.effect_size, equal.seeds_needed) == (None, None, None)
    assert (equal.low, equal.high) == (None, None), "no spread to estimate an interval from"
    assert equal.exact_p_value == 0.25
    nothing = paired_statistics([0.8, 0.6], [0.7, 0.7])
    assert (nothing.effect_size, nothing.seeds_needed, nothing.exact_p_value) == (0.0, None, 1.0)
    assert nothing.p_value == pytest.approx(1.0)


def test_holm_is_closed_testing_with_bonferroni() -> None:
    random = np.random.default_rng(3)
    for count in range(1, 7):
        for _ in range(5):
            p_values = (random.integers(1, 40, count) / 64).clip(0, 1).tolist()
            assert holm(p_values) == pytest.approx(reference.holm(p_values), rel=1e-12)
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_seeds_needed_are_those_of_the_tables_and_of_an_integral() -> None:
    """Pairs for a two-sided paired t-test at 5 % and 80 % power, as programs for planning studies give them."""
    table = {0.2: 199, 0.5: 34, 0.8: 15, 1.0: 10}
    assert {effect: seeds_needed(effect) for effect in table} == table
    for effect in (0.9, -1.7, 3.0):
        num_pairs = seeds_needed(effect)
        assert num_pairs is not None
        assert reference.power(effect, num_pairs) >= 0.8 > reference.power(effect, num_pairs - 1)
    assert seeds_needed(1e9) == seeds_needed(30.0) == 2
    assert seeds_needed(0.0) is None
    assert seeds_needed(1e-9) is None
    counts = [seeds_needed(effect) or math.inf for effect in np.geomspace(0.001, 100, 40).tolist()]
    assert counts == sorted(counts, reverse=True)


def test_the_fewest_seeds_are_the_first_that_can_reach_the_level() -> None:
    for num_contrasts in range(1, 15):
        num_seeds = fewest_seeds(num_contrasts)
        for count, can_reach in ((num_seeds, True), (num_seeds - 1, False)):
            best = holm([smallest_p_value(count)] * num_contrasts)
            assert (min(best) <= LEVEL) == can_reach


def rejected(differences: np.ndarray) -> np.ndarray:
    """Which contrasts of each comparison are at the level, of differences `[comparisons, contrasts, seeds]`."""
    p_values = [[sign_flip_p_value(row) for row in comparison] for comparison in differences.tolist()]
    return np.array([holm(row) for row in p_values]) <= LEVEL


@pytest.mark.parametrize("tail", ["normal", "heavy", "rounded"])
def test_planted_chance_is_called_real_in_at_most_5_percent(tail: str) -> None:
    """Three methods against one reference that is as good, 8 seeds; the alarm is any of the three."""
    random = np.random.default_rng(4)
    shape = (2000, 4, 8)
    values = random.standard_t(2, shape) if tail == "heavy" else random.normal(size=shape)
    if tail == "rounded":
        values = values.round()
    alarms = rejected(values[:, 1:] - values[:, :1]).any(axis=1)
    assert 0 < alarms.mean() <= LEVEL


def test_a_planted_effect_is_found_and_only_that() -> None:
    random = np.random.default_rng(5)
    differences = random.normal(size=(300, 3, 10))
    differences[:, 1] += 2.0
    share = rejected(differences).mean(axis=0)
    assert share[1] >= 0.95
    assert max(share[0], share[2]) <= LEVEL
    few = rejected(differences[:, :, :6])
    assert not few.any(), "6 seeds give no p below 1/32, and three contrasts need 1/60"


@pytest.mark.parametrize("outcomes", [(0.76, 0.09, 0.04, 0.11), (0.85, 0.02, 0.01, 0.12), (0.9, 0.0, 0.0, 0.1)])
def test_intervals_of_a_share_cover_the_truth_with_few_rows(outcomes: Sequence[float]) -> None:
    """Of 58 rows, where a bootstrap of the rows themselves would have no width whenever two models agree on all."""
    random, hits = np.random.default_rng(1), 0
    truth = (outcomes[0] + outcomes[2]) / (outcomes[0] + outcomes[1])
    for _ in range(200):
        rows = random.choice(4, size=58, p=outcomes)
        first, second = resampled_shares(rows < 2, rows % 2 == 0)
        low, high = percentile_interval(second / first)
        hits += low <= truth <= high
    assert hits / 200 > 0.9
