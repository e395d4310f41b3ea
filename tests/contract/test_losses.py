"""What every loss of the registries keeps; a new one joins by its row there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexkd.core.losses import BERNOULLI_LOSSES, FEATURE_LOSSES, LOGIT_LOSSES, REGRESSION_LOSSES
from tests.closeness import assert_close
from tests.references.draws import normal, permutation

Loss = Callable[..., Tensor]
NAN, INFINITY = float("nan"), float("inf")

LOGIT_ROWS = [
    pytest.param(loss, id=f"{kind}-{name}")
    for kind, registry in (("classes", LOGIT_LOSSES), ("labels", BERNOULLI_LOSSES), ("values", REGRESSION_LOSSES))
    for name, loss in registry.items()
]
FEATURE_ROWS = [pytest.param(loss, id=name) for name, loss in FEATURE_LOSSES.items()]
every_logit_loss = pytest.mark.parametrize("loss", LOGIT_ROWS)
every_feature_loss = pytest.mark.parametrize("loss", FEATURE_ROWS)
every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def gradient_of(loss: Loss, student: Tensor, teacher: Tensor, *arguments: Tensor) -> Tensor:
    student = student.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(student, teacher, *arguments).sum(), student)[0]


def uncorrelated(positions: int, units: int, seed: int) -> Tensor:
    """Centred units that do not correlate with each other: a copy of them costs nothing under any loss."""
    columns = torch.cat([torch.ones(positions, 1), normal(positions, units, seed=seed)], 1).double()
    return positions**0.5 * torch.linalg.qr(columns).Q[:, 1:].float()


@every_logit_loss
def test_a_copy_costs_nothing_and_has_nothing_to_learn(loss: Loss) -> None:
    for scale in (0.0, 1.0, 10.0):
        logits = normal(6, 5, seed=1, scale=scale)
        assert loss(logits, logits).abs().max() <= 1e-6
        assert gradient_of(loss, logits, logits).abs().max() <= 1e-6


@every_logit_loss
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (3, 2)])
def test_one_value_for_each_prediction(loss: Loss, shape: tuple[int, ...]) -> None:
    student, teacher = normal(*shape, seed=2), normal(*shape, seed=3)
    values = loss(student, teacher)
    assert values.shape == shape[:-1]
    assert values.dtype == torch.float32
    assert (values >= -1e-6).all()


@every_logit_loss
def test_M17_a_prediction_knows_nothing_of_the_others(loss: Loss) -> None:
    student, teacher = normal(6, 5, seed=4), normal(6, 5, seed=5)
    plain, gradient = loss(student, teacher), gradient_of(loss, student, teacher)
    mask = torch.tensor([True, False, True, True, False, True])
    assert torch.equal(loss(student[mask], teacher[mask]), plain[mask])
    assert torch.equal(gradient_of(loss, student[mask], teacher[mask]), gradient[mask])
    # Junk in a prediction that is not chosen stays there.
    student[1], teacher[4] = NAN, INFINITY
    leaf = student.clone().requires_grad_()
    values = loss(leaf, teacher)[mask]
    assert torch.equal(values, plain[mask])
    values.sum().backward()
    assert leaf.grad is not None
    assert_close(leaf.grad[mask], gradient[mask])


@every_logit_loss
def test_outputs_in_another_order_are_the_same_outputs(loss: Loss) -> None:
    student, teacher, order = normal(6, 5, seed=6), normal(6, 5, seed=7), permutation(5, seed=8)
    assert_close(loss(student[:, order], teacher[:, order]), loss(student, teacher))


@every_logit_loss
def test_the_temperature_comes_third_or_by_name(loss: Loss) -> None:
    student, teacher = normal(6, 5, seed=9), normal(6, 5, seed=10)
    temperature = 1.0 if loss in REGRESSION_LOSSES.values() else 2.0
    assert torch.equal(loss(student, teacher, temperature), loss(student, teacher, temperature=temperature))


@every_logit_loss
def test_M06_gradients_reach_the_student_alone(loss: Loss) -> None:
    student, teacher = normal(6, 5, seed=11).requires_grad_(), normal(6, 5, seed=12).requires_grad_()
    loss(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert (student.grad.abs().sum(-1) > 0).all()


@every_logit_loss
def test_L04_another_teacher_means_another_gradient(loss: Loss) -> None:
    student, teacher = normal(6, 5, seed=13), normal(6, 5, seed=14)
    moved = gradient_of(loss, student, teacher + normal(6, 5, seed=15))
    # Total variation looks at signs alone: some rows may stay as they were.
    assert ((moved - gradient_of(loss, student, teacher)).abs().sum(-1) > 1e-4).any()


@every_logit_loss
def test_a_small_step_against_the_gradient_lowers_the_loss(loss: Loss) -> None:
    student, teacher = normal(6, 5, seed=16), normal(6, 5, seed=17)
    assert (loss(student - 0.05 * gradient_of(loss, student, teacher), teacher) < loss(student, teacher)).all()


@every_half
@every_logit_loss
def test_M13_half_logits_are_computed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = normal(6, 50, seed=18, dtype=dtype), normal(6, 50, seed=19, dtype=dtype)
    plain = loss(student.float(), teacher.float())
    assert torch.equal(loss(student, teacher), plain)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(loss(student, teacher), plain)
    gradient = gradient_of(loss, student, teacher)
    assert torch.equal(gradient, gradient_of(loss, student.float(), teacher.float()).to(dtype))


@every_logit_loss
def test_M12_peaked_logits_have_finite_losses_and_gradients(loss: Loss) -> None:
    peaked = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]])
    for student in peaked:
        for teacher in peaked:
            assert loss(student, teacher).isfinite()
            assert gradient_of(loss, student, teacher).isfinite().all()


@every_logit_loss
def test_Y04_a_teacher_made_under_inference_mode(loss: Loss) -> None:
    student = normal(6, 5, seed=20)
    with torch.inference_mode():
        teacher = normal(6, 5, seed=21)
    assert torch.equal(gradient_of(loss, student, teacher), gradient_of(loss, student, normal(6, 5, seed=21)))


@every_feature_loss
def test_a_copied_state_costs_nothing_and_has_nothing_to_learn(loss: Loss) -> None:
    states = uncorrelated(40, 6, seed=1)
    assert loss(states, states).abs().max() <= 1e-6
    assert gradient_of(loss, states, states).abs().max() <= 1e-6


@every_feature_loss
def test_one_value_for_each_unit_or_one_for_all(loss: Loss) -> None:
    student, teacher = normal(2, 20, 6, seed=2), normal(2, 20, 6, seed=3)
    values = loss(student, teacher)
    assert values.shape in {(6,), (1,)}
    assert values.dtype == torch.float32
    assert (values > 0).all()
    assert_close(loss(student.flatten(0, 1), teacher.flatten(0, 1)), values)


@every_feature_loss
@pytest.mark.parametrize("junk", [NAN, INFINITY, 1000.0])
def test_F05_a_mask_is_a_selection(loss: Loss, junk: float) -> None:
    student, teacher = normal(3, 20, 6, seed=4), normal(3, 20, 6, seed=5)
    mask = normal(3, 20, seed=6) > -0.3
    plain, gradient = loss(student[mask], teacher[mask]), gradient_of(loss, student[mask], teacher[mask])
    student[~mask], teacher[~mask] = junk, -junk
    assert torch.equal(loss(student, teacher, mask), plain)
    spread = gradient_of(loss, student, teacher, mask)
    assert torch.equal(spread[mask], gradient)
    assert (spread[~mask] == 0).all()


@every_feature_loss
def test_M17_padding_of_any_length_on_either_side_changes_nothing(loss: Loss) -> None:
    student, teacher = normal(4, 4, 6, seed=7), normal(4, 4, 6, seed=8)
    plain, gradient = loss(student, teacher), gradient_of(loss, student, teacher)
    for length in (4, 16, 64):
        for start in (0, length - 4):
            places = slice(start, start + 4)
            padded, mask = normal(2, 4, length, 6, seed=9, mean=5.0), torch.zeros(4, length, dtype=torch.bool)
            padded[0, :, places], padded[1, :, places], mask[:, places] = student, teacher, True
            assert torch.equal(loss(padded[0], padded[1], mask), plain)
            assert torch.equal(gradient_of(loss, padded[0], padded[1], mask)[:, places], gradient)


@every_feature_loss
def test_M01_no_positions_are_a_connected_zero(loss: Loss) -> None:
    student, teacher = normal(3, 4, 6, seed=10), normal(3, 4, 6, seed=11)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert (loss(student, teacher, nothing) == 0).all()
    assert (gradient_of(loss, student, teacher, nothing) == 0).all()


@every_feature_loss
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("junk", [NAN, INFINITY])
def test_M02_a_state_that_is_not_finite_is_not_taken_for_a_dead_one(loss: Loss, side: str, junk: float) -> None:
    student, teacher = normal(40, 6, seed=12), normal(40, 6, seed=13)
    (student if side == "student" else teacher)[5, 2] = junk
    assert not loss(student, teacher).isfinite().all()


@every_feature_loss
def test_F01_units_that_never_vary_have_finite_losses_and_gradients(loss: Loss) -> None:
    for student_value, teacher_value in ((2.0, None), (None, 3.0), (2.0, 3.0), (0.0, 0.0)):
        student, teacher = normal(40, 6, seed=14), normal(40, 6, seed=15)
        for states, value in ((student, student_value), (teacher, teacher_value)):
            if value is not None:
                states.fill_(value)
        assert loss(student, teacher).isfinite().all()
        assert gradient_of(loss, student, teacher).isfinite().all()


@every_feature_loss
def test_F05_positions_in_another_order_are_the_same_positions(loss: Loss) -> None:
    student, teacher, order = normal(40, 6, seed=16), normal(40, 6, seed=17), permutation(40, seed=18)
    assert_close(loss(student[order], teacher[order]), loss(student, teacher))


@every_feature_loss
def test_units_in_another_order_are_the_same_units(loss: Loss) -> None:
    student, teacher, order = normal(40, 6, seed=19), normal(40, 6, seed=20), permutation(6, seed=21)
    values = loss(student, teacher)
    assert_close(loss(student[:, order], teacher[:, order]), values[order] if len(values) == 6 else values)


@every_feature_loss
def test_M06_gradients_reach_the_states_of_the_student_alone(loss: Loss) -> None:
    student, teacher = normal(40, 6, seed=22).requires_grad_(), normal(40, 6, seed=23).requires_grad_()
    loss(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert (student.grad.abs().sum(0) > 0).all()


@every_feature_loss
def test_L04_another_teaching_state_means_another_gradient(loss: Loss) -> None:
    student, teacher = normal(40, 6, seed=24), normal(40, 6, seed=25)
    moved = gradient_of(loss, student, normal(40, 6, seed=26))
    assert (moved - gradient_of(loss, student, teacher)).abs().max() > 1e-4


@every_feature_loss
def test_a_small_step_of_the_states_against_the_gradient_lowers_the_loss(loss: Loss) -> None:
    student, teacher = normal(40, 6, seed=27), normal(40, 6, seed=28)
    stepped = student - 0.05 * gradient_of(loss, student, teacher)
    assert loss(stepped, teacher).sum() < loss(student, teacher).sum()


@every_half
@every_feature_loss
def test_F03_half_states_are_computed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    student = normal(40, 6, seed=29, scale=200.0, dtype=dtype)
    teacher = normal(40, 6, seed=30, scale=200.0, dtype=dtype)
    plain = loss(student.float(), teacher.float())
    assert torch.equal(loss(student, teacher), plain)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(loss(student, teacher), plain)
    gradient = gradient_of(loss, student, teacher)
    assert torch.equal(gradient, gradient_of(loss, student.float(), teacher.float()).to(dtype))


@every_feature_loss
def test_Y04_a_teaching_state_made_under_inference_mode(loss: Loss) -> None:
    student = normal(40, 6, seed=31)
    with torch.inference_mode():
        teacher = normal(40, 6, seed=32)
    mask = torch.arange(40) > 3
    for arguments in ((), (mask,)):
        expected = gradient_of(loss, student, normal(40, 6, seed=32), *arguments)
        assert torch.equal(gradient_of(loss, student, teacher, *arguments), expected)


@every_feature_loss
def test_without_other_processes_there_is_nothing_to_join(loss: Loss) -> None:
    student, teacher = normal(40, 6, seed=33), normal(40, 6, seed=34)
    assert torch.equal(loss(student, teacher, across_processes=True), loss(student, teacher))
