"""Scoring leaves a teacher as it was, and refuses what would give scores that mean nothing."""

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, XLNetConfig, XLNetForSequenceClassification

from flexkd.errors import ScoreError, UnsupportedModelError
from flexkd.models.forward.hidden import model_inputs
from flexkd.scoring.frozen import frozen_eval
from flexkd.scoring.units import score_units
from tests.closeness import assert_close
from tests.scoring.test_units import batches_of
from tests.tiny import tiny_batch, tiny_model

LAYERS = [-1, 2]


@pytest.fixture(autouse=True)
def _few_rows_are_meant(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="flexkd")


def state_of(model: PreTrainedModel) -> list[Any]:
    return [
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")],
    ]


def failing_batches(batch: Any) -> Iterator[Any]:
    yield batch
    raise ZeroDivisionError


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("fails", [False, True])
def test_F06_F08_F17_a_teacher_is_left_as_it_was_found(fails: bool) -> None:
    model = tiny_model("bert").train()
    model.gradient_checkpointing_enable()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[1].eval()
    model.register_forward_hook(lambda *_: None)
    found = state_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(ZeroDivisionError):
            score_units(model, failing_batches(tiny_batch(model)), layer=[1, -1])
    else:
        score_units(model, [tiny_batch(model)], layer=[1, -1])
    assert state_of(model) == found
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_F06_a_gradient_that_was_there_stays() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model)
    model(**model_inputs(model, batch)).logits.sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert before
    score_units(model, [batch], layer=[1, -1])
    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_F07_xlnet_is_scored_where_its_head_reads_and_refused_below() -> None:
    config = XLNetConfig(vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48, num_labels=3, pad_token_id=0)
    model = XLNetForSequenceClassification(config).eval()
    batch = {key: value for key, value in tiny_batch(tiny_model("bert")).items() if key != "token_type_ids"}
    scores = score_units(model, [batch])
    # Its summary reads the last position, whatever the padding.
    last: list[Tensor] = []

    def cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        last.append(args[0].detach().requires_grad_())
        return (last[0],)

    handle = model.sequence_summary.register_forward_pre_hook(cut)
    log_probs = model(**model_inputs(model, batch)).logits.log_softmax(-1)
    handle.remove()
    (gradient,) = torch.autograd.grad(log_probs[torch.arange(4), batch["labels"]].sum(), last[0])
    assert_close(scores.values, gradient.double().abs().sum((0, 1)) / 4, dtype=torch.float32)
    for rows in (1, 4):
        with pytest.raises(UnsupportedModelError, match=re.escape("not [batch, seq, hidden]. Use layer -1")):
            score_units(model, batches_of(batch, rows), layer=1)


def test_F07_a_block_that_runs_several_times_is_no_layer() -> None:
    model = tiny_model("albert", embedding_size=16)
    with pytest.raises(UnsupportedModelError, match="AlbertForSequenceClassification: no list of blocks found"):
        score_units(model, [tiny_batch(model)], layer=1)


def mostly_saturated(gap: float) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model = tiny_model("llama", "causal")
    batch = tiny_batch(model)
    with torch.no_grad():
        # Every state says the same word, by a gap that no other state can close.
        model.model.norm.weight.mul_(0.01)
        model.lm_head.bias = nn.Parameter(torch.zeros(61))
        model.lm_head.bias[7] = gap
    return model, {**batch, "labels": torch.where(batch["labels"] == -100, -100, 7)}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_F09_a_gap_of_100_is_refused_with_the_target_and_another(layer: int, dtype: torch.dtype) -> None:
    model, batch = mostly_saturated(100.0)
    model = model.to(dtype)
    expected = r"scores: the largest 'log_prob' score is .* rounding noise. Use target 'logit' or 'predicted_logit'."
    with pytest.raises(ScoreError, match=expected):
        score_units(model, [batch], layer=layer)
    for target in ("logit", "predicted_logit"):
        assert (score_units(model, [batch], layer=layer, target=target).values > 0).all()


def test_F09_a_gap_of_20_that_half_precision_would_lose_is_refused() -> None:
    model, batch = mostly_saturated(20.0)
    with pytest.raises(ScoreError, match="rounding noise"):
        score_units(model, [batch])


