import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cityblock, jensenshannon
from scipy.special import rel_entr, softmax
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from flexkd import losses
from flexkd.errors import RecipeError
from tests.closeness import assert_close
from tests.references import divergences
from tests.references.differences import numerical_gradient
from tests.references.draws import normal

INFINITY = float("inf")
# Name of the reference, and options that name a mixture; the second number is what the reference calls `share`.
VARIANTS = [
    ("forward_kl", {}, 0.0),
    ("reverse_kl", {}, 0.0),
    ("jensen_shannon", {}, 0.5),
    ("jensen_shannon", {"beta": 0.1}, 0.1),
    ("jensen_shannon", {"beta": 0.9}, 0.9),
    ("skew_kl", {}, 0.1),
    ("skew_kl", {"alpha": 0.7}, 0.7),
    ("skew_reverse_kl", {}, 0.1),
    ("skew_reverse_kl", {"alpha": 0.7}, 0.7),
    ("total_variation", {}, 0.0),
]
every_variant = pytest.mark.parametrize(("name", "options", "share"), VARIANTS)
every_loss = pytest.mark.parametrize("name", sorted(losses.LOGIT_LOSSES))


def student_gradient(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, **options: float) -> Tensor:
    student = student.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(student, teacher, **options).sum(), student)[0]


def hard_rows() -> tuple[Tensor, Tensor]:
    """Ordinary, flat, peaked and far-off rows, with a class that neither side can say."""
    teacher, student = normal(5, 6, seed=1, scale=2.0), normal(5, 6, seed=2, scale=2.0)
    teacher[1], student[2] = 0.25, -3.0
    teacher[3] = torch.tensor([12.0, 0.0, 0.0, -3.0, 0.0, 0.0])
    teacher[4], student[4] = teacher[4] + 500, student[4] - 500
    teacher[:, 5] = student[:, 5] = -INFINITY
    return student, teacher


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 100.0])
@every_variant
def test_value_is_the_slow_derivation(name: str, options: dict[str, float], share: float, temperature: float) -> None:
    student, teacher = hard_rows()
    value = losses.LOGIT_LOSSES[name](student, teacher, temperature=temperature, **options)
    assert_close(value, divergences.rows(name, student, teacher, temperature, share))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@every_variant
def test_gradient_is_the_difference_quotient_of_the_slow_derivation(
    name: str, options: dict[str, float], share: float, temperature: float
) -> None:
    student, teacher = (logits[:, :5] for logits in hard_rows())
    gradient = student_gradient(losses.LOGIT_LOSSES[name], student, teacher, temperature=temperature, **options)
    for row in range(len(student)):
        expected = numerical_gradient(
            lambda logits, row=row: divergences.divergence(name, logits, teacher[row].numpy(), temperature, share),
            student[row].double().numpy(),
        )
        assert_close(gradient[row], expected, dtype=torch.float32)


def test_forward_kl_gradient_is_student_minus_teacher_over_temperature() -> None:
    student, teacher = normal(4, 9, seed=3), normal(4, 9, seed=4)
    gradient = student_gradient(losses.forward_kl, student, teacher, temperature=2.5)
    assert_close(gradient, ((student / 2.5).softmax(-1) - (teacher / 2.5).softmax(-1)) / 2.5)


