import dataclasses
import logging
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexkd.core.scores import (
    ATTRIBUTIONS,
    CONTROLS,
    FEW_PREDICTIONS,
    GRADIENT_ATTRIBUTIONS,
    TARGETS,
    ScoreAccumulator,
    UnitScores,
    label_target,
    label_values,
)
from flexkd.errors import ScoreError
from tests.closeness import assert_close
from tests.references import scores as reference
from tests.references.draws import classes, normal, permutation

NAN = float("nan")
every_target = pytest.mark.parametrize("target", TARGETS)


def head_gradient(states: Tensor, weight: Tensor, labels: Tensor, target: str) -> Tensor:
    """d y / d h by autograd through a linear head."""
    states = states.detach().clone().requires_grad_()
    return torch.autograd.grad(label_target(states @ weight.T, labels, target=target), states)[0]


def score(
    gradients: Tensor,
    states: Tensor,
    *,
    target: str = "logit",
    attribution: str = "gradient",
    yard_stick: Tensor | None = None,
    batch_size: int = 1000,
    seed: int = 0,
) -> UnitScores:
    """Scores of one supervised state for each row, in batches."""
    accumulator = ScoreAccumulator(states.shape[-1], target=target, attribution=attribution, layer=-1, seed=seed)
    for start in range(0, len(states), batch_size):
        rows = slice(start, start + batch_size)
        count = len(states[rows])
        accumulator.add(
            gradients[rows, None],
            states[rows, None],
            torch.ones(count, 1, dtype=torch.bool),
            torch.ones(count, dtype=torch.long),
        )
        if yard_stick is not None:
            accumulator.add_reference(yard_stick[rows, None], torch.ones(count, 1, dtype=torch.bool), count)
    return accumulator.scores()


@every_target
@pytest.mark.parametrize("attribution", GRADIENT_ATTRIBUTIONS)
def test_scores_of_a_linear_head_are_the_slow_derivation(attribution: str, target: str) -> None:
    states, weight, labels = normal(200, 6, seed=1), normal(4, 6, seed=2), classes(200, num_classes=4, seed=3)
    gradients = head_gradient(states, weight, labels, target)
    scores = score(gradients, states, target=target, attribution=attribution)
    assert_close(scores.values, reference.head_scores(states, weight, labels, target, attribution), dtype=torch.float32)
    assert (scores.target, scores.attribution, scores.layer) == (target, attribution, -1)
    assert (scores.num_predictions, scores.values.dtype, scores.values.device.type) == (200, torch.float64, "cpu")


def test_log_prob_target_is_minus_torchs_cross_entropy() -> None:
    logits, labels = normal(9, 5, seed=4), classes(9, num_classes=5, seed=5)
    labels[[2, 6]] = -100
    assert_close(label_target(logits, labels), -F.cross_entropy(logits, labels, reduction="sum"))
    assert label_target(logits.half(), labels).dtype == torch.float32


def test_logit_targets_pick_the_label_and_the_prediction_minus_the_mean() -> None:
    logits, labels = torch.tensor([[1.0, 2.0, 6.0], [3.0, 0.0, 0.0]]), torch.tensor([1, 0])
    assert_close(label_target(logits, labels, target="logit"), (2 - 3) + (3 - 1))
    assert_close(label_target(logits, labels, target="predicted_logit"), (6 - 3) + (3 - 1))


def test_targets_of_independent_labels_and_of_regression() -> None:
    logits, labels = normal(6, 3, seed=6), classes(6, 3, num_classes=2, seed=7).float()
    expected = -F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    assert_close(label_target(logits, labels), expected)
    assert_close(label_target(logits, labels, target="logit"), ((2 * labels - 1) * logits).sum())
    assert_close(label_target(logits, labels, target="predicted_logit"), logits.abs().sum())
    unlabelled = labels.clone()
    unlabelled[2] = NAN
    kept = [0, 1, 3, 4, 5]
    assert_close(label_target(logits, unlabelled), label_target(logits[kept], labels[kept]))
    for target in TARGETS:
        assert_close(label_target(logits[:, :1], normal(6, 1, seed=8), target=target), logits[:, 0].sum())


