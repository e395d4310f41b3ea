"""Scoring as it is called: lists of layers, a family without a row, names and numbers that do not exist."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.errors import ScoreError, ShapeError
from flexkd.models.forward.hidden import hooked_states, model_inputs, token_mask
from flexkd.scoring.units import score_units
from tests.closeness import assert_close
from tests.tiny import tiny_batch, tiny_model


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
    for index in range(len(batch["input_ids"])):
        row = {key: value[index : index + 1] for key, value in batch.items()}
        leaf = Leaf()
        with hooked_states(model, {layer: leaf}):
            log_probs = model(**model_inputs(model, row)).logits.float().log_softmax(-1)
        wanted = [(t, int(row["labels"][0, t + 1])) for t in range(log_probs.shape[1] - 1)]
        values = [log_probs[0, t, label] for t, label in wanted if label != -100]
        predictions += len(values)
        (gradient,) = torch.autograd.grad(sum(values), leaf.state)
        total += gradient[0][token_mask(row)[0]].double().abs().sum(0)
    return total / predictions


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_family_without_a_row_agrees_with_one_row_at_a_time(layer: int) -> None:
    model = tiny_model("gpt2", "causal", n_embd=32, n_layer=3, n_head=4)
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


def test_a_direction_that_softmax_cannot_see_scores_nothing() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.score.weight[:, 5] = 2.0
    scores = score_units(model, [tiny_batch(model)], target="logit")
    assert scores.values[5] < 1e-6 * scores.values.max()


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
