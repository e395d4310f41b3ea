"""Outputs without mass: what is infinite is inf and never a number, what is not is finite, and no gradient is NaN."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexkd.core.losses import BERNOULLI_LOSSES, LOGIT_LOSSES, mean_squared_error
from flexkd.core.objective import Objective, StepCounts
from flexkd.core.outputs import Head, HeadOutputs, Outputs, TopOutputs, TopRule
from flexkd.core.terms import LogitTerm, TaskTerm
from tests.closeness import assert_close
from tests.references import divergences
from tests.references.draws import normal

INFINITY, NAN = float("inf"), float("nan")
OUTPUTS, BLIND = 6, 2
LABELS = torch.tensor([0, 1, 5, -100])
COUNTS = StepCounts(1, 0, 0)

# Infinite where the student has no mass and the teacher has, and the other way round.
TABLE: dict[tuple[str, str, float], tuple[bool, bool]] = {
    ("forward_kl", "", 0.0): (True, False),
    ("reverse_kl", "", 0.0): (False, True),
    ("jensen_shannon", "beta", 0.5): (False, False),
    ("jensen_shannon", "beta", 0.0): (True, False),
    ("jensen_shannon", "beta", 1.0): (False, True),
    ("skew_kl", "alpha", 0.1): (False, False),
    ("skew_kl", "alpha", 0.0): (True, False),
    ("skew_kl", "alpha", 1.0): (False, False),
    ("skew_reverse_kl", "alpha", 0.1): (False, False),
    ("skew_reverse_kl", "alpha", 0.0): (False, True),
    ("skew_reverse_kl", "alpha", 1.0): (False, False),
    ("total_variation", "", 0.0): (False, False),
}
every_loss = pytest.mark.parametrize(("row", "is_infinite"), TABLE.items(), ids=lambda one: "-".join(map(str, one)))
every_path = pytest.mark.parametrize("path", ["whole", "top", "top and labels", "chunks", "chunks and top", "module"])


def slow_name(name: str, share: float) -> str:
    """The reference knows the ends by the names of what they are."""
    if name == "jensen_shannon":
        return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(share, name)
    return name


def both_sides(blind: str) -> tuple[Tensor, Tensor]:
    """One output without mass for the student, for the teacher, or for both; in one row of two."""
    student, teacher = normal(2, OUTPUTS, seed=1, scale=2.0), normal(2, OUTPUTS, seed=2, scale=2.0)
    for logits, side in ((student, "student"), (teacher, "teacher")):
        if blind in (side, "both"):
            logits[0, BLIND] = -INFINITY
    return student, teacher


def through(path: str, term: LogitTerm, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each row by a path of the objective, and the gradient of their sum to the student's logits."""
    values, gradients = [], []
    for row in range(len(student)):
        leaf = student[row : row + 1].clone().requires_grad_()
        outputs: Outputs = leaf
        if path.startswith(("chunks", "module")):
            # The logits are states behind a head that changes nothing.
            weight = torch.eye(OUTPUTS)
            states = torch.zeros(1, OUTPUTS)
            finish: Callable[[Tensor], Tensor] = lambda raw, leaf=leaf: raw + leaf  # noqa: E731
            if path == "module":
                outputs = HeadOutputs(states.requires_grad_(), Head(nn.Identity(), finish))
            else:
                bias = leaf[0].detach().clone().requires_grad_()
                outputs, leaf = HeadOutputs(states, Head(nn.Identity(), None, weight, bias)), bias
        taught: Outputs = teacher[row : row + 1]
        if term.top is not None:
            taught = term.top(taught)
        task = TaskTerm(weight=1e-30) if path == "top and labels" else None
        labels = torch.zeros(1, dtype=torch.long)
        loss = Objective(task, term).predictions(outputs, taught, labels, COUNTS, chunk_size=1).loss
        (gradient,) = torch.autograd.grad(loss, leaf)
        values.append(loss.detach() / term.scale)
        gradients.append(gradient.reshape(-1))
    return torch.stack(values), torch.stack(gradients)


