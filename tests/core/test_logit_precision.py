import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from flexkd import losses
from tests.closeness import assert_close
from tests.references.draws import normal

INFINITY = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_loss = pytest.mark.parametrize("name", sorted(losses.LOGIT_LOSSES))
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def float64_value(name: str, student: torch.Tensor, teacher: torch.Tensor) -> float:
    """The divergence of one row with all sums in float64, from log-probabilities that scipy takes."""
    log_p, log_q = (log_softmax(logits.double().numpy(), -1) for logits in (teacher, student))

    def kl(first: np.ndarray, second: np.ndarray) -> float:
        return float((np.exp(first) * (first - second)).sum())

    def mixed(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
        return np.logaddexp(first + math.log(share), second + math.log1p(-share))

    middle = mixed(log_p, log_q, 0.5)
    return {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "jensen_shannon": lambda: (kl(log_p, middle) + kl(log_q, middle)) / 2,
        "skew_kl": lambda: kl(log_p, mixed(log_p, log_q, 0.1)),
        "skew_reverse_kl": lambda: kl(log_q, mixed(log_q, log_p, 0.1)),
        "total_variation": lambda: float(np.abs(np.exp(log_p) - np.exp(log_q)).sum()) / 2,
    }[name]()


@every_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.05])
@every_loss
def test_M12_a_peaked_student_has_a_finite_loss_and_gradient(name: str, temperature: float, dtype: torch.dtype) -> None:
    student = torch.tensor([[1.0, 2.0, 3.0, 1e4]], dtype=dtype, requires_grad=True)
    value = losses.LOGIT_LOSSES[name](student, torch.zeros(1, 4, dtype=dtype), temperature)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every_dtype
def test_M12_peaked_labels_of_a_multi_label_task_have_a_finite_loss_and_gradient(dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 3.0, -INFINITY]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, -1e4, 0.0, -INFINITY]], dtype=dtype)
    value = losses.bernoulli_kl(student, teacher, 0.05)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


# With these draws the rounding of the two log-normalisers alone moves sum p (log p - log q) by 1.0 to 1.5 %.
@pytest.mark.parametrize("seed", [1, 7])
@every_dtype
@every_loss
def test_M13_a_small_divergence_over_a_large_vocabulary_keeps_its_digits(
    name: str, dtype: torch.dtype, seed: int
) -> None:
    teacher = normal(1, 151_936, seed=seed, scale=4.0)
    student = (teacher + normal(1, 151_936, seed=seed + 100, scale=0.01)).to(dtype)
    value = float(losses.LOGIT_LOSSES[name](student, teacher.to(dtype)))
    assert abs(value / float64_value(name, student, teacher.to(dtype)) - 1) < 0.01
    assert value >= -1e-6


@every_loss
def test_M13_equal_inputs_over_a_large_vocabulary_are_no_distance_apart(name: str) -> None:
    logits = normal(1, 151_936, seed=1, scale=4.0)
    assert abs(float(losses.LOGIT_LOSSES[name](logits, logits))) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@every_loss
def test_half_inputs_are_computed_in_float32(name: str, autocast: bool, dtype: torch.dtype) -> None:
    student, teacher = (normal(4, 50, seed=seed, scale=3.0, dtype=dtype) for seed in (3, 4))
    plain = losses.LOGIT_LOSSES[name](student.float(), teacher.float(), 1.7)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        half = losses.LOGIT_LOSSES[name](student.requires_grad_(), teacher, 1.7)
    assert half.dtype == torch.float32
    assert torch.equal(half, plain)
    half.sum().backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype


@pytest.mark.parametrize("size", [1e-2, 1e3])
def test_a_large_or_small_temperature_keeps_the_slow_derivation_finite(size: float) -> None:
    student, teacher = normal(3, 6, seed=5), normal(3, 6, seed=6)
    for loss in losses.LOGIT_LOSSES.values():
        assert loss(student, teacher, size).isfinite().all()
    # To second order in 1 / tau, KL is the variance over classes of the logit difference, over 2 tau ** 2.
    if size > 1:
        difference = (student - teacher).double()
        expected = difference.var(-1, unbiased=False) / (2 * size**2)
        # The next order is 1 / tau = 1e-3 of it; in float32 the KL itself, 1e-6, has 1e-7 / 1e-6 of rounding.
        torch.testing.assert_close(losses.forward_kl(student, teacher, size).double(), expected, rtol=5e-2, atol=1e-7)


@every_loss
def test_Y04_a_teacher_made_under_inference_mode_can_be_learnt_from(name: str) -> None:
    student = normal(3, 4, seed=7).requires_grad_()
    with torch.inference_mode():
        teacher = normal(3, 4, seed=8)
    value = losses.LOGIT_LOSSES[name](student, teacher)
    assert_close(value, losses.LOGIT_LOSSES[name](student, normal(3, 4, seed=8)))
    value.sum().backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
