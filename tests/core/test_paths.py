"""The ways to one objective (whole logits, chunks, the top, one softmax for labels and top) against one float64 sum."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexkd.core.objective import Objective, StepCounts
from flexkd.core.outputs import Head, HeadOutputs, Outputs, TopRule
from flexkd.core.terms import LogitTerm, TaskTerm
from tests.references.draws import normal

ROWS, WIDTH, OUTPUTS, TOP = 7, 5, 11, 4
LABELS = torch.tensor([3, 8, 0, -100, 7, 1, -100])
COUNTS = StepCounts(ROWS, 0, 0)
FINISHES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "plain": None,
    "scale": lambda logits: logits / 4,
    "cap": lambda logits: 2 * torch.tanh(logits / 2),
    "bias": lambda logits: logits + 3 * torch.linspace(-1, 1, OUTPUTS).to(logits),
}
every_finish = pytest.mark.parametrize("finish", FINISHES)
every_student = pytest.mark.parametrize("student", ["whole", "linear chunks", "module chunks"])
every_teacher = pytest.mark.parametrize("teacher", ["whole", "head", "top"])
every_temperature = pytest.mark.parametrize("temperature", [1.0, 3.0])
every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@dataclass(frozen=True)
class Side:
    """A model in numbers: states, and a linear head with a bias, behind which something may follow."""

    states: Tensor
    weight: Tensor
    bias: Tensor
    finish: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def draw(cls, seed: int, *, outputs: int = OUTPUTS, finish: str = "plain", dtype: Any = torch.float32) -> "Side":
        parts = (normal(ROWS, WIDTH, seed=seed), normal(outputs, WIDTH, seed=seed + 1), normal(outputs, seed=seed + 2))
        return cls(*(2 * part.to(dtype) for part in parts), FINISHES[finish])

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.states, self.weight, self.bias

    def trained(self) -> "Side":
        return Side(*(part.clone().requires_grad_() for part in self.leaves()), self.finish)

    def exact(self) -> "Side":
        return Side(*(part.detach().double().requires_grad_() for part in self.leaves()), self.finish)

    def logits(self) -> Tensor:
        """By hand."""
        raw = F.linear(self.states, self.weight, self.bias)
        return raw if self.finish is None else self.finish(raw)

    def outputs(self, form: str, rule: TopRule | None = None) -> Outputs:
        if form == "whole":
            return self.logits()
        if form == "top":
            assert rule is not None
            return rule(self.logits())
        known = (self.weight, self.bias) if form == "linear chunks" else (None, None)
        linear: Callable[[Tensor], Tensor] = lambda states: F.linear(states, self.weight, self.bias)  # noqa: E731
        return HeadOutputs(self.states, Head(linear, self.finish, *known))


def by_hand(task: TaskTerm | None, term: LogitTerm, student: Tensor, teacher: Tensor, *, is_top: bool) -> Tensor:
    """`(w ce + w tau^2 kl) / T` from log-softmax alone."""
    total = student.new_zeros(())
    if task is not None:
        known = LABELS != -100
        log_q = student.log_softmax(-1)[known]
        plain = -log_q.gather(-1, LABELS[known][:, None])[:, 0]
        smoothed = -log_q.mean(-1)
        nats = (1 - task.label_smoothing) * plain + task.label_smoothing * smoothed
        total = total + task.weight * nats.sum()
    shared, tau = term.shared_outputs, term.temperature
    log_p, log_q = ((logits[:, :shared] / tau).log_softmax(-1) for logits in (teacher, student))
    if is_top:
        indices = log_p.topk(TOP, -1).indices
        rest = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, indices, value=False)
        log_p, log_q = (
            torch.cat([one.gather(-1, indices), one.masked_fill(~rest, -torch.inf).logsumexp(-1, keepdim=True)], -1)
            for one in (log_p, log_q)
        )
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    return (total + term.weight * tau**2 * divergence) / ROWS


def compared(
    task: TaskTerm | None, temperature: float, student: Side, teacher: Side, forms: tuple[str, str], **options: Any
) -> None:
    """Value and gradients of a path against those of the sum in float64."""
    is_top = forms[1] == "top"
    term = LogitTerm(weight=0.7, temperature=temperature, top_k=TOP if is_top else None, **options)
    trained, exact = student.trained(), student.exact()
    taught = teacher.outputs(forms[1], term.top)
    goal = Objective(task, term)
    loss = goal.predictions(trained.outputs(forms[0]), taught, LABELS, COUNTS, chunk_size=3).loss
    expected = by_hand(task, term, exact.logits(), teacher.exact().logits().detach(), is_top=is_top)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    for found, right in zip(
        torch.autograd.grad(loss, trained.leaves()), torch.autograd.grad(expected, exact.leaves()), strict=True
    ):
        assert float((found.double() - right).norm()) < 1e-4 * float(right.norm()) + 1e-6


@every_finish
@every_student
@every_teacher
def test_M10_scale_cap_and_bias_of_a_head_are_in_every_path(finish: str, student: str, teacher: str) -> None:
    for temperature, smoothing in ((1.0, 0.0), (3.0, 0.1)):
        sides = Side.draw(1, finish=finish), Side.draw(10, finish=finish)
        compared(TaskTerm(label_smoothing=smoothing), temperature, *sides, (student, teacher))


@every_finish
@every_student
def test_M10_the_nll_that_is_only_looked_at_is_that_of_the_finished_logits(finish: str, student: str) -> None:
    side = Side.draw(1, finish=finish)
    value = Objective(TaskTerm(weight=0.5)).predictions(
        side.outputs(student), None, LABELS, COUNTS, chunk_size=3, nll=True
    )
    expected = F.cross_entropy(side.exact().logits().detach(), LABELS, reduction="sum")
    assert float(value.parts["nll_sum"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(value.loss) == pytest.approx(0.5 * float(expected) / ROWS, rel=1e-5)


@every_half
@every_student
@pytest.mark.parametrize("teacher", ["whole", "top"])
def test_M13_log_probabilities_of_half_logits_are_float32_in_every_path(
    dtype: torch.dtype, student: str, teacher: str
) -> None:
    """What the head rounds is rounded; a log-probability that was rounded once more would be off by 1e-3 to 1e-2."""
    for task in (None, TaskTerm(), TaskTerm(label_smoothing=0.1)):
        for temperature in (1.0, 3.0):
            learner, master = Side.draw(1, dtype=dtype), Side.draw(10, dtype=dtype)
            term = LogitTerm(temperature=temperature, top_k=TOP if teacher == "top" else None)
            taught = master.outputs(teacher, term.top)
            for autocast in (False, True):
                with torch.autocast("cpu", dtype, enabled=autocast):
                    value = Objective(task, term).predictions(
                        learner.outputs(student), taught, LABELS, COUNTS, chunk_size=3, nll=True
                    )
                logits = F.linear(learner.states, learner.weight, learner.bias)
                expected = by_hand(task, term, logits.double(), master.logits().double(), is_top=teacher == "top")
                assert value.loss.dtype == torch.float32
                assert float(value.loss) == pytest.approx(float(expected), rel=1e-5)
                nll = F.cross_entropy(logits.double(), LABELS, reduction="sum")
                assert float(value.parts["nll_sum"]) == pytest.approx(float(nll), rel=1e-5)


@every_half
@every_temperature
def test_M13_the_top_of_half_logits_is_taken_in_float32(dtype: torch.dtype, temperature: float) -> None:
    logits = Side.draw(1, dtype=dtype).logits()
    top = TopRule(TOP, temperature)(logits)
    exact = (logits.double() / temperature).log_softmax(-1)
    assert top.log_probs.dtype == top.log_tail.dtype == torch.float32
    torch.testing.assert_close(top.log_probs.double(), exact.gather(-1, top.indices), rtol=1e-6, atol=1e-6)
    rest = exact.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(top.log_tail.double(), rest, rtol=1e-6, atol=1e-6)


@every_temperature
@every_student
@every_teacher
@pytest.mark.parametrize("wide", [(OUTPUTS + 3, OUTPUTS), (OUTPUTS, OUTPUTS + 2), (OUTPUTS + 1, OUTPUTS + 1)])
def test_M14_the_divergence_is_over_the_shared_outputs_in_every_path(
    temperature: float, student: str, teacher: str, wide: tuple[int, int]
) -> None:
    """Labels are learnt over all of the student's own outputs, the divergence over those that both have."""
    sides = [Side.draw(seed, outputs=outputs) for seed, outputs in zip((1, 10), wide, strict=True)]
    for side in sides:
        # What is padded is far from silent, and would be the likeliest output.
        side.bias[OUTPUTS:] += 9
    for task in (None, TaskTerm(), TaskTerm(label_smoothing=0.1)):
        compared(task, temperature, *sides, (student, teacher), shared_outputs=OUTPUTS)
