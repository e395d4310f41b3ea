import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax

from flexkd.core.losses import LOGIT_LOSSES, Projector
from flexkd.core.selection import UnitPairs
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.errors import RecipeError
from tests.closeness import assert_close
from tests.references.draws import classes, normal

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_minus_the_log_probability_of_a_smoothed_label(smoothing: float) -> None:
    logits, labels = normal(7, 4, seed=1), classes(7, num_classes=4, seed=2)
    target = (1 - smoothing) * np.eye(4)[labels.numpy()] + smoothing / 4
    expected = -(target * log_softmax(logits.double().numpy(), -1)).sum(-1)
    assert_close(TaskTerm(label_smoothing=smoothing).values(logits, labels), expected)


def test_M01_predictions_without_a_label_have_loss_zero_and_gradient_zero() -> None:
    logits, labels = normal(6, 4, seed=3), classes(6, num_classes=4, seed=4)
    labels[[1, 4]] = -100
    several = classes(6, 4, num_classes=2, seed=5).float()
    several[[1, 4]] = NAN
    for term, target in (
        (TaskTerm(), labels),
        (TaskTerm(label_smoothing=0.1), labels),
        (TaskTerm("binary_cross_entropy"), several),
        (TaskTerm("mse"), several),
    ):
        leaf = logits.clone().requires_grad_()
        values = term.values(leaf, target)
        values.sum().backward()
        assert leaf.grad is not None
        for number, grad in ((values, leaf.grad.abs().sum(-1)), (leaf.grad.abs().sum(-1), values)):
            assert (number[[1, 4]] == 0).all()
            assert (grad[[0, 2, 3, 5]] > 0).all()


def test_independent_labels_add_up_and_unknown_ones_of_a_row_are_left_out() -> None:
    logits, labels = normal(6, 3, seed=6), classes(6, 3, num_classes=2, seed=7).float()
    plain = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none")
    assert_close(TaskTerm("binary_cross_entropy").values(logits, labels), plain.sum(-1), dtype=torch.float32)
    labels[2, 1] = NAN
    expected = plain[2, 0] + plain[2, 2]
    assert_close(TaskTerm("binary_cross_entropy").values(logits, labels)[2], expected, dtype=torch.float32)