@every_path
@every_loss
def test_R06_an_output_without_mass_is_what_the_slow_derivation_says(
    row: tuple[str, str, float], is_infinite: tuple[bool, bool], path: str
) -> None:
    name, option, share = row
    options: dict[str, Any] = {option: share} if option else {}
    temperature = 1.0 if path in ("top and labels", "chunks") else 2.0
    for blind, infinite in {"student": is_infinite[0], "teacher": is_infinite[1], "both": False}.items():
        student, teacher = both_sides(blind)
        term = LogitTerm(name, temperature=temperature, top_k=OUTPUTS if "top" in path else None, **options)
        values, gradient = through(path, term, student, teacher)
        expected = divergences.rows(slow_name(name, share), student, teacher, temperature, share)
        assert_close(values, expected, dtype=torch.float32)
        assert values.isinf().tolist() == [infinite, False]
        assert not gradient.isnan().any()
        assert gradient[1].abs().sum() > 0 or share == 1.0


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_R06_a_rest_without_mass_is_infinite_where_the_other_rest_has_some(name: str) -> None:
    """The teacher's top of two, over three outputs."""
    full, empty = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 1.0, -INFINITY]])
    for student, teacher, infinite in ((empty, full, "forward_kl"), (full, empty, "reverse_kl"), (empty, empty, "")):
        leaf = student.clone().requires_grad_()
        value = LogitTerm(name, top_k=2).values(LOGIT_LOSSES, leaf, TopRule(2)(teacher))
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert bool(value.isinf()) == (name == infinite)
        assert not gradient.isnan().any()
        assert not value.isnan().any()
    assert float(TopRule(2)(empty).log_tail) == -INFINITY


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@pytest.mark.parametrize("seen", [1, 3])
def test_R06_rows_that_allow_few_outputs_are_compared_over_these(name: str, seen: int) -> None:
    student, teacher = normal(4, OUTPUTS, seed=3), normal(4, OUTPUTS, seed=4)
    few = LOGIT_LOSSES[name](student[:, :seen], teacher[:, :seen]) if seen > 1 else torch.zeros(4)
    student[:, seen:] = teacher[:, seen:] = -INFINITY
    leaf = student.requires_grad_()
    value = LOGIT_LOSSES[name](leaf, teacher)
    assert_close(value, few)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert gradient.isfinite().all()
    assert (gradient[:, seen:] == 0).all()


@pytest.mark.parametrize("junk", [-INFINITY, INFINITY, NAN])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_R06_a_row_that_is_no_distribution_is_inf_and_leaves_the_others_alone(
    name: str, side: str, junk: float
) -> None:
    student, teacher = normal(3, OUTPUTS, seed=5), normal(3, OUTPUTS, seed=6)
    plain = LOGIT_LOSSES[name](student, teacher)
    spoiled = student if side == "student" else teacher
    spoiled[1, slice(None) if junk == -INFINITY else slice(2, 3)] = junk
    leaf = student.clone().requires_grad_()
    value = LOGIT_LOSSES[name](leaf, teacher)
    assert value.isinf().tolist() == [False, True, False]
    assert torch.equal(value[[0, 2]], plain[[0, 2]])
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert gradient.isfinite().all()
    assert (gradient[[0, 2]].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_R06_what_overflowed_in_half_precision_is_inf_and_no_number(name: str, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e39, 1e38, -1e39], [0.0, 0.0, 0.0]], dtype=torch.float64).to(dtype)
    assert student.isinf().any()
    value = LOGIT_LOSSES[name](student, torch.zeros(2, 3, dtype=dtype))
    assert value.isinf().tolist() == [True, False]


@pytest.mark.parametrize("loss", BERNOULLI_LOSSES.values())
def test_R06_a_sure_label_costs_inf_where_the_teacher_is_not_sure_of_it(loss: Callable[..., Tensor]) -> None:
    for student, teacher, expected in (
        (-INFINITY, -INFINITY, 0.0),
        (INFINITY, INFINITY, 0.0),
        (-INFINITY, 0.0, INFINITY),
        (INFINITY, 0.0, INFINITY),
        (INFINITY, -INFINITY, INFINITY),
        (0.0, -INFINITY, 0.6931472),
        (0.0, INFINITY, 0.6931472),
    ):
        leaf = torch.tensor([[student, 0.3]], requires_grad=True)
        value = loss(leaf, torch.tensor([[teacher, 0.3]]), 1.0)
        assert_close(value, [expected])
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert not gradient.isnan().any()


