"""Scores of real architectures: against a slow derivation, planted units, and every way to leave a teacher changed."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, XLNetConfig, XLNetForSequenceClassification

from flexkd.core.selection import select_units
from flexkd.errors import ScoreError, ShapeError, UnsupportedModelError
from flexkd.models.hidden import hooked_states, model_inputs, token_mask
from flexkd.train.scoring import score_units
from tests.closeness import assert_close
from tests.tiny import tiny_batch, tiny_model

CLASSIFIERS = ["bert", "roberta", "distilbert", "electra", "llama"]


@pytest.fixture(autouse=True)
def _few_rows_are_meant(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="flexkd")


class Leaf:
    """Cuts the graph at a state and keeps it."""

    def __init__(self) -> None:
        self.state = torch.empty(0)

    def __call__(self, state: Tensor) -> Tensor:
        self.state = state.detach().requires_grad_()
        return self.state


def slow_scores(model: PreTrainedModel, batch: Mapping[str, Tensor], layer: int) -> Tensor:
    """One row at a time, float64 sums; the labels of a row add before the absolute value."""
    total, predictions = torch.zeros(32, dtype=torch.float64), 0
    causal = model.get_output_embeddings() is not None
    for index in range(len(batch["input_ids"])):
        row = {key: value[index : index + 1] for key, value in batch.items()}
        leaf = Leaf()
        with hooked_states(model, {layer: leaf}):
            log_probs = model(**model_inputs(model, row)).logits.float().log_softmax(-1)
        if causal:
            wanted = [(t, int(row["labels"][0, t + 1])) for t in range(log_probs.shape[1] - 1)]
            values = [log_probs[0, t, label] for t, label in wanted if label != -100]
        else:
            values = [log_probs[0, row["labels"][0]]]
        predictions += len(values)
        (gradient,) = torch.autograd.grad(sum(values), leaf.state)
        total += gradient[0][token_mask(row)[0]].double().abs().sum(0)
    return total / predictions


@pytest.mark.parametrize("layer", [-1, 2])
@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_classifiers_agree_with_one_row_at_a_time(model_type: str, layer: int) -> None:
    model = tiny_model(model_type)
    batch = tiny_batch(model, rows=6)
    scores = score_units(model, [batch], layer=layer)
    assert_close(scores.values, slow_scores(model, batch, layer), dtype=torch.float32)
    assert (scores.num_predictions, scores.layer) == (6, layer)


@pytest.mark.parametrize("layer", [-1, 2])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_causal_models_agree_with_one_row_at_a_time(model_type: str, layer: int) -> None:
    overrides = {"n_embd": 32, "n_layer": 3, "n_head": 4} if model_type == "gpt2" else {}
    model = tiny_model(model_type, "causal", **overrides)
    batch = tiny_batch(model, rows=4)
    scores = score_units(model, [batch], layer=layer)
    assert_close(scores.values, slow_scores(model, batch, layer), dtype=torch.float32)
    assert scores.num_predictions == int((batch["labels"][:, 1:] != -100).sum())


def test_a_list_of_layers_is_each_layer_alone() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model, rows=6)
    together = score_units(model, [batch], layer=[-1, 1, 3])
    for scores in together:
        assert_close(scores.values, score_units(model, [batch], layer=scores.layer).values, dtype=torch.float32)


def planted(model_type: str = "bert") -> tuple[PreTrainedModel, Tensor]:
    """A classifier that reads 6 quiet units of 32, while the loudest ones lead nowhere."""
    model = tiny_model(model_type)
    units = torch.tensor([3, 7, 8, 19, 24, 30])
    head = model.bert.pooler.dense if model_type == "bert" else model.score
    norm = model.bert.encoder.layer[-1].output.LayerNorm if model_type == "bert" else model.model.norm
    with torch.no_grad():
        silent = torch.ones(32, dtype=torch.bool)
        silent[units] = False
        head.weight[:, silent] = 0
        norm.weight[silent] = 20.0
        norm.weight[units] = 0.3
    return model, units


@pytest.mark.parametrize("model_type", ["bert", "llama"])
@pytest.mark.parametrize("attribution", ["gradient", "gradient_x_activation", "fisher"])
def test_the_gradient_finds_exactly_the_planted_units(model_type: str, attribution: str) -> None:
    model, units = planted(model_type)
    scores = score_units(model, [tiny_batch(model, rows=16, seed=s) for s in range(2)], attribution=attribution)
    assert select_units(scores, 6).tolist() == units.tolist()
    assert scores.num_unused == 26


@pytest.mark.parametrize("control", ["activation", "variance", "random"])
def test_controls_do_not_find_the_planted_units(control: str) -> None:
    model, units = planted()
    scores = score_units(model, [tiny_batch(model, rows=16)], attribution=control)
    assert len(set(select_units(scores, 6).tolist()) & set(units.tolist())) < 4


def test_F10_scores_do_not_depend_on_batches_order_or_padding() -> None:
    model = tiny_model("bert")
    whole = tiny_batch(model, rows=8, length=11)
    expected = score_units(model, [whole]).values
    single = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(8)]
    uneven = [{key: value[part] for key, value in whole.items()} for part in (slice(5, 8), slice(0, 3), slice(3, 5))]
    padded = {key: torch.nn.functional.pad(value, (0, 5)) if value.ndim == 2 else value for key, value in whole.items()}
    for batches in (single, single[::-1], uneven, [padded]):
        assert_close(score_units(model, batches).values, expected, dtype=torch.float32)
    for layer in (2,):
        deep = score_units(model, [whole], layer=layer).values
        assert_close(score_units(model, [padded], layer=layer).values, deep, dtype=torch.float32)


def test_D04_left_and_right_padding_score_alike() -> None:
    model = tiny_model("llama", "causal")
    right, left = (tiny_batch(model, rows=4, padding=side) for side in ("right", "left"))
    rolled = {"input_ids": [], "labels": [], "attention_mask": []}
    for index in range(4):
        length = int(right["attention_mask"][index].sum())
        for key in rolled:
            rolled[key].append(right[key][index].roll(9 - length))
    left = {key: torch.stack(rows) for key, rows in rolled.items()}
    assert_close(score_units(model, [left]).values, score_units(model, [right]).values, dtype=torch.float32)


def test_F06_a_frozen_teacher_is_scored_and_left_as_it_was() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model)
    expected = score_units(model, [batch]).values
    model.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(True)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with torch.inference_mode():
        model(**model_inputs(model, batch))
    with torch.no_grad():
        assert_close(score_units(model, [batch]).values, expected)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_F06_hooks_mode_and_flags_come_back_after_an_error() -> None:
    model = tiny_model("bert").train()
    broken = {**tiny_batch(model), "input_ids": torch.full((4, 9), 10_000)}
    with pytest.raises(IndexError):
        score_units(model, [broken])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_F07_a_state_that_the_head_does_not_read_is_refused_by_name() -> None:
    model = tiny_model("albert", embedding_size=16)
    with pytest.raises(UnsupportedModelError, match="AlbertForSequenceClassification: scores are unavailable"):
        score_units(model, [tiny_batch(model)])


def test_F07_xlnet_scores_are_real() -> None:
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48, num_labels=3, pad_token_id=0)
    model = XLNetForSequenceClassification(config).eval()
    batch = {key: value for key, value in tiny_batch(tiny_model("bert")).items() if key != "token_type_ids"}
    scores = score_units(model, [batch])
    assert (scores.values > 0).all()


def test_F08_dropout_is_off_and_the_mode_comes_back() -> None:
    model = tiny_model("bert", hidden_dropout_prob=0.5).train()
    batch = tiny_batch(model)
    first, second = score_units(model, [batch]), score_units(model, [batch])
    assert torch.equal(first.values, second.values)
    assert model.training


def test_F09_a_saturated_teacher_is_refused_with_the_target_and_another() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model)
    with torch.no_grad():
        model.classifier.weight.mul_(0.01)
        model.classifier.bias.copy_(torch.tensor([100.0, 0.0, 0.0]))
    sure = {**batch, "labels": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ScoreError, match=r"largest 'log_prob' score .* rounding noise. Use target 'logit'"):
        score_units(model, [sure])
    assert (score_units(model, [sure], target="logit").values > 0).all()


def test_a_direction_that_softmax_cannot_see_scores_nothing() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.score.weight[:, 5] = 2.0
    scores = score_units(model, [tiny_batch(model)], target="logit")
    assert scores.values[5] < 1e-6 * scores.values.max()


def test_F15_the_state_is_the_heads_input_whatever_the_config_says() -> None:
    model = tiny_model("llama", "causal")
    batch = tiny_batch(model)
    expected = score_units(model, [batch]).values
    model.config.tie_last_hidden_states = False
    assert_close(score_units(model, [batch]).values, expected)


def test_F16_a_leftover_switch_in_the_config_changes_nothing() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model)
    expected = score_units(model, [batch], layer=1).values
    model.config.output_hidden_states = True
    assert_close(score_units(model, [batch], layer=1).values, expected)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_F17_gradient_checkpointing_changes_no_score(reentrant: bool) -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model)
    expected = score_units(model, [batch], layer=[-1, 1])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    found = score_units(model, [batch], layer=[-1, 1])
    for one, two in zip(found, expected, strict=True):
        assert_close(one.values, two.values, dtype=torch.float32)
    assert all(layer.gradient_checkpointing for layer in model.bert.encoder.layer)


class PackedLinear(torch.nn.Module):
    """A linear layer of a format whose backward is not written."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: Tensor) -> Tensor:
        return self.inner(states.detach())


