"""Losses whose logits are made a chunk at a time: the value and the gradient of the plain path, to rounding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexkd.core.losses import LOGIT_LOSSES
from flexkd.core.losses.chunked import chunked_sums
from flexkd.core.objective import Objective, Signal, StepCounts
from flexkd.core.outputs import Head, HeadOutputs, TopRule
from flexkd.core.terms import LogitTerm, TaskTerm
from tests.closeness import assert_close
from tests.references.draws import normal

PREDICTIONS, WIDTH, OUTPUTS = 8, 6, 11
LABELS = torch.tensor([3, 10, 0, 7, -100, -100, -100, -100])
"""In chunks of four, no prediction of the second has a label."""

FINISHES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "plain": None,
    "scale": lambda logits: logits / 2.5,
    "cap": lambda logits: 3 * torch.tanh(logits / 3),
    "bias": lambda logits: logits + torch.linspace(-1, 1, OUTPUTS).to(logits),
}
every_finish = pytest.mark.parametrize("finish", FINISHES)
every_size = pytest.mark.parametrize("size", [1, 3, 4, 7, 1000])


def head_of(kind: str, finish: str, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Head]:
    """A linear head as it is (gradient with the value) or as a module that is run again in the backward."""
    module = nn.Linear(WIDTH, OUTPUTS)
    with torch.no_grad():
        module.weight.copy_(2 * normal(OUTPUTS, WIDTH, seed=1))
        module.bias.copy_(normal(OUTPUTS, seed=2))
    module.to(dtype)
    known = (module.weight, module.bias) if kind == "linear" else (None, None)
    return module, Head(module, FINISHES[finish], *known)


def values_and_gradients(run: Callable[[Tensor, Head], Tensor], kind: str, finish: str, **options: Any) -> list[Tensor]:
    module, head = head_of(kind, finish, **options)
    states = normal(PREDICTIONS, WIDTH, seed=3).to(module.weight.dtype).requires_grad_()
    loss = run(states, head)
    (3 * loss).backward()
    found = [loss.detach(), states.grad, module.weight.grad, module.bias.grad]
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


def goal_of(loss: str, **options: Any) -> Objective:
    return Objective(TaskTerm(weight=0.4, label_smoothing=0.1), LogitTerm(loss, weight=0.6, temperature=2.0, **options))


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize("kind", ["linear", "module"])
@every_size
def test_M05_every_loss_and_size_of_chunks_gives_the_plain_value_and_gradient(loss: str, kind: str, size: int) -> None:
    teacher, counts = normal(PREDICTIONS, OUTPUTS, seed=4, scale=2.0), StepCounts(5, 0, 0)

    def chunked(states: Tensor, head: Head) -> Tensor:
        outputs = HeadOutputs(states, head)
        return goal_of(loss).predictions(outputs, teacher, LABELS, counts, chunk_size=size).loss

    def plain(states: Tensor, head: Head) -> Tensor:
        return goal_of(loss)(Signal(head(states)), Signal(teacher), LABELS, counts).loss

    for found, expected in zip(
        values_and_gradients(chunked, kind, "plain"), values_and_gradients(plain, kind, "plain"), strict=True
    ):
        assert_close(found, expected)


@every_finish
@pytest.mark.parametrize("kind", ["linear", "module"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_M10_what_a_model_does_to_its_logits_is_in_value_and_gradient(
    finish: str, kind: str, dtype: torch.dtype
) -> None:
    teacher = normal(PREDICTIONS, OUTPUTS, seed=4, scale=2.0)

    def run(states: Tensor, head: Head, outputs: Any) -> Tensor:
        counts = StepCounts(5, 0, 0)
        return goal_of("forward_kl").predictions(outputs(states, head), teacher, LABELS, counts, chunk_size=3).loss

    found = values_and_gradients(lambda *given: run(*given, HeadOutputs), kind, finish, dtype=dtype)
    expected = values_and_gradients(lambda *given: run(*given, lambda s, h: h(s)), kind, finish, dtype=dtype)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        # In bfloat16 the gradient of the weight adds up rounded chunks.
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        assert float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < tolerance


@every_finish
@pytest.mark.parametrize("kind", ["linear", "module"])
@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_M10_a_teacher_of_itself_has_nothing_to_teach(finish: str, kind: str, loss: str) -> None:
    _, head = head_of(kind, finish)
    states = normal(PREDICTIONS, WIDTH, seed=3).requires_grad_()
    with torch.no_grad():
        teachers = [head(states), HeadOutputs(states.detach(), head), TopRule(3)(head(states))]
    goal = Objective(logits=LogitTerm(loss))
    for teacher in teachers:
        value = goal.predictions(HeadOutputs(states, head), teacher, LABELS, StepCounts(8, 0, 0), chunk_size=3)
        assert abs(float(value.loss.detach())) < 1e-6
        (gradient,) = torch.autograd.grad(value.loss, states)
        # The total variation has a kink where both are equal: a rounding decides its gradient there.
        assert loss == "total_variation" or float(gradient.abs().max()) < 1e-6


def test_half_precision_by_autocast_rounds_as_whole_logits_do() -> None:
    teacher = normal(PREDICTIONS, OUTPUTS, seed=4, scale=2.0)

    def run(states: Tensor, head: Head, outputs: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            counts = StepCounts(5, 0, 0)
            return goal_of("forward_kl").predictions(outputs(states, head), teacher, LABELS, counts, chunk_size=3).loss

    found = values_and_gradients(lambda *given: run(*given, HeadOutputs), "linear", "cap")
    expected = values_and_gradients(lambda *given: run(*given, lambda s, h: h(s)), "linear", "cap")
    exact = values_and_gradients(
        lambda states, head: goal_of("forward_kl").predictions(head(states), teacher, LABELS, StepCounts(5, 0, 0)).loss,
        "linear",
        "cap",
    )
    assert_close(found[0], expected[0])
    for ours, theirs, truth in zip(found[1:], expected[1:], exact[1:], strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert float((ours - truth).norm()) < 1.5 * float((theirs - truth).norm()) + 1e-6


def test_M01_no_prediction_is_a_zero_that_reaches_every_weight() -> None:
    for kind in ("linear", "module"):
        module, head = head_of(kind, "plain")
        states = torch.zeros(0, WIDTH, requires_grad=True)
        outputs = HeadOutputs(states, head)
        value = goal_of("forward_kl").predictions(
            outputs, torch.zeros(0, OUTPUTS), torch.zeros(0, dtype=torch.long), StepCounts(0, 0, 0), chunk_size=3
        )
        value.loss.backward()
        assert float(value.loss.detach()) == 0
        assert states.grad is not None
        assert kind == "module" or float(module.weight.grad.abs().max()) == 0  # type: ignore[union-attr]


def test_a_frozen_head_gets_no_gradient_and_the_states_get_theirs() -> None:
    module, head = head_of("linear", "plain")
    module.requires_grad_(False)
    states = normal(PREDICTIONS, WIDTH, seed=3).requires_grad_()

    def terms(logits: Tensor, rows: slice) -> Tensor:
        return F.cross_entropy(logits, LABELS[rows], reduction="none")[None]

    total, sums = chunked_sums(HeadOutputs(states, head), terms, torch.ones(1), chunk_size=3)
    total.backward()
    assert module.weight.grad is None
    expected = states.detach().clone().requires_grad_()
    F.cross_entropy(module(expected), LABELS, reduction="sum").backward()
    assert_close(states.grad, expected.grad)
    assert not sums.requires_grad


def test_nats_that_are_only_looked_at_move_nothing() -> None:
    _, head = head_of("linear", "plain")
    states = normal(PREDICTIONS, WIDTH, seed=3).requires_grad_()
    teacher, counts = normal(PREDICTIONS, OUTPUTS, seed=4), StepCounts(4, 0, 0)
    outputs = HeadOutputs(states, head)
    goal = goal_of("forward_kl")
    with_nll = goal.predictions(outputs, teacher, LABELS, counts, chunk_size=3, nll=True)
    without = goal.predictions(outputs, teacher, LABELS, counts, chunk_size=3)
    assert_close(with_nll.loss, without.loss)
    assert_close(with_nll.parts["nll_sum"], F.cross_entropy(head(states.detach()), LABELS, reduction="sum"))
    gradients = [torch.autograd.grad(value.loss, states)[0] for value in (with_nll, without)]
    assert_close(gradients[0], gradients[1])


def test_Y01_no_more_logits_than_a_chunk_are_ever_made() -> None:
    seen: list[int] = []
    module, head = head_of("linear", "plain")
    for linear in (head, Head(module)):
        states = normal(PREDICTIONS, WIDTH, seed=3).requires_grad_()

        def terms(logits: Tensor, rows: slice) -> Tensor:
            seen.append(len(logits))
            return logits.logsumexp(-1)[None]

        chunked_sums(HeadOutputs(states, linear), terms, torch.ones(1), chunk_size=3)[0].backward()
    assert max(seen) == 3
    assert seen.count(2) == 3, "the module's chunks are made once more in the backward"