def test_regression_takes_labels_of_either_shape() -> None:
    logits, labels = normal(6, 1, seed=8), normal(6, seed=9)
    expected = (logits[:, 0] - labels).square()
    assert_close(TaskTerm("mse").values(logits, labels), expected)
    assert_close(TaskTerm("mse").values(logits, labels[:, None]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits, labels = normal(5, 3, seed=10, dtype=dtype), classes(5, 3, num_classes=2, seed=11)
    for name, target in (("cross_entropy", labels[:, 0]), ("binary_cross_entropy", labels.float())):
        values = TaskTerm(name).values(logits, target)
        assert values.dtype == torch.float32
        assert torch.equal(values, TaskTerm(name).values(logits.float(), target))


@pytest.mark.parametrize("weight", [-0.1, -INFINITY, INFINITY, NAN])
@pytest.mark.parametrize("term", [TaskTerm, LogitTerm, FeatureTerm])
def test_L04_a_weight_that_is_negative_or_not_finite_is_refused(term: type, weight: float) -> None:
    with pytest.raises(RecipeError, match=re.escape(f".weight: must be 0 or above, was {weight}.")):
        term(weight=weight)


@pytest.mark.parametrize("temperature", [0.0, -2.0, NAN, INFINITY])
def test_L04_a_temperature_that_is_not_a_number_above_zero_is_refused(temperature: float) -> None:
    with pytest.raises(RecipeError, match=re.escape("objective.logits.temperature: must be ")):
        LogitTerm(temperature=temperature)


def test_L04_unknown_names_are_refused_with_the_nearest_one() -> None:
    for build, message in (
        (lambda: TaskTerm("cross_entrpy"), "objective.task.loss: unknown loss 'cross_entrpy'."),
        (lambda: LogitTerm("forwrd_kl"), "objective.logits.loss: unknown loss 'forwrd_kl'."),
        (lambda: FeatureTerm("corelation"), "objective.features.loss: unknown loss 'corelation'."),
        (lambda: FeatureTerm(positions="token"), "objective.features.positions: unknown positions 'token'."),
    ):
        with pytest.raises(RecipeError, match=re.escape(message) + ".*Did you mean"):
            build()


def test_L04_settings_that_the_loss_would_ignore_are_refused() -> None:
    with pytest.raises(RecipeError, match=re.escape("objective.logits.beta: not used by 'forward_kl'.")):
        LogitTerm("forward_kl", beta=0.5)
    with pytest.raises(RecipeError, match=re.escape("objective.logits.alpha: not used by 'jensen_shannon'.")):
        LogitTerm("jensen_shannon", alpha=0.5)
    with pytest.raises(RecipeError, match="temperature"):
        LogitTerm("mse", temperature=2.0)
    for loss in ("binary_cross_entropy", "mse"):
        with pytest.raises(RecipeError, match="label_smoothing"):
            TaskTerm(loss, label_smoothing=0.1)


def test_L04_settings_out_of_range_are_refused_before_the_first_batch() -> None:
    for build, name in (
        (lambda: LogitTerm("jensen_shannon", beta=1.5), "beta"),
        (lambda: LogitTerm("skew_kl", alpha=-0.5), "alpha"),
        (lambda: TaskTerm(label_smoothing=1.5), "label_smoothing"),
        (lambda: TaskTerm(label_smoothing=-0.1), "label_smoothing"),
        (lambda: FeatureTerm(layers=()), "layers"),
    ):
        with pytest.raises(RecipeError, match=name):
            build()


@pytest.mark.parametrize("name", sorted(LOGIT_LOSSES))
def test_M08_gradients_keep_their_size_at_any_temperature(name: str) -> None:
    student, teacher = normal(32, 10, seed=12), normal(32, 10, seed=13)
    sizes = []
    for temperature in (4.0, 8.0, 16.0, 32.0):
        term, leaf = LogitTerm(name, temperature=temperature), student.clone().requires_grad_()
        scaled = term.scale * term.values(LOGIT_LOSSES, leaf, teacher).sum()
        sizes.append(float(torch.autograd.grad(scaled, leaf)[0].norm()))
    # Without the factor the last would be 8 (total variation) or 64 times smaller than the first.
    assert max(sizes) < 1.3 * min(sizes)


def test_M08_the_scale_is_the_square_of_the_temperature_but_for_total_variation() -> None:
    assert LogitTerm("forward_kl", temperature=3.0).scale == 9.0
    assert LogitTerm("total_variation", temperature=3.0).scale == 3.0


def test_options_reach_the_loss() -> None:
    student, teacher = normal(3, 4, seed=14), normal(3, 4, seed=15)
    term = LogitTerm("jensen_shannon", beta=0.2, temperature=2.0)
    assert torch.equal(
        term.values(LOGIT_LOSSES, student, teacher), LOGIT_LOSSES["jensen_shannon"](student, teacher, 2.0, beta=0.2)
    )


@pytest.mark.parametrize("fade", [0.0, 1.5, -0.2])
def test_a_fade_is_a_share_of_the_steps(fade: float) -> None:
    with pytest.raises(
        RecipeError, match=re.escape(f"objective.features.fade: must be above 0 and at most 1, was {fade}.")
    ):
        FeatureTerm(fade=fade)


def test_projector_takes_one_map_for_each_pair_of_layers_and_other_losses_none() -> None:
    assert FeatureTerm("projector", projectors=(Projector(3, 4),)).projectors
    for build in (
        lambda: FeatureTerm("projector"),
        lambda: FeatureTerm("correlation", projectors=(Projector(3, 4),)),
        lambda: FeatureTerm("projector", layers=(LayerPair(), LayerPair(1, 2)), projectors=(Projector(3, 4),)),
    ):
        with pytest.raises(RecipeError, match=re.escape("objective.features.projectors: ")):
            build()


def test_a_layer_pair_says_what_is_taught_where() -> None:
    pairs = UnitPairs(torch.arange(3), torch.tensor([2, 5, 7]))
    assert LayerPair().describe() == "all units of layer -1 -> -1"
    assert LayerPair(2, 4, pairs).describe() == "3 units of layer 4 -> 2"
    assert LayerPair(2, 4, pairs, torch.eye(8)).describe() == "3 directions of layer 4 -> 2"


def test_a_layer_pair_of_units_binds_the_first_student_units() -> None:
    pair = LayerPair.of_units(torch.tensor([2, 5, 7]), student_layer=1, teacher_layer=4)
    assert (pair.student_layer, pair.teacher_layer, pair.teacher_basis) == (1, 4, None)
    assert pair.units is not None
    assert (pair.units.student.tolist(), pair.units.teacher.tolist()) == ([0, 1, 2], [2, 5, 7])