def test_F21_a_head_without_a_backward_is_refused_by_name() -> None:
    model = tiny_model("bert")
    model.bert.pooler.dense = PackedLinear(model.bert.pooler.dense)
    with pytest.raises((UnsupportedModelError, ScoreError), match=r"scores"):
        score_units(model, [tiny_batch(model)])


def test_multi_label_and_regression_labels_are_scored() -> None:
    several = tiny_model("bert", problem_type="multi_label_classification")
    scores = score_units(several, [tiny_batch(several, rows=6)])
    assert (scores.values > 0).all()
    value = tiny_model("bert", problem_type="regression", num_labels=1)
    batch = tiny_batch(value, rows=6)
    batch["labels"][2] = float("nan")
    assert score_units(value, [batch]).num_predictions == 5


def test_unlabelled_rows_add_nothing() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model, rows=6)
    labels = batch["labels"].clone()
    labels[[1, 4]] = -100
    kept = torch.tensor([0, 2, 3, 5])
    expected = score_units(model, [{key: value[kept] for key, value in batch.items()}])
    scores = score_units(model, [{**batch, "labels": labels}])
    assert_close(scores.values, expected.values, dtype=torch.float32)
    assert scores.num_predictions == 4


def test_layers_and_names_that_do_not_exist_are_refused() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model)
    with pytest.raises(ShapeError, match=re.escape("has no layer 9. Layers are 1 to 4")):
        score_units(model, [batch], layer=9)
    with pytest.raises(ShapeError, match="has no layer 0"):
        score_units(model, [batch], layer=0)
    with pytest.raises(ScoreError, match="Did you mean 'log_prob'"):
        score_units(model, [batch], target="log_probs")
    with pytest.raises(ScoreError, match="Did you mean 'gradient'"):
        score_units(model, [batch], attribution="gradients")
    with pytest.raises(ScoreError, match="no batch was given"):
        score_units(model, [])


def test_few_predictions_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="flexkd")
    model = tiny_model("bert")
    score_units(model, [tiny_batch(model)])
    assert "target 'logit' help" in caplog.text


def test_A12_values_at_padded_positions_do_not_reach_the_scores() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model, rows=4)
    expected = score_units(model, [batch], layer=4).values

    def poison(_: Any, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[~token_mask(batch)] = float("nan")
        return output

    handle = model.bert.encoder.layer[3].register_forward_hook(poison)
    try:
        assert_close(score_units(model, [batch], layer=4).values, expected, dtype=torch.float32)
    finally:
        handle.remove()
