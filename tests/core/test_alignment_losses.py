import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch import Tensor

from flexkd import losses
from flexkd.core.geometry import matrix_square_root
from tests.closeness import assert_close
from tests.references import alignment
from tests.references.differences import numerical_gradient
from tests.references.draws import normal, rotation


def related(positions: int, student_units: int, teacher_units: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """States that share some directions, away from zero mean."""
    student = normal(positions, student_units, seed=seed, mean=0.5)
    mixing = normal(student_units, teacher_units, seed=seed + 1)
    return student, student @ mixing + normal(positions, teacher_units, seed=seed + 2, scale=2.0, mean=-1.0)


def gradient_of(value: Tensor, states: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), states)[0]


def test_the_two_slow_derivations_of_the_unbiased_hsic_agree() -> None:
    student, teacher = related(7, 3, 4)
    first, second = alignment.gram(student), alignment.gram(teacher)
    for left, right in ((first, second), (first, first), (second, second)):
        assert_close(alignment.unbiased_hsic(left, right), alignment.quadruple_hsic(left, right))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("positions", [4, 9, 64])
def test_cka_in_feature_form_is_cka_of_gram_matrices(positions: int, unbiased: bool) -> None:
    student, teacher = related(positions, 5, 3)
    value = losses.cka(student, teacher, unbiased=unbiased)
    assert value.shape == (1,)
    # Four positions leave one degree of freedom: the estimate is a small difference of sums 100 times its size.
    tolerance = 1e-3 if positions == 4 else 2e-5
    expected = torch.tensor([alignment.cka(student, teacher, unbiased=unbiased)])
    torch.testing.assert_close(value, expected.float(), rtol=tolerance, atol=tolerance)


def test_unbiased_cka_is_the_sum_over_quadruples() -> None:
    student, teacher = related(8, 3, 4)
    first, second = alignment.gram(student), alignment.gram(teacher)
    own = alignment.quadruple_hsic(first, first) * alignment.quadruple_hsic(second, second)
    assert_close(losses.cka(student, teacher), [1 - alignment.quadruple_hsic(first, second) / own**0.5])


@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_gradient_is_the_difference_quotient_of_the_slow_derivation(unbiased: bool) -> None:
    student, teacher = related(12, 4, 3)
    student.requires_grad_()
    gradient = gradient_of(losses.cka(student, teacher, unbiased=unbiased), student)
    quotient = numerical_gradient(
        lambda x: alignment.cka(x, teacher, unbiased=unbiased), student.detach().double().numpy()
    )
    assert_close(gradient, quotient, dtype=torch.float32)


def test_cka_is_unchanged_by_rotations_scales_and_shifts() -> None:
    student, teacher = related(64, 6, 4)
    plain = losses.cka(student, teacher)
    turned = (student.double() @ rotation(6, seed=9)).float()
    assert_close(losses.cka(turned, teacher), plain)
    assert_close(losses.cka(3 * student + normal(6, seed=10), 0.5 * teacher - 2), plain)
    assert_close(losses.cka(student, student), [0.0])


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e2, 1e5])
def test_F03_cka_does_not_depend_on_the_size_of_the_states(scale: float, unbiased: bool) -> None:
    student, teacher = related(64, 6, 4)
    plain = losses.cka(student, teacher, unbiased=unbiased)
    assert_close(losses.cka(scale * student, scale * teacher, unbiased=unbiased), plain)
    small = (scale * student).requires_grad_()
    gradient = gradient_of(losses.cka(small, scale * teacher, unbiased=unbiased), small)
    unit = student.requires_grad_()
    assert_close(gradient * scale, gradient_of(losses.cka(unit, teacher, unbiased=unbiased), unit))


def test_unbiased_cka_of_independent_states_is_near_one_where_the_biased_one_is_far_off() -> None:
    apart = [(normal(64, 256, seed=seed), normal(64, 256, seed=seed + 50)) for seed in range(8)]
    unbiased = torch.stack([losses.cka(x, y) for x, y in apart])
    biased = torch.stack([losses.cka(x, y, unbiased=False) for x, y in apart])
    # Its spread over draws measures 0.02.
    assert abs(float(unbiased.mean()) - 1) < 0.02
    assert 1 - float(biased.mean()) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_F02_cka_of_too_few_positions_is_a_connected_zero(count: int) -> None:
    student, teacher = related(9, 5, 3)
    student.requires_grad_()
    value = losses.cka(student, teacher, torch.arange(9) < count)
    assert value.tolist() == [0.0]
    assert gradient_of(value, student).abs().max() == 0


@pytest.mark.parametrize("constant", [0.0, 2.0, 300.01])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_F01_cka_of_states_that_never_vary_is_a_connected_zero(side: str, constant: float) -> None:
    student, teacher = related(64, 5, 5)
    (student if side == "student" else teacher).fill_(constant)
    student.requires_grad_()
    value = losses.cka(student, teacher)
    assert value.tolist() == [0.0]
    assert gradient_of(value, student).abs().max() == 0


def test_F01_a_constant_unit_does_not_disturb_cka() -> None:
    student, teacher = related(64, 5, 4)
    plain = losses.cka(student, teacher)
    assert_close(losses.cka(torch.cat([student, torch.full((64, 1), 3.0)], 1), teacher), plain)


