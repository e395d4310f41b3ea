import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flexkd.core.losses import LOGIT_LOSSES, Projector, cka, correlation, forward_kl
from flexkd.core.objective import Objective, Signal, StepCounts
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.errors import RecipeError, ShapeError
from tests.closeness import assert_close
from tests.core.signals import UNITS, gradients, part_of, signals
from tests.references import correlation as reference
from tests.references import divergences
from tests.references.draws import normal


def test_the_objective_is_the_weighted_sum_of_its_slow_derivations() -> None:
    student, teacher, labels = signals(20)
    value = Objective(TaskTerm(weight=0.7), LogitTerm(weight=2.0, temperature=3.0), FeatureTerm(weight=0.25))(
        student, teacher, labels
    )
    assert student.logits is not None
    assert teacher.logits is not None
    ours, theirs = student.logits.detach(), teacher.logits
    task = -np.mean([math.log(divergences.distribution(row)[int(y)]) for row, y in zip(ours, labels, strict=True)])
    logits = divergences.rows("forward_kl", ours, theirs, 3.0, 0.0).mean()
    features = reference.correlation(student.features[0].detach(), teacher.features[0]).mean()
    assert_close(value.loss, 0.7 * task + 2.0 * 9.0 * logits + 0.25 * features)
    raw = {"task_raw": task, "logits_raw": logits, "features_raw": features}
    weighted = {"task_weighted": 0.7 * task, "logits_weighted": 18 * logits, "features_weighted": 0.25 * features}
    assert value.parts.keys() == raw.keys() | weighted.keys()
    for name, expected in (raw | weighted).items():
        assert_close(value.parts[name], float(expected))
        assert not value.parts[name].requires_grad


def test_L06_the_weighted_parts_add_up_to_the_loss() -> None:
    for seed in range(10):
        student, teacher, labels = signals(12, seed=10 * seed)
        objective = Objective(TaskTerm(weight=0.3), LogitTerm("total_variation", 7.0, 4.0), FeatureTerm("mse", 3.0))
        value = objective(student, teacher, labels, StepCounts(48, 48, 12))
        assert_close(sum(value.parts[name] for name in value.parts if name.endswith("_weighted")), value.loss)
        assert_close(value.parts["logits_weighted"], 7.0 * 4.0 * value.parts["logits_raw"])


def test_M08_the_temperature_multiplies_the_divergence_alone() -> None:
    student, teacher, labels = signals(20)
    plain, hot = (
        Objective(TaskTerm(), LogitTerm(temperature=temperature), FeatureTerm())(student, teacher, labels)
        for temperature in (1.0, 10.0)
    )
    assert student.logits is not None
    assert teacher.logits is not None
    for name in ("task_raw", "task_weighted", "features_raw", "features_weighted"):
        assert torch.equal(plain.parts[name], hot.parts[name])
    assert_close(hot.parts["logits_raw"], forward_kl(student.logits, teacher.logits, 10.0).mean())
    assert_close(hot.parts["logits_weighted"], 100 * hot.parts["logits_raw"])


@pytest.mark.parametrize("name", ["correlation", "cross_correlation", "cka", "functional_cka", "procrustes", "gram"])
def test_F02_too_few_positions_skip_a_statistic_and_count_it(name: str) -> None:
    for positions in (0, 1, 2, 7, 8):
        student, teacher, labels = signals(positions)
        value = Objective(TaskTerm(weight=1e-3), features=FeatureTerm(name))(student, teacher, labels)
        skipped = float(value.counts.get("skipped_feature_terms", 0))
        assert skipped == (positions < 8)
        assert (float(value.parts["features_raw"]) == 0) is (positions < 8)
        states = gradients(value.loss, student)[1]
        assert states.isfinite().all()
        assert bool((states == 0).all()) is (positions < 8)


def test_F01_the_mean_is_over_live_units_and_the_dead_ones_are_counted_apart() -> None:
    student, teacher, labels = signals(30, units=6)
    states = student.features[0].detach().clone()
    states[:, 1] = 2.0
    teacher.features[0][:, [1, 4]] = 3.0
    live = [0, 2, 3, 5]
    student = Signal(student.logits, (states.requires_grad_(),))
    value = Objective(features=FeatureTerm())(student, teacher, labels)
    ours, theirs = states.detach()[:, live], teacher.features[0][:, live]
    assert_close(value.loss, reference.correlation(ours, theirs).mean(), dtype=torch.float32)
    assert {name: float(count) for name, count in value.counts.items()} == {
        "dead_student_units": 1.0,
        "dead_teacher_units": 2.0,
    }
    gradient = gradients(value.loss, student)[1]
    assert_close(gradient[:, live], reference.correlation_gradient(ours, theirs), dtype=torch.float32)
    assert (gradient[:, [1, 4]] == 0).all()


