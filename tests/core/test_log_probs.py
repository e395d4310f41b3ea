"""Log-probabilities of a few outputs: against a derivation in float64, and the losses that are read of them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexkd.core import log_probs, outputs, terms
from flexkd.core.log_probs import log_probs_at
from flexkd.core.losses.chunked import chunked_sums
from flexkd.core.objective import Objective, StepCounts
from flexkd.core.outputs import Head, HeadOutputs, TopRule
from flexkd.core.terms import LogitTerm, TaskTerm
from tests.closeness import assert_close
from tests.references.draws import normal, permutation

ROWS, OUTPUTS, TOP = 7, 11, 3
INDICES = torch.stack([permutation(OUTPUTS, seed=row)[: TOP + 1] for row in range(ROWS)])
LABELS = torch.tensor([3, 10, 0, -100, 7, 1, -100])
COUNTS = StepCounts(ROWS, ROWS, ROWS)


def derived(logits: Tensor, indices: Tensor, temperature: float, top: int) -> Tensor:
    whole = (logits.double() / temperature).log_softmax(-1)
    found = whole.gather(-1, indices)
    if not top:
        return found
    rest = whole.scatter(-1, indices[:, :top], -torch.inf)
    return torch.cat([found, rest.logsumexp(-1, keepdim=True)], -1)


def gradient_of(function: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and the gradient of a sum of it with unequal weights."""
    leaf = logits.clone().requires_grad_()
    found = function(leaf)
    weights = normal(*found.shape, seed=5).to(found.dtype)
    return found.detach(), torch.autograd.grad((weights * found).sum(), leaf)[0]


@pytest.mark.parametrize("together", [1, 2 * OUTPUTS, 2**20])
@pytest.mark.parametrize("temperature", [1, 2.5])
@pytest.mark.parametrize("top", [0, TOP])
def test_value_and_gradient_are_those_of_a_whole_log_softmax(
    monkeypatch: pytest.MonkeyPatch, top: int, temperature: float, together: int
) -> None:
    monkeypatch.setattr(log_probs, "_CHUNK_ELEMENTS", together)
    logits = normal(ROWS, OUTPUTS, seed=1, scale=3.0)
    found = gradient_of(lambda leaf: log_probs_at(leaf, INDICES, temperature, top=top), logits)
    expected = gradient_of(lambda leaf: derived(leaf, INDICES, temperature, top), logits)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])


def test_an_output_may_stand_among_the_top_and_beside_it() -> None:
    indices = torch.cat([INDICES[:, :TOP], INDICES[:, :1]], -1)
    logits = normal(ROWS, OUTPUTS, seed=1, scale=3.0)
    found = gradient_of(lambda leaf: log_probs_at(leaf, indices, top=TOP), logits)
    expected = gradient_of(lambda leaf: derived(leaf, indices, 1, TOP), logits)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])


def test_logits_of_any_type_are_read_in_float32_and_left_as_they_are() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = normal(ROWS, OUTPUTS, seed=1, scale=3.0, dtype=dtype)
        before = logits.clone()
        value, gradient = gradient_of(lambda leaf: log_probs_at(leaf, INDICES, top=TOP), logits)
        assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
        assert_close(value, derived(logits, INDICES, 1, TOP), dtype=torch.float32)
        assert torch.equal(logits, before)


def test_an_output_without_mass_brings_no_nan() -> None:
    logits = normal(ROWS, OUTPUTS, seed=1)
    logits[:, 4] = -torch.inf
    indices = torch.tensor([[0, 1, 2, 3]]).expand(ROWS, -1)
    value, gradient = gradient_of(lambda leaf: log_probs_at(leaf, indices, top=TOP), logits)
    assert bool(value.isfinite().all() and gradient.isfinite().all())
    assert bool((gradient[:, 4] == 0).all())


