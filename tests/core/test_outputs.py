"""The top of a teacher's outputs and the rest as one: a distribution, and divergences between such."""

from math import log

import pytest
import torch

from flexkd.core.losses import LOGIT_LOSSES
from flexkd.core.losses.logit import forward_kl
from flexkd.core.outputs import TopRule, at_top
from flexkd.core.terms import LogitTerm
from flexkd.errors import RecipeError
from tests.closeness import assert_close
from tests.references.draws import normal

P, Q = torch.tensor([[0.5, 0.3, 0.1, 0.1]]), torch.tensor([[0.6, 0.35, 0.03, 0.02]])


def divergence(term: LogitTerm, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    rule = term.top
    return term.values(LOGIT_LOSSES, student, teacher if rule is None else rule(teacher))


def test_K03_the_rest_is_one_category_and_the_whole_a_divergence() -> None:
    head = 0.5 * log(0.5 / 0.6) + 0.3 * log(0.3 / 0.35)
    assert float(divergence(LogitTerm(top_k=2), Q.log(), P.log())) == pytest.approx(head + 0.2 * log(0.2 / 0.05))
    whole = head + 0.1 * log(0.1 / 0.03) + 0.1 * log(0.1 / 0.02)
    assert float(divergence(LogitTerm(), Q.log(), P.log())) == pytest.approx(whole)


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_K03_all_outputs_as_the_top_are_the_plain_loss_and_its_gradient(loss: str, temperature: float) -> None:
    teacher = normal(7, 9, seed=1, scale=3.0)
    found = []
    for k in (None, 9):
        student = normal(7, 9, seed=2, scale=3.0).requires_grad_()
        values = divergence(LogitTerm(loss, temperature=temperature, top_k=k), student, teacher)
        found.append((values, torch.autograd.grad(values.sum(), student)[0]))
    assert_close(found[1][0], found[0][0])
    assert_close(found[1][1], found[0][1])


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_K03_a_top_never_shows_more_than_all_outputs_do_and_never_less_than_nothing(loss: str) -> None:
    student, teacher = normal(50, 9, seed=2, scale=3.0), normal(50, 9, seed=1, scale=3.0)
    whole = divergence(LogitTerm(loss), student, teacher)
    before = torch.zeros(50)
    for k in (1, 3, 6, 9):
        values = divergence(LogitTerm(loss, top_k=k), student, teacher)
        assert bool((values >= before - 1e-5).all()), "a finer partition shows more"
        assert bool((values <= whole + 1e-5).all())
        before = values


def test_a_rest_of_next_to_nothing_is_kept_to_its_digits() -> None:
    logits = torch.tensor([[30.0, 0.0, -1.0]])
    top = TopRule(1)(logits)
    expected = torch.logsumexp(logits[0, 1:].double(), 0) - torch.logsumexp(logits[0].double(), 0)
    assert_close(top.log_tail[0].double(), expected, dtype=torch.float32)
    assert_close(at_top(logits, top)[0, 1].double(), expected, dtype=torch.float32)
    assert float(forward_kl(at_top(logits, top), top.categories())) == pytest.approx(0, abs=1e-7)


def test_K04_another_temperature_than_that_of_the_top_is_refused() -> None:
    top = TopRule(3, temperature=2.0)(torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, -1.0]]))
    assert float(top.log_probs[0, 0].exp()) == pytest.approx(0.414, abs=1e-3)
    with pytest.raises(RecipeError, match=r"objective\.logits\.temperature: is 1\.0, but .* taken at 2\.0"):
        LogitTerm(top_k=3).values(LOGIT_LOSSES, torch.zeros(1, 6), top)


def test_M14_only_shared_outputs_are_in_a_top() -> None:
    teacher, student = normal(4, 9, seed=1, scale=3.0), normal(4, 12, seed=2)
    found = divergence(LogitTerm(top_k=3, shared_outputs=7), student, teacher)
    assert_close(found, divergence(LogitTerm(top_k=3), student[:, :7], teacher[:, :7]))


@pytest.mark.parametrize(("k", "loss"), [(0, "forward_kl"), (3, "mse")])
def test_a_top_that_means_nothing_is_refused(k: int, loss: str) -> None:
    with pytest.raises(RecipeError, match=rf"objective\.logits\.top_k: {k} for loss '{loss}'"):
        LogitTerm(loss, top_k=k)