@pytest.mark.parametrize("name", ["correlation", "cross_correlation"])
def test_F01_nothing_but_dead_units_is_a_connected_zero(name: str) -> None:
    student, teacher, labels = signals(30)
    teacher.features[0].fill_(3.0)
    value = Objective(features=FeatureTerm(name))(student, teacher, labels)
    assert value.loss == 0.0
    assert value.counts["dead_teacher_units"] == UNITS
    assert all((gradient == 0).all() for gradient in gradients(value.loss, student))


def test_M01_a_step_without_predictions_is_a_connected_zero() -> None:
    student, teacher, labels = signals(0)
    value = Objective(TaskTerm(), LogitTerm(), FeatureTerm())(student, teacher, labels, StepCounts(0, 0, 0))
    assert value.loss == 0.0
    assert [gradient.shape[0] for gradient in gradients(value.loss, student)] == [0, 0]
    student, teacher, labels = signals(9)
    value = Objective(TaskTerm())(student, None, torch.full_like(labels, -100))
    assert value.loss == 0.0
    assert all((gradient == 0).all() for gradient in gradients(value.loss, student))


def test_M01_a_row_without_labels_changes_nothing_beside_a_good_row() -> None:
    student, _, labels = signals(6)
    labels[3:] = -100
    mixed = Objective(TaskTerm())(student, None, labels, StepCounts(3, 0, 0))
    rows = slice(0, 3)
    assert_close(mixed.loss, Objective(TaskTerm())(part_of(student, rows), None, labels[rows]).loss)
    assert (gradients(mixed.loss, student)[0][3:] == 0).all()


def test_a_row_without_a_label_learns_from_the_teacher_alone() -> None:
    student, teacher, labels = signals(4)
    labels[2] = -100
    assert student.logits is not None
    assert teacher.logits is not None
    value = Objective(TaskTerm(), LogitTerm())(student, teacher, labels)
    expected = (student.logits.softmax(-1) - teacher.logits.softmax(-1))[2] / 4
    assert_close(gradients(value.loss, student)[0][2], expected)


def test_several_pairs_of_layers_weigh_the_same() -> None:
    student, teacher, labels = signals(20)
    wider, taught = normal(20, 7, seed=20).requires_grad_(), normal(20, 7, seed=21)
    both = Objective(features=FeatureTerm(layers=(LayerPair(), LayerPair(1, 2))))(
        Signal(student.logits, (*student.features, wider)), Signal(teacher.logits, (*teacher.features, taught)), labels
    )
    expected = (correlation(student.features[0], teacher.features[0]).mean() + correlation(wider, taught).mean()) / 2
    assert_close(both.loss, expected)


def test_feature_terms_of_one_value_are_that_value() -> None:
    student, teacher, labels = signals(20)
    value = Objective(features=FeatureTerm("cka", weight=2.0))(student, teacher, labels)
    assert_close(value.loss, 2 * cka(student.features[0], teacher.features[0])[0])
    assert value.counts == {}


def test_projectors_belong_to_the_objective() -> None:
    student, teacher, labels = signals(20)
    taught = Signal(teacher.logits, (normal(20, 9, seed=22),))
    projector = Projector(UNITS, 9)
    objective = Objective(features=FeatureTerm("projector", projectors=(projector,)))
    assert list(objective.parameters()) == list(projector.parameters())
    assert list(Objective(TaskTerm(), features=FeatureTerm()).parameters()) == []
    value = objective(student, taught, labels)
    assert_close(value.loss, F.mse_loss(projector(student.features[0]), taught.features[0]))
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(value.loss, objective.parameters()))


@pytest.mark.parametrize("term", [TaskTerm(weight=0.0), LogitTerm(weight=0.0), FeatureTerm(weight=0.0), None])
def test_L04_an_objective_in_which_nothing_counts_is_refused(term: TaskTerm | LogitTerm | FeatureTerm | None) -> None:
    name = {TaskTerm: "task", LogitTerm: "logits", FeatureTerm: "features"}.get(type(term))
    with pytest.raises(RecipeError, match=re.escape("objective: no term has a weight above 0")):
        Objective(**({} if name is None else {name: term}))