def test_cross_entropy_is_that_of_torch_with_and_without_labels() -> None:
    logits = normal(ROWS, OUTPUTS, seed=1, scale=3.0)
    found = gradient_of(lambda leaf: TaskTerm().values(leaf, LABELS), logits)
    expected = gradient_of(lambda leaf: F.cross_entropy(leaf.double(), LABELS, reduction="none"), logits)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])


@pytest.mark.parametrize(
    ("task", "logits", "softmaxes"),
    [
        (TaskTerm(), LogitTerm(top_k=TOP), 1),
        (TaskTerm(), LogitTerm("jensen_shannon", top_k=TOP, shared_outputs=OUTPUTS), 1),
        (TaskTerm(), LogitTerm(top_k=TOP, temperature=2.0), 2),
        (TaskTerm(), LogitTerm(top_k=TOP, shared_outputs=OUTPUTS - 2), 2),
        (TaskTerm(label_smoothing=0.1), LogitTerm(top_k=TOP), 1),
    ],
)
def test_labels_and_top_share_a_softmax_where_it_is_the_same(
    monkeypatch: pytest.MonkeyPatch, task: TaskTerm, logits: LogitTerm, softmaxes: int
) -> None:
    calls = []

    def counted(*args: object, **kwargs: object) -> Tensor:
        calls.append(args)
        return log_probs_at(*args, **kwargs)  # type: ignore[arg-type]

    for module in (outputs, terms):
        monkeypatch.setattr(module, "log_probs_at", counted)
    assert logits.top is not None
    student, teacher = normal(ROWS, OUTPUTS, seed=1, scale=3.0), normal(ROWS, OUTPUTS, seed=2, scale=3.0)
    top = logits.top(teacher)
    calls.clear()
    together = gradient_of(
        lambda leaf: Objective(task, logits).predictions(leaf, top, LABELS, COUNTS).loss[None], student
    )
    assert len(calls) == softmaxes
    apart = [
        gradient_of(lambda leaf, one=one: one.predictions(leaf, top, LABELS, COUNTS).loss[None], student)  # type: ignore[misc]
        for one in (Objective(task), Objective(logits=logits))
    ]
    for whole, first, second in zip(together, *apart, strict=True):
        assert_close(whole, first + second)


def test_a_second_backward_through_chunks_is_refused_not_scaled_twice() -> None:
    weight, states = normal(OUTPUTS, 4, seed=1).requires_grad_(), normal(ROWS, 4, seed=2).requires_grad_()
    head = Head(lambda part: part @ weight.T, weight=weight)
    total, _ = chunked_sums(
        HeadOutputs(states, head), lambda logits, _: logits.logsumexp(-1)[None], torch.ones(1), chunk_size=2
    )
    (3 * total).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (3 * total).backward()


def test_the_top_of_a_teacher_in_bfloat16_is_taken_of_its_logits_as_they_are() -> None:
    logits = normal(ROWS, OUTPUTS, seed=2, scale=3.0, dtype=torch.bfloat16)
    found, expected = TopRule(TOP)(logits), TopRule(TOP)(logits.float())
    assert torch.equal(found.log_probs, expected.log_probs)
    assert torch.equal(found.log_tail, expected.log_tail)
    assert found.log_probs.dtype == torch.float32


@pytest.mark.parametrize("shift", [0.0, -300.0, 300.0])
def test_R06_a_rest_far_below_the_top_is_not_nothing_and_an_empty_one_is(shift: float) -> None:
    logits = shift + torch.tensor([[0.0, -150.0, -151.0, -400.0], [0.0, -150.0, -torch.inf, -torch.inf]])
    indices = torch.tensor([[0, 1]]).expand(2, -1)
    for top in (1, 2):
        value, gradient = gradient_of(lambda leaf, top=top: log_probs_at(leaf, indices, top=top), logits)  # type: ignore[misc]
        expected = derived(logits, indices, 1, top)
        assert bool((value.isinf() == expected.isinf()).all())
        assert_close(value.nan_to_num(neginf=0), expected.nan_to_num(neginf=0))
        assert bool(gradient.isfinite().all())