@every_target
def test_M01_labels_that_are_all_ignored_give_a_connected_zero(target: str) -> None:
    logits = normal(4, 3, seed=9).requires_grad_()
    value = label_target(logits, torch.full((4,), -100), target=target)
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@every_target
def test_a_direction_that_moves_all_logits_alike_scores_nothing(target: str) -> None:
    states, weight, labels = normal(300, 6, seed=10), normal(4, 6, seed=11), classes(300, num_classes=4, seed=12)
    weight[:, 3] = 5.0
    values = score(head_gradient(states, weight, labels, target), states, target=target).values
    assert values[3] < 1e-6 * values[[0, 1, 2, 4, 5]].min()


@every_target
@pytest.mark.parametrize("attribution", GRADIENT_ATTRIBUTIONS)
def test_scores_find_exactly_the_planted_units_and_controls_do_not(attribution: str, target: str) -> None:
    planted = [2, 5, 11, 12]
    weight = torch.zeros(3, 16)
    weight[:, planted] = normal(3, 4, seed=13)
    states, labels = normal(400, 16, seed=14), classes(400, num_classes=3, seed=15)
    states[:, [0, 7]] *= 30
    scores = score(head_gradient(states, weight, labels, target), states, target=target, attribution=attribution)
    assert torch.nonzero(scores.values).flatten().tolist() == planted
    assert scores.num_unused == 12
    for control in CONTROLS:
        best = score(torch.zeros_like(states), states, attribution=control).values.topk(4).indices
        assert set(best.tolist()) != set(planted)


