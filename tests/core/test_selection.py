import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from flexkd.core.scores import UnitScores
from flexkd.core.selection import UnitPairs, coverage_curve, pair_units, ranked_units, select_units, units_for_coverage
from flexkd.errors import RecipeError, ScoreError, ShapeError
from tests.closeness import assert_close
from tests.references.correlation import coefficient
from tests.references.draws import normal, permutation

NAN, INFINITY = float("nan"), float("inf")


def test_the_best_units_come_in_ascending_order() -> None:
    scores = torch.tensor([0.3, 0.9, 0.1, 0.5, 0.7])
    assert select_units(scores, 3).tolist() == [1, 3, 4]
    assert select_units(scores, 3).dtype == torch.int64
    assert ranked_units(scores).tolist() == [1, 4, 3, 0, 2]
    wrapped = UnitScores(scores.double(), "logit", "gradient", -1, 10, 10.0)
    assert select_units(wrapped, 3).tolist() == [1, 3, 4]


def test_selection_agrees_with_a_sort_of_pairs() -> None:
    scores = torch.randint(5, (40,), generator=torch.Generator().manual_seed(1)).double()
    for k in range(1, 41):
        by_hand = sorted(sorted(range(40), key=lambda unit: (-float(scores[unit]), unit))[:k])
        assert select_units(scores, k).tolist() == by_hand


def test_F12_the_lower_index_wins_on_ties() -> None:
    assert select_units(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), 2).tolist() == [0, 1]
    assert select_units(torch.ones(5000), 3).tolist() == [0, 1, 2]
    assert ranked_units(torch.tensor([1.0, 2.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
def test_F12_scores_that_are_not_finite_are_refused_by_unit(bad: float) -> None:
    with pytest.raises(ScoreError, match=re.escape("scores: not finite for unit 1, 3.")):
        select_units(torch.tensor([1.0, bad, 3.0, bad]), 2)
    with pytest.raises(ScoreError, match="not finite for unit 1"):
        units_for_coverage(torch.tensor([1.0, bad]), 0.5)


@pytest.mark.parametrize("k", [7, 8])
def test_F13_a_student_as_wide_as_the_teacher_or_narrower_is_served(k: int) -> None:
    scores = normal(8, seed=2).abs()
    units = select_units(scores, k)
    assert units.tolist() == sorted(set(range(8)) - ({int(scores.argmin())} if k == 7 else set()))
    assert pair_units(units, k).student.tolist() == list(range(k))


def test_F13_a_student_wider_than_the_teacher_is_taught_all_units() -> None:
    with pytest.raises(ShapeError, match=re.escape("units: cannot choose 16 of 8 teacher units. Ask for 1 to 8.")):
        select_units(normal(8, seed=2), 16)
    pairs = pair_units(select_units(normal(8, seed=2), 8), 16)
    assert pairs.student.tolist() == pairs.teacher.tolist() == list(range(8))


@pytest.mark.parametrize("k", [0, -1])
def test_F13_no_units_are_no_selection(k: int) -> None:
    with pytest.raises(ShapeError, match=re.escape(f"units: cannot choose {k} of 8 teacher units.")):
        select_units(normal(8, seed=2), k)


def test_coverage_counts_the_fewest_units_that_hold_the_share() -> None:
    scores = torch.tensor([1.0, 4.0, 0.0, 3.0, 2.0])
    assert_close(coverage_curve(scores), [0.4, 0.7, 0.9, 1.0, 1.0])
    wanted = {0.01: 1, 0.4: 1, 0.41: 2, 0.7: 2, 0.9: 3, 0.91: 4, 1.0: 4}
    assert {share: units_for_coverage(scores, share) for share in wanted} == wanted


def test_coverage_agrees_with_a_loop_over_numpy_sums() -> None:
    scores = normal(60, seed=3).abs().double()
    ordered = np.sort(scores.numpy())[::-1]
    for share in (0.1, 0.5, 0.9, 0.99, 1.0):
        held = [ordered[: count + 1].sum() >= share * ordered.sum() * (1 - 1e-12) for count in range(60)]
        assert units_for_coverage(scores, share) == held.index(True) + 1
    assert select_units(scores, units_for_coverage(scores, 0.5)).numel() < 30


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, NAN])
def test_a_share_outside_of_zero_to_one_is_refused(share: float) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"coverage: must be above 0 and at most 1, was {share}.")):
        units_for_coverage(torch.ones(3), share)