def test_L04_a_loss_that_does_not_fit_the_task_is_refused() -> None:
    for task, logits in (("cross_entropy", "mse"), ("binary_cross_entropy", "reverse_kl"), ("mse", "forward_kl")):
        with pytest.raises(RecipeError, match=re.escape(f"objective.logits.loss: unknown loss '{logits}'.")):
            Objective(TaskTerm(task), LogitTerm(logits))
    # The task names the kind of outputs even where it counts for nothing.
    assert Objective(TaskTerm("mse", weight=0.0), LogitTerm("mse")).task is None


def test_L04_the_effective_objective_is_said_in_one_line() -> None:
    objective = Objective(TaskTerm(weight=0.5), LogitTerm("skew_kl", 2.0, 3.0, alpha=0.2), FeatureTerm(weight=1.5))
    assert objective.formula() == (
        "loss = 0.5 * cross_entropy + 2 * 9 * skew_kl(temperature=3, alpha=0.2) "
        "+ 1.5 * correlation(all units of layer -1 -> -1, tokens)"
    )
    without = Objective(TaskTerm(), LogitTerm(weight=0.0), FeatureTerm(weight=0.0))
    assert without.formula() == "loss = 1 * cross_entropy"
    assert not without.needs_teacher


@pytest.mark.parametrize("name", ["logits", "features"])
def test_L04_another_teacher_means_another_gradient(name: str) -> None:
    student, teacher, labels = signals(20)
    objective = Objective(TaskTerm(), **{name: LogitTerm() if name == "logits" else FeatureTerm()})
    plain = gradients(objective(student, teacher, labels).loss, student)
    assert teacher.logits is not None
    other = Signal(teacher.logits + normal(20, 5, seed=30), (teacher.features[0] + normal(20, UNITS, seed=31),))
    moved = gradients(objective(student, other, labels).loss, student)
    changed = 0 if name == "logits" else 1
    assert (plain[changed] - moved[changed]).abs().max() > 1e-4
    assert torch.equal(plain[1 - changed], moved[1 - changed])


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    student, _, labels = signals(20)
    assert student.logits is not None
    teacher = Signal(student.logits.detach(), tuple(f.detach() for f in student.features))
    for name in LOGIT_LOSSES:
        value = Objective(logits=LogitTerm(name, temperature=2.0), features=FeatureTerm())(student, teacher, labels)
        assert abs(float(value.loss.detach())) < 1e-6
        assert all(gradient.abs().max() < 1e-6 for gradient in gradients(value.loss, student))


def test_Y04_signals_made_under_inference_mode_can_be_learnt_from() -> None:
    student, teacher, labels = signals(20)
    assert teacher.logits is not None
    with torch.inference_mode():
        made = Signal(teacher.logits.clone(), (teacher.features[0].clone(),))
    objective = Objective(TaskTerm(), LogitTerm(), FeatureTerm())
    expected = gradients(objective(student, teacher, labels).loss, student)
    for actual, wanted in zip(gradients(objective(student, made, labels).loss, student), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_M14_outputs_of_another_width_are_refused_and_never_padded_or_broadcast() -> None:
    student, teacher, labels = signals(20)
    assert student.logits is not None
    for width in (1, student.logits.shape[1] + 2):
        wider = Signal(normal(20, width, seed=40), teacher.features)
        with pytest.raises(ShapeError, match=re.escape("name the shared_outputs of both")):
            Objective(logits=LogitTerm())(student, wider, labels)


def test_the_formula_shows_label_smoothing() -> None:
    smoothed = Objective(TaskTerm(label_smoothing=0.1))
    assert smoothed.formula() == "loss = 1 * cross_entropy(label_smoothing=0.1)"


def test_an_objective_of_a_step_has_the_weight_of_this_step() -> None:
    """A line from 2 to 0 over 4 of 10 steps; where the number of steps is not known, the weight of the first one."""
    goal = Objective(TaskTerm(), features=FeatureTerm("cka", weight=2.0, fade=0.4))
    now = [goal.at(step, 10).features for step in range(11)]
    assert [None if term is None else term.weight for term in now] == [2.0, 1.5, 1.0, 0.5, *[None] * 7]
    assert goal.at(7, 0).formula() == "loss = 1 * cross_entropy + 2 * cka(all units of layer -1 -> -1, tokens)"
    assert "+ 2 (to 0 over 0.4 of the steps) * cka(" in goal.formula()
    assert goal.at(7, 10).needs_teacher is False


def test_a_fade_that_would_leave_no_term_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"fade: 0\.5 leaves no term for the steps after it"):
        Objective(TaskTerm(weight=0.0), features=FeatureTerm(fade=0.5))
