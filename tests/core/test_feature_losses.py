import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial import distance
from scipy.stats import pearsonr
from torch import Tensor

from flexkd import losses
from flexkd.core.losses.moments import paired_moments
from tests.closeness import assert_close
from tests.references import correlation as reference
from tests.references import distances
from tests.references.differences import numerical_gradient
from tests.references.draws import normal

NAN = float("nan")


def related(positions: int, units: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Student and teacher states whose units correlate from about -0.9 to 0.9, away from zero mean and unit scale."""
    teacher = normal(positions, units, seed=seed)
    share = torch.linspace(-0.9, 0.9, units)
    student = share * teacher + (1 - share.square()).sqrt() * normal(positions, units, seed=seed + 1)
    return 2.5 * student - 4.0, 0.3 * teacher + 1.0


def gradient_of(value: Tensor, states: Tensor) -> Tensor:
    return torch.autograd.grad(value, states)[0]


def test_correlation_is_the_slow_derivation_and_numpy_and_scipy() -> None:
    student, teacher = related(40, 5)
    value = losses.correlation(student, teacher)
    assert_close(value, reference.correlation(student, teacher))
    pairs = [(student[:, i].double().numpy(), teacher[:, i].double().numpy()) for i in range(5)]
    assert_close(value, [(1 - np.corrcoef(x, y)[0, 1]) ** 2 for x, y in pairs])
    assert_close(value, [(1 - pearsonr(x, y).statistic) ** 2 for x, y in pairs])


@pytest.mark.parametrize("positions", [3, 40])
def test_correlation_gradient_is_the_formula_of_the_method(positions: int) -> None:
    student, teacher = related(positions, 5)
    student.requires_grad_()
    gradient = gradient_of(losses.correlation(student, teacher).mean(), student)
    assert_close(gradient, reference.correlation_gradient(student.detach(), teacher))
    quotient = numerical_gradient(lambda x: reference.correlation(x, teacher).mean(), student.detach().double().numpy())
    assert_close(gradient, quotient, dtype=torch.float32)


def test_correlation_of_a_batch_counts_every_position_of_every_row() -> None:
    student, teacher = related(24, 3)
    batched = losses.correlation(student.view(2, 3, 4, 3), teacher.view(2, 3, 4, 3))
    assert_close(batched, losses.correlation(student, teacher))


def test_correlation_is_unchanged_by_positive_affine_maps_of_a_unit_and_mirrored_by_negative_ones() -> None:
    student, teacher = related(64, 4)
    plain = losses.correlation(student, teacher)
    scales, shifts = torch.tensor([0.01, 1.0, 7.0, 300.0]), torch.tensor([0.0, -5.0, 40.0, 1.0])
    assert_close(losses.correlation(scales * student + shifts, teacher), plain)
    assert_close(losses.correlation(student, scales * teacher + shifts), plain)
    mirrored = losses.correlation(-student, teacher)
    assert_close(1 - mirrored.sqrt(), plain.sqrt() - 1)


def test_correlation_ends_are_zero_one_and_four() -> None:
    states = normal(64, 3, seed=3)
    orthogonal = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat(8)[:, None], torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(8)
    assert_close(losses.correlation(states, states), [0.0] * 3)
    assert_close(losses.correlation(-states, states), [4.0] * 3)
    assert_close(losses.correlation(orthogonal[0], orthogonal[1][:, None]), [1.0])


def test_the_student_follows_the_correlation_gradient_to_zero() -> None:
    student, teacher = related(32, 4)
    start = losses.correlation(student, teacher)
    for _ in range(400):
        student.requires_grad_()
        student = (student - 20 * gradient_of(losses.correlation(student, teacher).mean(), student)).detach()
    assert start.max() > 1.0
    # C turns towards 1 ever more slowly, since its gradient vanishes there: 0.002 after 400 steps.
    assert losses.correlation(student, teacher).max() < 0.01


def test_cross_correlation_is_the_slow_derivation_in_value_and_gradient() -> None:
    student, teacher = related(12, 4)
    student.requires_grad_()
    for weight in (5e-3, 0.5):
        value = losses.cross_correlation(student, teacher, off_diagonal=weight)
        assert_close(value, reference.cross_correlation(student.detach(), teacher, weight))
        quotient = numerical_gradient(
            lambda x, weight=weight: reference.cross_correlation(x, teacher, weight).sum(),
            student.detach().double().numpy(),
        )
        assert_close(gradient_of(value.sum(), student), quotient, dtype=torch.float32)


def test_cross_correlation_matrix_is_numpys() -> None:
    student, teacher = related(50, 4)
    matrix = np.corrcoef(student.double().numpy().T, teacher.double().numpy().T)[:4, 4:]
    expected = (1 - np.diag(matrix)) ** 2 + 5e-3 * ((matrix**2).sum(1) - np.diag(matrix) ** 2)
    assert_close(losses.cross_correlation(student, teacher), expected)
    assert_close(losses.cross_correlation(student, teacher, off_diagonal=0.0), losses.correlation(student, teacher))


def test_cross_correlation_of_unrelated_states_has_the_noise_floor_that_its_docstring_names() -> None:
    student, teacher = normal(256, 64, seed=4), normal(256, 64, seed=5)
    floor = losses.cross_correlation(student, teacher, off_diagonal=1.0) - losses.correlation(student, teacher)
    assert floor.mean().item() == pytest.approx(63 / 256, rel=0.1)


def test_mse_is_a_mean_over_positions_of_every_unit() -> None:
    student, teacher = related(10, 3)
    student.requires_grad_()
    value = losses.mse(student, teacher)
    assert_close(value, distances.mse(student.detach(), teacher))
    assert_close(value.mean(), F.mse_loss(student, teacher))
    assert_close(gradient_of(value.sum(), student), 2 * (student.detach() - teacher) / 10)


def test_cosine_is_the_slow_derivation_and_scipy_in_value_and_gradient() -> None:
    student, teacher = related(10, 3)
    student.requires_grad_()
    value = losses.cosine(student, teacher)
    assert value.shape == (1,)
    assert_close(value, [distances.cosine(student.detach(), teacher)])
    pairs = zip(student.detach().double().numpy(), teacher.double().numpy(), strict=True)
    assert_close(value, [np.mean([distance.cosine(a, b) for a, b in pairs])])
    quotient = numerical_gradient(lambda x: distances.cosine(x, teacher), student.detach().double().numpy())
    assert_close(gradient_of(value.sum(), student), quotient, dtype=torch.float32)


def test_cosine_counts_a_state_of_zeros_as_zero_with_zero_gradient() -> None:
    student, teacher = related(10, 3)
    student[2], teacher[5] = 0.0, 0.0
    kept = [n for n in range(10) if n not in (2, 5)]
    student.requires_grad_()
    value = losses.cosine(student, teacher)
    assert_close(value, losses.cosine(student[kept], teacher[kept]) * 8 / 10)
    gradient = gradient_of(value.sum(), student)
    assert (gradient[[2, 5]] == 0).all()
    assert (gradient[kept].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dead", ["teacher", "student", "both"])
@pytest.mark.parametrize("loss", [losses.correlation, losses.cross_correlation])
def test_F01_a_constant_unit_costs_nothing_and_disturbs_no_other(
    loss: losses.correlation, dead: str, autocast: bool, dtype: torch.dtype
) -> None:
    student, teacher = (states.to(dtype) for states in related(64, 4))
    if dead in ("teacher", "both"):
        teacher[:, 1] = 3.0
    if dead in ("student", "both"):
        student[:, 1] = 2.0
    live = [0, 2, 3]
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss(student, teacher)
        alone = loss(student[:, live], teacher[:, live])
    assert value.dtype == torch.float32
    assert value[1] == 0.0
    assert_close(value[live], alone)
    gradient = gradient_of(value.sum(), student)
    assert (gradient[:, 1] == 0).all()
    assert_close(gradient[:, live], gradient_of(alone.sum(), student)[:, live])


@pytest.mark.parametrize("positions", [8, 64, 4097, 50_000])
@pytest.mark.parametrize("constant", [0.1, 3.0, 300.01, -7.7, 1e4 + 0.3, 1e-6, 0.0])
def test_F01_any_constant_over_any_number_of_positions_is_dead(constant: float, positions: int) -> None:
    moments = paired_moments(torch.full((positions, 3), constant), normal(positions, 3, seed=6))
    assert not moments.student_live.any()
    assert moments.teacher_live.all()
    assert (moments.student_std == 1).all()


@pytest.mark.parametrize(("factor", "live"), [(4.0, False), (16.0, True)])
@pytest.mark.parametrize("largest", [1e-3, 1.0, 1024.0])
def test_F01_the_limit_of_life_is_eight_roundings_of_the_largest_value(
    largest: float, factor: float, live: bool
) -> None:
    # Half of the positions lie one step below the largest value: the deviation is half a step.
    step = 2 * factor * torch.finfo(torch.float32).eps * largest
    unit = torch.tensor([largest, largest - step]).repeat(32)[:, None]
    assert bool(paired_moments(unit, normal(64, 1, seed=7)).student_live) is live


def test_F02_one_position_is_dead_and_two_say_nothing() -> None:
    student, teacher = related(2, 5)
    one = losses.correlation(student[:1].requires_grad_(), teacher[:1])
    assert one.tolist() == [0.0] * 5
    two = losses.correlation(student, teacher)
    assert {round(value, 3) for value in two.tolist()} <= {0.0, 4.0}
    assert losses.MINIMUM_POSITIONS == 8


def test_F03_a_large_mean_does_not_eat_the_digits_of_the_correlation() -> None:
    clean = 300 + normal(4096, 1, seed=8, scale=0.01, dtype=torch.float64)
    noisy = clean + normal(4096, 1, seed=9, scale=0.001, dtype=torch.float64)
    coefficient = 1 - losses.correlation(clean.float(), noisy.float()).sqrt().item()
    assert coefficient == pytest.approx(0.9954, abs=1e-3)
    assert coefficient == pytest.approx(np.corrcoef(clean[:, 0], noisy[:, 0])[0, 1], abs=1e-4)


def test_F03_half_precision_activations_do_not_overflow() -> None:
    student, teacher = related(4096, 3)
    half, expected = (200 * student).half(), losses.correlation((200 * student).half().float(), teacher)
    assert (half.float().square().sum(0) > torch.finfo(torch.float16).max).all()
    assert torch.equal(losses.correlation(half, teacher), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.correlation(half, teacher), expected)


def test_F03_a_copy_correlates_at_most_perfectly() -> None:
    for seed in range(20):
        states = normal(4096, 16, seed=seed, mean=3.0)
        value = losses.correlation(states, states)
        assert (value >= 0).all()
        assert value.max() < 1e-12


def test_F04_the_correlation_of_a_whole_is_not_the_mean_of_its_parts() -> None:
    x = normal(64, 1, seed=10, scale=0.3)
    y = x + normal(64, 1, seed=11, scale=0.3)
    x[32:] += 3.0
    y[32:] -= 3.0
    coefficients = {
        size: np.mean(
            [1 - losses.correlation(a, b).sqrt().item() for a, b in zip(x.split(size), y.split(size), strict=True)]
        )
        for size in (64, 32)
    }
    assert coefficients[64] < -0.5
    assert coefficients[32] > 0.5
    assert_close(coefficients[64], np.corrcoef(x[:, 0].double(), y[:, 0].double())[0, 1], dtype=torch.float32)


@pytest.mark.parametrize("pads", [(5.0, -7.0), (0.0, 0.0), (NAN, NAN), (float("inf"), NAN)])
def test_F05_pad_rows_are_selected_away(pads: tuple[float, float]) -> None:
    student, teacher = normal(100, 2, seed=12), normal(100, 2, seed=13)
    plain = losses.correlation(student, teacher)
    for count in (0, 5, 100):
        x = torch.cat([student, torch.full((count, 2), pads[0])]).requires_grad_()
        y = torch.cat([teacher, torch.full((count, 2), pads[1])])
        value = losses.correlation(x, y, torch.arange(100 + count) < 100)
        assert torch.equal(value, plain)
        gradient = gradient_of(value.sum(), x)
        assert gradient.isfinite().all()
        assert (gradient[100:] == 0).all()


def test_F19_a_spike_outside_of_the_mask_changes_nothing() -> None:
    student, teacher = normal(6, 10, 4, seed=14), normal(6, 10, 4, seed=15)
    supervised = torch.arange(10).expand(6, 10) >= 4
    plain = losses.correlation(student, teacher, supervised)
    student[:, 0, 3] += 1000
    teacher[:, 0, 3] += 1000
    assert torch.equal(losses.correlation(student, teacher, supervised), plain)
    assert losses.correlation(student, teacher)[3] < 1e-3
    assert plain[3] > 0.1


def test_units_permute_together() -> None:
    student, teacher = related(30, 5)
    for order in itertools.islice(itertools.permutations(range(5)), 7, 30, 11):
        permuted = losses.correlation(student[:, list(order)], teacher[:, list(order)])
        assert_close(permuted, losses.correlation(student, teacher)[list(order)])