@pytest.mark.parametrize("pair", [(-INFINITY, -INFINITY), (-INFINITY, 0.0), (0.0, INFINITY), (NAN, 0.0)])
def test_R06_a_value_that_is_not_finite_is_no_prediction(pair: tuple[float, float]) -> None:
    leaf = torch.tensor([[pair[0]], [1.0]], requires_grad=True)
    value = mean_squared_error(leaf, torch.tensor([[pair[1]], [0.0]]))
    assert value.tolist() == [INFINITY, 1.0]
    assert torch.autograd.grad(value.sum(), leaf)[0].tolist() == [[0.0], [2.0]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_R06_a_label_without_mass_costs_inf(smoothing: float) -> None:
    logits = normal(4, OUTPUTS, seed=7)
    logits[0, 0] = logits[1, 3] = logits[3, 0] = -INFINITY
    logits[2] = -INFINITY
    leaf = logits.requires_grad_()
    values = TaskTerm(label_smoothing=smoothing).values(leaf, LABELS)
    # Smoothing gives every output a share of the label.
    assert values.isinf().tolist() == [True, smoothing > 0, True, False]
    assert float(values[3].detach()) == 0
    if not smoothing:
        assert torch.autograd.grad(values.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize(
    ("logit", "label", "expected"),
    [
        (-INFINITY, 0.0, 0.0),
        (-INFINITY, 1.0, INFINITY),
        (INFINITY, 1.0, 0.0),
        (INFINITY, 0.0, INFINITY),
        (-INFINITY, 0.5, INFINITY),
        (-INFINITY, NAN, 0.0),
        (NAN, 1.0, INFINITY),
    ],
)
def test_R06_independent_labels_at_infinite_logits(logit: float, label: float, expected: float) -> None:
    leaf = torch.tensor([[logit]], requires_grad=True)
    value = TaskTerm("binary_cross_entropy").values(leaf, torch.tensor([[label]]))
    assert value.tolist() == [expected]
    if expected == 0:
        assert torch.autograd.grad(value.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("top_k", [None, 2, OUTPUTS])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("junk", [-INFINITY, INFINITY, NAN, 1e30])
def test_R06_M14_outputs_outside_the_shared_ones_are_cut_first(
    junk: float, temperature: float, top_k: int | None
) -> None:
    student, teacher = normal(4, OUTPUTS + 2, seed=8), normal(4, OUTPUTS + 1, seed=9)
    term = LogitTerm(temperature=temperature, shared_outputs=OUTPUTS, top_k=top_k)
    found = []
    for value in (0.0, junk):
        student[:, OUTPUTS:], teacher[:, OUTPUTS:] = value, -value
        taught: Tensor | TopOutputs = teacher if term.top is None else term.top(teacher)
        found.append(term.values(LOGIT_LOSSES, student, taught))
    assert torch.equal(found[0], found[1])
    assert found[0].isfinite().all()


def test_R06_a_figure_that_is_only_looked_at_never_spoils_the_loss() -> None:
    student, teacher = normal(4, OUTPUTS, seed=10), normal(4, OUTPUTS, seed=11)
    student[0, 0] = teacher[0, 0] = -INFINITY
    head = Head(nn.Identity(), lambda raw: raw + student, torch.zeros(OUTPUTS, 2))
    for outputs in (student, HeadOutputs(torch.zeros(4, 2), head)):
        goal = Objective(logits=LogitTerm())
        value = goal.predictions(outputs, teacher, LABELS, StepCounts(4, 0, 0), chunk_size=4, nll=True)
        assert value.loss.isfinite()
        assert value.parts["nll_sum"].isinf()