def test_F09_coverage_of_scores_that_are_all_zero_is_refused() -> None:
    with pytest.raises(ScoreError, match="scores: "):
        units_for_coverage(torch.zeros(4), 0.9)


def test_index_and_score_mappings_bind_the_first_student_units() -> None:
    scores = torch.tensor([0.1, 0.9, 0.3, 0.5, 0.7])
    units = select_units(scores, 3)
    by_index = pair_units(units, 4)
    assert (by_index.student.tolist(), by_index.teacher.tolist()) == ([0, 1, 2], [1, 3, 4])
    by_score = pair_units(units, 4, mapping="score", scores=scores)
    assert (by_score.student.tolist(), by_score.teacher.tolist()) == ([0, 1, 2], [1, 4, 3])


def test_matched_mapping_undoes_a_permutation_with_noise_shift_and_scale() -> None:
    teacher = normal(200, 6, seed=4)
    order = permutation(6, seed=5)
    student = 3 * (teacher + normal(200, 6, seed=6, scale=0.5))[:, order] - 7
    units = torch.tensor([3, 10, 11, 20, 31, 40])
    pairs = pair_units(units, 6, mapping="matched", student_states=student, teacher_states=teacher)
    assert pairs.student.tolist() == list(range(6))
    assert pairs.teacher.tolist() == units[order].tolist()


@pytest.mark.parametrize("student_size", [4, 6])
def test_matched_mapping_has_the_highest_sum_of_signed_correlations(student_size: int) -> None:
    student, teacher = normal(30, student_size, seed=7), normal(30, 4, seed=8)
    student[:, 0] -= 3 * teacher[:, 2]
    matrix = np.array([[coefficient(x, y) for y in teacher.double().numpy().T] for x in student.double().numpy().T])
    pairs = pair_units(torch.arange(4), student_size, mapping="matched", student_states=student, teacher_states=teacher)
    found = matrix[pairs.student.numpy(), pairs.teacher.numpy()].sum()
    best = max(
        sum(matrix[chosen[unit], unit] for unit in range(4))
        for chosen in itertools.permutations(range(student_size), 4)
    )
    assert found == pytest.approx(best)
    rows, columns = linear_sum_assignment(-matrix)
    assert (pairs.student.tolist(), pairs.teacher.tolist()) == (rows.tolist(), columns.tolist())
    # A strong negative correlation is no match.
    assert (0, 2) not in zip(pairs.student.tolist(), pairs.teacher.tolist(), strict=True)


def test_F01_matched_mapping_survives_dead_units() -> None:
    teacher = normal(40, 3, seed=9)
    student = teacher[:, [2, 0, 1]].clone()
    student[:, 1] = 5.0
    pairs = pair_units(torch.arange(3), 3, mapping="matched", student_states=student, teacher_states=teacher)
    assert pairs.teacher.tolist() == [2, 0, 1]


def test_bad_mappings_are_refused() -> None:
    with pytest.raises(RecipeError, match=re.escape("Did you mean 'matched'?")):
        pair_units(torch.arange(2), 2, mapping="match")
    with pytest.raises(ShapeError, match=re.escape("units: 3 teacher units for 2 student units.")):
        pair_units(torch.arange(3), 2)


def test_permuting_teacher_units_permutes_the_selection() -> None:
    scores, order = normal(20, seed=10).abs(), permutation(20, seed=11)
    assert sorted(order[select_units(scores[order], 6)].tolist()) == select_units(scores, 6).tolist()


def test_pairs_are_frozen() -> None:
    pairs = UnitPairs(torch.arange(2), torch.arange(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pairs.student = torch.arange(3)  # type: ignore[misc]
