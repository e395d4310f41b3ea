"""Predictions of which the student is least certain: how many, which, and what their mean is, against numpy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flexkd.core.losses import LOGIT_LOSSES
from flexkd.core.objective import Objective, Signal, StepCounts
from flexkd.core.outputs import Head, HeadOutputs, TopRule, entropies_of
from flexkd.core.terms import LogitTerm, TaskTerm
from flexkd.errors import RecipeError
from tests.closeness import assert_close
from tests.references.divergences import rows as divergences
from tests.references.draws import classes, normal, permutation

COUNT, WIDTH, OUTPUTS = 11, 6, 9
WEIGHT, TEMPERATURE = 0.6, 2.0
TEACHER = normal(COUNT, OUTPUTS, seed=4, scale=2.0)
LABELS = classes(COUNT, num_classes=OUTPUTS, seed=5)


def goal_of(share: float | None, *, task: float = 0.4, **options: Any) -> Objective:
    term = LogitTerm("forward_kl", WEIGHT, TEMPERATURE, entropy_share=share, **options)
    return Objective(TaskTerm(weight=task), term)


def logits_of(seed: int = 1) -> Tensor:
    """Predictions from flat to peaked."""
    return normal(COUNT, OUTPUTS, seed=seed) * torch.linspace(0.3, 6, COUNT)[permutation(COUNT, seed=seed)][:, None]


def least_certain(logits: Tensor, number: int) -> list[int]:
    """By the entropy sum of -p log p, straight from the definition."""
    entropies = []
    for row in logits.detach().double().numpy():
        p = np.exp(row - row.max())
        p /= p.sum()
        entropies.append(-math.fsum(x * math.log(x) for x in p if x > 0))
    return sorted(range(len(entropies)), key=lambda index: -entropies[index])[:number]


@pytest.mark.parametrize(("share", "number"), [(0.2, 3), (0.5, 6), (1.0, COUNT), (1e-9, 1)])
def test_the_logit_term_is_the_mean_over_the_least_certain_share(share: float, number: int) -> None:
    logits = logits_of().requires_grad_()
    value = goal_of(share)(Signal(logits), Signal(TEACHER), LABELS)
    chosen = least_certain(logits, number)
    expected = float(divergences("forward_kl", logits.detach(), TEACHER, TEMPERATURE, 0.0)[chosen].mean())
    assert float(value.parts["logits_raw"]) == pytest.approx(expected, rel=1e-5)
    assert float(value.parts["logits_weighted"]) == pytest.approx(WEIGHT * TEMPERATURE**2 * expected, rel=1e-5)
    # Every label is learnt.
    nats = -torch.log_softmax(logits, -1)[torch.arange(COUNT), LABELS].mean()
    assert_close(value.parts["task_raw"], nats.detach())
    assert_close(value.loss, value.parts["task_weighted"] + value.parts["logits_weighted"])
    alone = logits.detach().clone().requires_grad_()
    goal_of(share, task=0.0)(Signal(alone), Signal(TEACHER), LABELS).loss.backward()
    assert alone.grad is not None
    assert sorted(alone.grad.abs().sum(-1).nonzero()[:, 0].tolist()) == sorted(chosen)


def test_micro_batches_choose_for_themselves_and_their_mean_is_that_of_the_step() -> None:
    logits, goal = logits_of(2), goal_of(0.3)
    parts = [slice(0, 4), slice(4, 5), slice(5, COUNT)]
    numbers = [math.ceil(0.3 * len(range(COUNT)[part])) for part in parts]
    counts = StepCounts(COUNT, 0, 0, sum(numbers))
    values = [goal(Signal(logits[part]), Signal(TEACHER[part]), LABELS[part], counts) for part in parts]
    chosen = [
        part.start + index
        for part, number in zip(parts, numbers, strict=True)
        for index in least_certain(logits[part], number)
    ]
    raw = sum(float(value.parts["logits_raw"]) for value in values)
    expected = float(divergences("forward_kl", logits, TEACHER, TEMPERATURE, 0.0)[chosen].mean())
    assert raw == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("nll", [True, False])
@pytest.mark.parametrize("task", [0.4, 0.0])
@pytest.mark.parametrize("kind", ["linear", "module"])
def test_M05_chunks_choose_among_all_predictions(kind: str, task: float, nll: bool) -> None:
    """Behind a head the student's logits are made twice where they are chosen, the teacher's only there."""
    counts, results = StepCounts(COUNT, 0, 0, 3), []
    for chunk_size in (None, 3, 100):
        module = nn.Linear(WIDTH, OUTPUTS)
        with torch.no_grad():
            module.weight.copy_(3 * normal(OUTPUTS, WIDTH, seed=1))
            module.bias.copy_(normal(OUTPUTS, seed=2))
        head = Head(module, None, *((module.weight, module.bias) if kind == "linear" else ()))
        states = normal(COUNT, WIDTH, seed=3).requires_grad_()
        student = head(states) if chunk_size is None else HeadOutputs(states, head)
        seen: list[int] = []

        def of_teacher(part: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(len(part))
            return part

        teacher = HeadOutputs(TEACHER, Head(of_teacher))
        value = goal_of(0.25, task=task).predictions(student, teacher, LABELS, counts, chunk_size=chunk_size, nll=nll)
        assert sum(seen) == 3
        value.loss.backward()
        results.append([value.loss.detach(), *value.parts.values(), states.grad, module.weight.grad, module.bias.grad])
    for result in results[1:]:
        for part, plain in zip(result, results[0], strict=True):
            assert_close(part, plain)


def test_the_teachers_likeliest_outputs_are_chosen_with_their_predictions() -> None:
    logits, top = logits_of(3), TopRule(OUTPUTS, TEMPERATURE)(TEACHER)
    whole = goal_of(0.4)(Signal(logits), Signal(TEACHER), LABELS)
    assert_close(goal_of(0.4, top_k=OUTPUTS)(Signal(logits), Signal(top), LABELS).loss, whole.loss)


def test_without_predictions_nothing_is_chosen() -> None:
    logits = torch.zeros(0, OUTPUTS, requires_grad=True)
    value = goal_of(0.4)(Signal(logits), Signal(TEACHER[:0]), LABELS[:0], StepCounts(0, 0, 0, 0))
    value.loss.backward()
    assert float(value.loss.detach()) == 0
    assert logits.grad is not None


def test_entropy_is_that_of_the_distribution_and_of_one_without_mass_not_a_number() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [5.0, -torch.inf, -torch.inf], [-torch.inf] * 3])
    entropies = entropies_of(logits)
    assert_close(entropies[:2], [math.log(2), 0.0])
    assert entropies[2].isnan()


@pytest.mark.parametrize("share", [0.0, 1.5, -0.1])
def test_R07_a_share_is_above_0_and_at_most_1(share: float) -> None:
    with pytest.raises(RecipeError, match=r"entropy_share: must be above 0 and at most 1"):
        LogitTerm(entropy_share=share)


@pytest.mark.parametrize(("loss", "task"), [("mse", "mse"), ("forward_kl", "binary_cross_entropy")])
def test_R07_outputs_that_are_no_distribution_have_no_entropy(loss: str, task: str) -> None:
    with pytest.raises(RecipeError, match=r"entropy_share: 0\.2, but outputs that are learnt by"):
        Objective(TaskTerm(task), LogitTerm(loss, entropy_share=0.2))


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_every_loss_of_logits_is_computed_at_the_chosen_predictions(loss: str) -> None:
    logits, term = logits_of(6), LogitTerm(loss)
    value = Objective(logits=LogitTerm(loss, entropy_share=0.2))(Signal(logits), Signal(TEACHER), LABELS)
    chosen = least_certain(logits, 3)
    assert_close(value.parts["logits_raw"], term.values(LOGIT_LOSSES, logits, TEACHER)[chosen].mean())