def test_controls_are_what_they_say() -> None:
    states = normal(50, 4, seed=16, mean=2.0)
    gradients = torch.zeros_like(states)
    assert_close(score(gradients, states, attribution="activation").values, states.abs().double().mean(0))
    assert_close(score(gradients, states, attribution="variance").values, np.var(states.double().numpy(), axis=0))
    drawn = [score(gradients, states, attribution="random", seed=seed).values for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_F03_variance_of_a_unit_with_a_large_mean_keeps_its_digits() -> None:
    states = 300 + normal(4096, 2, seed=17, scale=0.01)
    values = score(torch.zeros_like(states), states, attribution="variance").values
    torch.testing.assert_close(values, states.double().var(0, unbiased=False), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("attribution", ATTRIBUTIONS)
def test_F10_scores_do_not_depend_on_batch_size_order_or_padding(attribution: str) -> None:
    gradients, states = normal(8, 5, 6, seed=18), normal(8, 5, 6, seed=19)
    lengths = torch.tensor([5, 1, 3, 4, 2, 5, 1, 2])
    mask = torch.arange(5) < lengths[:, None]

    def total(rows: list[int], batch_size: int, padding: int) -> UnitScores:
        accumulator = ScoreAccumulator(6, target="logit", attribution=attribution, layer=-1)
        for start in range(0, 8, batch_size):
            batch = rows[start : start + batch_size]
            pad = torch.full((len(batch), padding, 6), NAN)
            accumulator.add(
                torch.cat([gradients[batch], pad], 1),
                torch.cat([states[batch], pad], 1),
                torch.cat([mask[batch], torch.zeros(len(batch), padding, dtype=torch.bool)], 1),
                lengths[batch],
            )
        return accumulator.scores()

    whole = total(list(range(8)), 8, 0)
    for other in (total(list(range(8)), 1, 0), total(permutation(8, seed=20).tolist(), 3, 4)):
        assert_close(other.values, whole.values)
        assert_close(other.effective_predictions, whole.effective_predictions)
        assert other.num_predictions == whole.num_predictions == 23


def test_F19_positions_outside_of_the_mask_score_nothing() -> None:
    gradients, states = normal(3, 4, 5, seed=21), normal(3, 4, 5, seed=22)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[:, 0] = False
    accumulator = ScoreAccumulator(5, target="logit", attribution="gradient", layer=2)
    spiked = gradients.clone()
    spiked[:, 0, 3] = 1000
    accumulator.add(spiked, states, mask, torch.tensor([3, 3, 3]))
    assert_close(accumulator.scores().values, gradients[:, 1:].double().abs().sum((0, 1)) / 9)


def test_several_predictions_of_one_row_divide_once() -> None:
    gradients, states = normal(2, 4, 3, seed=23), normal(2, 4, 3, seed=24)
    accumulator = ScoreAccumulator(3, target="logit", attribution="gradient", layer=1)
    accumulator.add(gradients, states, torch.ones(2, 4, dtype=torch.bool), torch.tensor([2, 4]))
    scores = accumulator.scores()
    assert_close(scores.values, gradients.double().abs().sum((0, 1)) / 6)
    # Each prediction of a row stands for an equal part of the row's weight.
    weights = gradients.double().abs().sum((1, 2))
    parts = [float(weights[0]) / 2] * 2 + [float(weights[1]) / 4] * 4
    assert scores.effective_predictions == pytest.approx(reference.kish(parts))


def test_F09_sums_are_kept_in_float64() -> None:
    accumulator = ScoreAccumulator(2, target="logit", attribution="gradient", layer=-1)
    for size in [1.0] + [0.001] * 1000:
        one = torch.tensor([[[size, 3 * size]]], dtype=torch.bfloat16)
        accumulator.add(one, one, torch.ones(1, 1, dtype=torch.bool), torch.tensor([1]))
    rounded = torch.tensor([0.001, 0.003], dtype=torch.bfloat16).double()
    expected = (torch.tensor([1.0, 3.0], dtype=torch.float64) + 1000 * rounded) / 1001
    assert_close(accumulator.scores().values, expected)


def test_F09_a_scalar_without_a_gradient_is_refused_by_name() -> None:
    states, weight = normal(200, 6, seed=25), normal(4, 6, seed=26)
    leaf = states.clone().requires_grad_()
    probabilities = torch.autograd.grad((leaf @ weight.T).softmax(-1).sum(), leaf)[0]
    yard_stick = weight[classes(200, num_classes=4, seed=27)]
    with pytest.raises(ScoreError, match=re.escape("Use target 'logit' or 'predicted_logit'.")):
        score(probabilities, states, target="log_prob", yard_stick=yard_stick)


@pytest.mark.parametrize("attribution", GRADIENT_ATTRIBUTIONS)
def test_F09_a_confident_teacher_is_refused_under_log_prob_and_scored_under_logit(attribution: str) -> None:
    states, weight = normal(200, 6, seed=28), normal(4, 6, seed=29)
    logits = states @ weight.T
    labels = logits.argmax(-1)
    # The gap between the first and every other logit is 100.
    leaf = states.clone().requires_grad_()
    apart = leaf @ weight.T + 100 * F.one_hot(labels, 4)
    gradients = torch.autograd.grad(label_target(apart, labels), leaf)[0]
    yard_stick = weight[labels]
    with pytest.raises(ScoreError, match=re.escape("scores: the largest 'log_prob' score is")):
        score(gradients, states, target="log_prob", attribution=attribution, yard_stick=yard_stick)
    plain = head_gradient(states, weight, labels, "logit")
    assert (score(plain, states, attribution=attribution, yard_stick=yard_stick).values > 0).all()


@pytest.mark.parametrize("attribution", GRADIENT_ATTRIBUTIONS)
def test_F09_scores_that_are_all_zero_are_refused(attribution: str) -> None:
    gradients, states = normal(200, 4, seed=30), normal(200, 4, seed=31)
    dead = {"gradient": gradients, "fisher": gradients, "gradient_x_activation": states}[attribution]
    dead.zero_()
    with pytest.raises(ScoreError, match="rounding noise"):
        score(gradients, states, attribution=attribution)


def test_F09_mostly_equal_scores_are_refused_and_unused_units_are_not() -> None:
    gradients, states = torch.ones(200, 8), normal(200, 8, seed=32)
    gradients[:, :3] = torch.tensor([2.0, 3.0, 4.0])
    with pytest.raises(ScoreError, match=re.escape("scores: 5 of 8 non-zero 'logit' scores are equal")):
        score(gradients, states)
    gradients[:, 6:] = 0
    scores = score(gradients, states)
    assert scores.values.tolist() == [2.0, 3.0, 4.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert scores.num_unused == 2
    # Unused units are no part of the count: three of five is more than half.
    gradients[:, 2] = 0
    with pytest.raises(ScoreError, match=re.escape("scores: 3 of 5 non-zero 'logit' scores are equal")):
        score(gradients, states)


def test_F12_a_score_that_is_not_finite_names_its_units() -> None:
    gradients = normal(20, 15, seed=33)
    gradients[3, 4], gradients[5, 9] = NAN, float("inf")
    with pytest.raises(ScoreError, match=re.escape("scores: not finite for unit 4, 9. Score with a teacher")):
        score(gradients, normal(20, 15, seed=34))


def test_few_effective_predictions_are_warned_about_under_log_prob_only(caplog: pytest.LogCaptureFixture) -> None:
    gradients, states = normal(500, 4, seed=35, scale=1e-3), normal(500, 4, seed=36)
    gradients[:5] *= 1e5
    with caplog.at_level(logging.WARNING, logger="flexkd.core.scores"):
        few = score(gradients, states, target="log_prob")
        assert few.effective_predictions == pytest.approx(reference.kish(gradients.double().abs().sum(-1)))
        assert few.effective_predictions < 6 < FEW_PREDICTIONS
        assert "of 500 predictions decide the log_prob scores" in caplog.text
        assert "'logit'" in caplog.text
        caplog.clear()
        score(gradients, states, target="logit")
        score(normal(500, 4, seed=35), states, target="log_prob")
        assert caplog.text == ""


def test_permuting_units_permutes_scores() -> None:
    gradients, states, order = normal(100, 7, seed=37), normal(100, 7, seed=38), permutation(7, seed=39)
    assert torch.equal(score(gradients[:, order], states[:, order]).values, score(gradients, states).values[order])


def test_unknown_names_and_missing_labels_are_refused() -> None:
    with pytest.raises(ScoreError, match=re.escape("scores.target: unknown target 'logits'. Known: log_prob, logit")):
        label_target(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), target="logits")
    with pytest.raises(ScoreError, match=re.escape("Did you mean 'fisher'?")):
        ScoreAccumulator(3, target="logit", attribution="fischer", layer=-1)
    with pytest.raises(ScoreError, match=re.escape("scores: no supervised label in the batches.")):
        ScoreAccumulator(3, target="logit", attribution="gradient", layer=-1).scores()


def test_unit_scores_are_frozen() -> None:
    scores = UnitScores(torch.zeros(2, dtype=torch.float64), "logit", "gradient", -1, 3, 3.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scores.layer = 2  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_log_prob_keeps_its_digits_however_likely_the_label_is(dtype: torch.dtype) -> None:
    """Against the softmax of the same logits in float64: labels of probability 1 - 1e-17, likely, rare and hopeless."""
    torch.manual_seed(0)
    rows = labels = torch.arange(8)
    logits = (3 * torch.randn(8, 50, dtype=torch.float64)).to(dtype)
    logits[rows[:4], labels[:4]] = torch.tensor([24.0, 14.0, 10.0, 40.0], dtype=dtype)
    logits[5, 9] = 120.0
    given = logits.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        values = label_values(given, labels, target="log_prob")
    (found,) = torch.autograd.grad(values.sum(), given)
    others = logits.double().softmax(-1)
    others[rows, labels] = 0
    expected = -others
    expected[rows, labels] = others.sum(-1)
    assert found.dtype == dtype
    assert_close(values, logits.double().log_softmax(-1)[rows, labels], dtype=dtype)
    # float16 has no numbers below 6e-8, and their digits fade below 6e-5.
    floor = 1e-5 if dtype == torch.float16 else 1e-30
    error = (found.double() - expected).abs() / (expected.abs() + floor)
    assert error.max() < {torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 0.02}[dtype]
