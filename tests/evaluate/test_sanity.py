"""The look at a teacher's answers: stopped where they are shown to be no better than an answer without a model."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from flexkd.evaluate.classification import Predictions
from flexkd.evaluate.inference import evenly_spaced
from flexkd.evaluate.likelihood import RowLikelihood
from flexkd.evaluate.sanity import SanityResult, classifier_sanity, language_model_sanity

NAMES = ("bad", "fair", "good")


def predictions(logits: Tensor, labels: Tensor) -> Predictions:
    return Predictions(tuple(map(str, range(len(labels)))), logits, labels)


def single(chosen: list[int], truth: list[int], classes: int = 3) -> SanityResult:
    logits = 4 * torch.nn.functional.one_hot(torch.tensor(chosen), classes).float()
    return classifier_sanity(predictions(logits, torch.tensor(truth)), "single_label", NAMES)


def test_R01_rows_are_taken_over_the_whole_split_which_may_be_sorted() -> None:
    rows: list[dict[str, object]] = [{"id": index} for index in range(1000)]
    ids = [row["id"] for row in evenly_spaced(rows, 4)]
    assert ids == [0, 250, 500, 750]
    assert evenly_spaced(rows[:3], 4) == rows[:3]


def test_R01_a_classifier_below_the_most_frequent_class_is_weak() -> None:
    look = single([2] * 40 + [0] * 60, [0] * 70 + [2] * 30)
    assert (look.verdict, look.stops, look.num_rows) == ("weak", True, 100)
    low, high = stats.binomtest(30, 100).proportion_ci(0.95, method="wilson")
    assert look.figure == (
        f"accuracy 0.3 (95 % interval {low:.4g} to {high:.4g}) on 100 validation rows, where always naming the most "
        "frequent class gives 0.7"
    )


def test_R01_wilsons_interval_is_the_closed_formula() -> None:
    rows, hits, z = 100, 30, stats.norm.ppf(0.975)
    centre = (hits + z * z / 2) / (rows + z * z)
    half = z / (rows + z * z) * math.sqrt(hits * (rows - hits) / rows + z * z / 4)
    look = single([2] * 40 + [0] * 60, [0] * 70 + [2] * 30)
    assert f"{centre - half:.4g} to {centre + half:.4g}" in look.figure


def test_R01_the_bound_decides_between_weak_doubtful_and_sound() -> None:
    truth = [0] * 50 + [1] * 50
    verdicts = {hits: single([0] * 50 + [1] * (hits - 50) + [0] * (100 - hits), truth).verdict for hits in (50, 55, 60)}
    # Always the same class: not shown to be better, and not shown to be of no use.
    assert verdicts == {50: "doubtful", 55: "doubtful", 60: "sound"}
    assert single([1] * 30 + [0] * 20 + [0] * 31 + [1] * 19, truth).verdict == "weak"


def test_R01_few_rows_never_stop() -> None:
    look = single([2] * 49, [0] * 48 + [1])
    assert (look.verdict, look.stops) == ("weak", False)
    assert single([2] * 50, [0] * 49 + [1]).stops


def test_R01_classes_in_another_order_are_said() -> None:
    truth = [0, 1, 2] * 40
    look = single([{0: 2, 1: 1, 2: 0}[label] for label in truth], truth)
    assert look.verdict in ("weak", "doubtful")
    assert look.hint == (
        "It says 'good' where the data say 'bad', 'bad' where the data say 'good': with its classes in another order "
        "its accuracy is 1"
    )
    assert single(truth, truth).hint == ""


def test_R01_rows_of_one_class_decide_nothing_and_rows_without_label_do_not_count() -> None:
    assert single([1] * 80, [0] * 80).verdict == "undecided"
    assert single([0] * 80, [-100] * 80).verdict == "undecided"
    assert single([0] * 80, [-100] * 20 + [0] * 40 + [1] * 20).num_rows == 60


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_R01_outputs_that_are_not_finite_are_weak(problem: str) -> None:
    shape = (60,) if problem == "single_label" else (60, 1)
    labels = torch.arange(60).reshape(shape) % 2
    logits = torch.full((60, 1 if problem == "regression" else 2), math.nan)
    look = classifier_sanity(predictions(logits, labels), problem)
    assert look.stops
    assert look.figure == "60 of 60 validation rows have outputs that are not finite"


def label_sets(rows: int = 200) -> Tensor:
    return (torch.rand(rows, 4, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.6, 0.3, 0.2, 0.1])).long()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_R01_outputs_that_are_not_finite_stop_however_few_rows_there_are(value: float) -> None:
    logits = torch.tensor([[value, 0.0]] * 3)
    assert classifier_sanity(predictions(logits, torch.tensor([0, 1, 1])), "single_label").stops
    assert language_model_sanity([RowLikelihood("0", 4, math.inf)], [[1, 2]], [[1]], 5).stops


def test_R01_label_sets_are_compared_with_the_best_constant_answer() -> None:
    truth = label_sets()
    sound = classifier_sanity(predictions(truth.float() * 2 - 1, truth), "multi_label")
    assert sound.verdict == "sound"
    swapped = classifier_sanity(predictions(truth.flip(1).float() * 2 - 1, truth), "multi_label")
    assert (swapped.verdict, swapped.stops) == ("weak", True)
    constants = [
        2 * int((truth.bool() & answer).sum()) / (int(truth.sum()) + int(answer.sum()) * len(truth))
        for answer in (torch.tensor([bool(bits >> label & 1) for label in range(4)]) for bits in range(1, 16))
    ]
    assert f"the same for all rows gives {max(constants):.4g}" in swapped.figure
    alike = torch.ones(60, 4).long()
    assert classifier_sanity(predictions(-alike.float(), alike), "multi_label").verdict == "undecided"


@pytest.mark.parametrize(("slope", "verdict"), [(1.0, "sound"), (0.0, "weak"), (-1.0, "weak")])
def test_R01_a_regressor_needs_a_correlation_above_zero(slope: float, verdict: str) -> None:
    values = torch.linspace(0, 5, 100)[:, None]
    noise = torch.randn(100, 1, generator=torch.Generator().manual_seed(1))
    look = classifier_sanity(predictions(slope * values + noise, values), "regression")
    assert look.verdict == verdict
    assert look.stops == (verdict == "weak")


def test_R01_fishers_interval_is_the_closed_formula() -> None:
    values = torch.linspace(0, 5, 100)[:, None]
    noise = torch.randn(100, 1, generator=torch.Generator().manual_seed(1))
    look = classifier_sanity(predictions(values + 4 * noise, values), "regression")
    r = np.corrcoef((values + 4 * noise)[:, 0], values[:, 0])[0, 1]
    low, high = (math.tanh(math.atanh(r) + sign * stats.norm.ppf(0.975) / math.sqrt(97)) for sign in (-1, 1))
    assert f"pearson {r:.4g} (95 % interval {low:.4g} to {high:.4g})" in look.figure


def test_R01_a_regressor_that_says_one_value_is_weak_and_labels_of_one_value_decide_nothing() -> None:
    values = torch.linspace(0, 5, 60)[:, None]
    assert classifier_sanity(predictions(torch.full((60, 1), 2.5), values), "regression").stops
    assert classifier_sanity(predictions(values, torch.ones(60, 1)), "regression").verdict == "undecided"


def test_R01_a_language_model_has_to_beat_the_frequencies_of_tokens() -> None:
    answers, asked = [[-100, 3, 3, 4]] * 10, [[-100, 3, 5]] * 60
    # 20 threes, 10 fours, and one of each of 8 tokens.
    unigram = -(math.log(21 / 38) + math.log(1 / 38)) / 2
    for nll, verdict in ((unigram - 1e-6, "sound"), (unigram + 1e-6, "weak")):
        rows = [RowLikelihood(str(index), 2, 2 * nll) for index in range(60)]
        look = language_model_sanity(rows, answers, asked, 8)
        assert (look.verdict, look.num_rows) == (verdict, 60)
        assert f"give {unigram:.4g}" in look.figure
    assert language_model_sanity([RowLikelihood("0", 2, math.nan)] * 60, answers, asked, 8).stops
    assert language_model_sanity([RowLikelihood("0", 0, 0.0)], answers, [[-100]], 8).verdict == "undecided"