every_distance = pytest.mark.parametrize("name", ["procrustes", "gram"])


@every_distance
@pytest.mark.parametrize(("positions", "widths"), [(30, (6, 4)), (30, (4, 6)), (30, (5, 5)), (3, (6, 4))])
def test_distances_of_whole_states_are_their_second_derivations(
    name: str, positions: int, widths: tuple[int, int]
) -> None:
    """Fewer positions than units too, where singular values are 0 and the distance has no derivative everywhere."""
    student, teacher = related(positions, *widths)
    student.requires_grad_()
    value = losses.FEATURE_LOSSES[name](student, teacher)
    assert_close(value, [alignment.REFERENCES[name](student.detach(), teacher)])
    gradient = gradient_of(value, student)
    assert gradient.isfinite().all()
    if positions > widths[0]:
        states = student.detach().double().numpy()
        quotient = numerical_gradient(lambda x: alignment.REFERENCES[name](x, teacher), states)
        torch.testing.assert_close(gradient, torch.as_tensor(quotient).float(), rtol=1e-4, atol=1e-6)


@every_distance
def test_distances_of_whole_states_change_with_more_than_a_rotation_a_factor_and_a_shift(name: str) -> None:
    loss = losses.FEATURE_LOSSES[name]
    student, teacher = related(64, 6, 4)
    plain = loss(student, teacher)
    turned = (student.double() @ rotation(6, seed=9)).float()
    for same in (turned, 1e-4 * student, 3e4 * student + normal(6, seed=10)):
        torch.testing.assert_close(loss(same, 0.5 * teacher - 2), plain, rtol=1e-4, atol=1e-4)
    assert_close(loss(torch.cat([turned, torch.zeros(64, 2)], 1), student), [0.0])
    # Where CKA is blind: one direction more stretched than another.
    stretched = student * torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert loss(stretched, student) > 0.01


@every_distance
def test_repeated_singular_values_have_a_finite_gradient(name: str) -> None:
    """A copy whose directions are all of one length, and a student that differs from it by rounding alone."""
    teacher = rotation(12, seed=11)[:, :4].float()
    for student in (teacher.clone(), teacher + 1e-7 * normal(12, 4, seed=12)):
        student.requires_grad_()
        assert gradient_of(losses.FEATURE_LOSSES[name](student, teacher), student).abs().max() < 1e-3


@every_distance
@pytest.mark.parametrize("constant", [0.0, 300.01])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_F01_distances_of_states_that_never_vary_are_a_connected_zero(name: str, side: str, constant: float) -> None:
    student, teacher = related(64, 5, 5)
    (student if side == "student" else teacher).fill_(constant)
    student.requires_grad_()
    value = losses.FEATURE_LOSSES[name](student, teacher)
    assert value.tolist() == [0.0]
    assert gradient_of(value, student).abs().max() == 0


def test_functional_cka_weighs_directions_by_the_geometry() -> None:
    student, teacher = related(20, 3, 5)
    half = normal(5, 2, seed=11, dtype=torch.float64)
    geometry = half @ half.T
    root = matrix_square_root(geometry)
    assert_close(root, sqrtm(geometry.numpy() + 1e-18).real, dtype=torch.float32)
    value = losses.functional_cka(student, teacher @ root)
    states = teacher.double().numpy()
    expected = alignment.cka_of_grams(alignment.gram(student), states @ geometry.numpy() @ states.T)
    assert_close(value, [expected])
    # What the output cannot see is not compared: the null directions of G may hold anything.
    hidden = torch.linalg.qr(torch.cat([half, normal(5, 3, seed=12, dtype=torch.float64)], 1)).Q[:, 2:]
    disturbed = teacher + (normal(20, 3, seed=13, dtype=torch.float64) @ hidden.T).float()
    assert_close(losses.functional_cka(student, disturbed @ root), value)


def test_projector_learns_any_linear_teacher_to_zero() -> None:
    student = normal(50, 3, seed=14)
    weight, bias = normal(5, 3, seed=15), normal(5, seed=16)
    projector = losses.Projector(3, 5)
    solution = torch.linalg.lstsq(torch.cat([student, torch.ones(50, 1)], 1), student @ weight.T + bias).solution
    with torch.no_grad():
        projector.map.weight.copy_(solution[:3].T)
        projector.map.bias.copy_(solution[3])
    value = losses.FEATURE_LOSSES["projector"](projector(student), student @ weight.T + bias)
    assert_close(value, torch.zeros(5))


def test_projector_gradients_are_those_of_a_plain_linear_map() -> None:
    student, teacher = normal(20, 3, seed=17).requires_grad_(), normal(20, 5, seed=18)
    projector = losses.Projector(3, 5)
    ours = torch.autograd.grad(
        losses.FEATURE_LOSSES["projector"](projector(student), teacher).mean(), [student, *projector.parameters()]
    )
    plain = F.mse_loss(F.linear(student, projector.map.weight, projector.map.bias), teacher)
    for actual, expected in zip(ours, torch.autograd.grad(plain, [student, *projector.parameters()]), strict=True):
        assert_close(actual, expected)


def test_projector_computes_in_float32_under_autocast() -> None:
    projector, student = losses.Projector(3, 5), normal(20, 3, seed=17, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = projector(student)
    assert projected.dtype == torch.float32
    assert torch.equal(projected, projector(student.float()))