def test_values_agree_with_torch_and_scipy() -> None:
    student, teacher = normal(4, 9, seed=3, scale=2.0), normal(4, 9, seed=4, scale=2.0)
    p, q = softmax(teacher.double().numpy() / 2, -1), softmax(student.double().numpy() / 2, -1)
    log_p, log_q = (teacher / 2).log_softmax(-1), (student / 2).log_softmax(-1)
    outside = {
        "forward_kl": F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1),
        "reverse_kl": F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1),
        "jensen_shannon": torch.tensor(jensenshannon(p, q, axis=-1) ** 2),
        "skew_kl": torch.tensor(rel_entr(p, 0.1 * p + 0.9 * q).sum(-1)),
        "skew_reverse_kl": torch.tensor(rel_entr(q, 0.1 * q + 0.9 * p).sum(-1)),
        "total_variation": torch.tensor([cityblock(a, b) / 2 for a, b in zip(p, q, strict=True)]),
    }
    for name, expected in outside.items():
        assert_close(losses.LOGIT_LOSSES[name](student, teacher, temperature=2.0), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_bernoulli_kl_is_the_slow_derivation_and_torch_distributions(temperature: float) -> None:
    student, teacher = normal(5, 3, seed=5, scale=3.0), normal(5, 3, seed=6, scale=3.0)
    value = losses.bernoulli_kl(student, teacher, temperature)
    pairs = list(zip(student.numpy(), teacher.numpy(), strict=True))
    assert_close(value, [divergences.bernoulli_kl(s, t, temperature) for s, t in pairs])
    outside = kl_divergence(
        Bernoulli(logits=(teacher / temperature).double()), Bernoulli(logits=(student / temperature).double())
    )
    assert_close(value, outside.sum(-1))
    gradient = student_gradient(losses.bernoulli_kl, student, teacher, temperature=temperature)
    assert_close(gradient, ((student / temperature).sigmoid() - (teacher / temperature).sigmoid()) / temperature)


def test_mean_squared_error_is_a_mean_over_outputs() -> None:
    student, teacher = normal(5, 2, seed=7), normal(5, 2, seed=8)
    value = losses.mean_squared_error(student, teacher)
    assert_close(value, F.mse_loss(student, teacher, reduction="none").mean(-1))
    assert_close(student_gradient(losses.mean_squared_error, student, teacher), student - teacher)


def test_jensen_shannon_ends_are_the_two_kl_exactly() -> None:
    student, teacher = hard_rows()
    assert torch.equal(losses.jensen_shannon(student, teacher, beta=0.0), losses.forward_kl(student, teacher))
    assert torch.equal(losses.jensen_shannon(student, teacher, beta=1.0), losses.reverse_kl(student, teacher))


@pytest.mark.parametrize(("beta", "end"), [(1e-3, "forward_kl"), (1 - 1e-3, "reverse_kl")])
def test_jensen_shannon_near_its_ends_tends_to_them_after_division(beta: float, end: str) -> None:
    student, teacher = normal(6, 5, seed=9), normal(6, 5, seed=10)
    near = losses.jensen_shannon(student, teacher, beta=beta) / min(beta, 1 - beta)
    # The limit is approached linearly: at 1e-3 the gap measures 0.3 % of the value.
    torch.testing.assert_close(near, losses.LOGIT_LOSSES[end](student, teacher), rtol=1e-2, atol=1e-3)


def test_jensen_shannon_is_symmetric_at_one_half_and_at_most_log_two() -> None:
    student, teacher = hard_rows()
    assert_close(losses.jensen_shannon(student, teacher), losses.jensen_shannon(teacher, student))
    apart = losses.jensen_shannon(torch.tensor([[90.0, 0.0]]), torch.tensor([[0.0, 90.0]]))
    assert_close(apart, [math.log(2)])


def test_skewed_ends_are_the_plain_kl_and_zero() -> None:
    student, teacher = hard_rows()
    assert torch.equal(losses.skew_kl(student, teacher, alpha=0.0), losses.forward_kl(student, teacher))
    assert torch.equal(losses.skew_reverse_kl(student, teacher, alpha=0.0), losses.reverse_kl(student, teacher))
    for skewed in (losses.skew_kl, losses.skew_reverse_kl):
        assert skewed(student, teacher, alpha=1.0).tolist() == [0.0] * 5
        assert student_gradient(skewed, student[:, :5], teacher[:, :5], alpha=1.0).abs().max() < 1e-6


def test_total_variation_stays_below_one_and_below_pinskers_bound() -> None:
    student, teacher = normal(50, 4, seed=11, scale=3.0), normal(50, 4, seed=12, scale=3.0)
    distance = losses.total_variation(student, teacher)
    assert (distance <= 1).all()
    assert (distance <= (losses.forward_kl(student, teacher) / 2).sqrt() + 1e-6).all()
    assert_close(losses.total_variation(torch.tensor([[90.0, 0.0]]), torch.tensor([[0.0, 90.0]])), [1.0])


def test_M04_distillation_is_the_sum_over_classes_and_nothing_else() -> None:
    student, teacher = normal(2, 3, 5, seed=13), normal(2, 3, 5, seed=14)
    p, q = softmax(teacher.double().numpy(), -1), softmax(student.double().numpy(), -1)
    by_hand = (p * np.log(p / q)).sum(-1).mean()
    assert_close(losses.forward_kl(student, teacher).mean(), float(by_hand))
    batchmean = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    assert_close(losses.forward_kl(student, teacher).mean() * 3, batchmean)


@every_loss
def test_M04_columns_of_minus_infinity_and_a_repeated_batch_change_nothing(name: str) -> None:
    loss = losses.LOGIT_LOSSES[name]
    student, teacher = normal(2, 3, 5, seed=13), normal(2, 3, 5, seed=14)
    plain = loss(student, teacher)
    nothing = torch.full((2, 3, 4), -INFINITY)
    padded = loss(torch.cat([student, nothing], -1), torch.cat([teacher, nothing], -1))
    assert_close(padded, plain)
    gradient = student_gradient(loss, torch.cat([student, nothing], -1), torch.cat([teacher, nothing], -1))
    assert_close(gradient[..., :5], student_gradient(loss, student, teacher))
    assert (gradient[..., 5:] == 0).all()
    assert_close(loss(student.repeat(2, 1, 1), teacher.repeat(2, 1, 1)).mean(), plain.mean())


@every_loss
def test_M06_divergences_are_never_negative_and_only_the_student_learns(name: str) -> None:
    loss = losses.LOGIT_LOSSES[name]
    student, teacher = normal(200, 7, seed=15, scale=4.0), normal(200, 7, seed=16, scale=4.0)
    student[100:] = teacher[100:] + normal(100, 7, seed=17, scale=1e-3)
    student.requires_grad_()
    teacher.requires_grad_()
    value = loss(student, teacher)
    assert value.min() >= -1e-6
    value.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert (student.grad[:100].abs().sum(-1) > 0).all()


def test_M06_forward_and_reverse_differ_on_the_pair_of_the_case() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    expected = 0.5 * math.log(2.5) + 0.2 * math.log(0.4)
    assert_close(losses.forward_kl(q, p), [expected])
    p = torch.tensor([[0.6, 0.3, 0.1]]).log()
    forward, reverse = losses.forward_kl(q, p), losses.reverse_kl(q, p)
    assert_close(forward, [0.6 * math.log(3.0) + 0.1 * math.log(0.2)])
    assert_close(reverse, [0.2 * math.log(1 / 3) + 0.5 * math.log(5.0)])
    assert abs(float(forward - reverse)) > 0.05


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("name", [*sorted(losses.LOGIT_LOSSES), "bernoulli_kl"])
def test_M08_a_temperature_that_is_not_above_zero_is_refused(name: str, temperature: float) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"temperature: must be above 0, was {temperature}.")):
        getattr(losses, name)(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


def test_regression_refuses_a_temperature() -> None:
    with pytest.raises(RecipeError, match=re.escape("temperature: has no meaning for regression, was 2.0.")):
        losses.mean_squared_error(torch.zeros(1, 1), torch.zeros(1, 1), 2.0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_of_zero_to_one_is_refused(share: float) -> None:
    zeros = torch.zeros(1, 2)
    with pytest.raises(RecipeError, match=re.escape(f"beta: must be between 0 and 1 (inclusive), was {share}.")):
        losses.jensen_shannon(zeros, zeros, beta=share)
    for skewed in (losses.skew_kl, losses.skew_reverse_kl):
        with pytest.raises(RecipeError, match=re.escape(f"alpha: must be between 0 and 1 (inclusive), was {share}.")):
            skewed(zeros, zeros, alpha=share)