@pytest.mark.parametrize("layer", LAYERS)
def test_F09_half_weights_are_scored_near_the_float32_ones(layer: int) -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model, rows=16)
    exact = score_units(model, [batch], layer=layer).values
    scores = score_units(model.to(torch.bfloat16), [batch], layer=layer)
    assert scores.values.dtype == torch.float64
    # Eight bits of mantissa through four layers: 0.5 % measured, at the head and below it.
    assert float((scores.values - exact).norm() / exact.norm()) < 2e-2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


class WithoutBackward(nn.Linear):
    """A quantised layer whose kernel has no backward."""

    def forward(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(states)


class Wrapped(nn.Module):
    """The same, around a layer that is kept."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: Tensor) -> Tensor:
        output: Tensor = self.inner(states.detach()).detach()
        return output


class PackedLinear(nn.Module):
    """The same, with its weight in a buffer of integers."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", (inner.weight.detach() * 16).round().to(torch.int8))

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states.detach(), self.qweight.float() / 16)


def without_backward(inner: nn.Linear) -> nn.Linear:
    layer = WithoutBackward(inner.in_features, inner.out_features)
    layer.load_state_dict(inner.state_dict())
    return layer


@pytest.mark.parametrize("quantised", [without_backward, Wrapped, PackedLinear])
@pytest.mark.parametrize(
    ("task", "path", "layer"),
    [
        ("classification", "score", -1),
        ("causal", "lm_head", -1),
        # Beside it, the residual stream carries a gradient: it alone would be a wrong score.
        ("causal", "model.layers.2.mlp.down_proj", 1),
        ("classification", "model.layers.3.self_attn.o_proj", 2),
    ],
)
def test_F21_a_layer_without_a_backward_is_refused_by_its_name(
    quantised: Callable[[nn.Linear], nn.Module], task: Any, path: str, layer: int
) -> None:
    model = tiny_model("llama", task, attention_bias=True, mlp_bias=True)
    inner = model.get_submodule(path)
    assert isinstance(inner, nn.Linear)
    plain = nn.Linear(inner.in_features, inner.out_features)
    plain.weight = inner.weight
    model.set_submodule(path, quantised(plain))
    found = state_of(model)
    with pytest.raises(UnsupportedModelError, match=f"scores are unavailable, '{path}' lets no gradient through"):
        score_units(model, [tiny_batch(model)], layer=layer)
    assert state_of(model) == found


def test_F21_an_operation_without_a_backward_is_refused_by_its_name() -> None:
    # PyTorch would go on without it, as with the 4-bit kernels of some CPUs: its output says that it has a gradient.
    library = torch.library.Library("flexkd_tests", "DEF")
    library.define("packed_linear(Tensor states, Tensor weight) -> Tensor")
    library.impl("packed_linear", lambda states, weight: states @ weight.T, "CPU")
    model = tiny_model("llama", "causal")
    layer = model.model.layers[3].mlp.up_proj
    layer.forward = lambda states: torch.ops.flexkd_tests.packed_linear(states, layer.weight)
    batch = tiny_batch(model)
    expected = "scores are unavailable, 'flexkd_tests::packed_linear' lets no gradient through"
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=expected):
            score_units(model, [batch], layer=2)
    assert score_units(model, [batch]).values.sum() > 0, "nothing lies between the head's input and the logits"


def test_F21_a_quantised_layer_below_the_scored_state_does_not_matter() -> None:
    model = tiny_model("llama", "causal")
    batch = tiny_batch(model)
    expected = score_units(model, [batch], layer=[3, -1])
    inner = model.model.layers[0].mlp.up_proj
    quantised = WithoutBackward(inner.in_features, inner.out_features, bias=False)
    quantised.load_state_dict(inner.state_dict())
    model.model.layers[0].mlp.up_proj = quantised
    for one, two in zip(score_units(model, [batch], layer=[3, -1]), expected, strict=True):
        assert torch.equal(one.values, two.values)


def test_frozen_eval_switches_everything_off_within() -> None:
    model = tiny_model("bert").train()
    with frozen_eval(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.training
