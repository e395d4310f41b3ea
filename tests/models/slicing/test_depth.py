"""Blocks that cost the loss nothing are the ones that go, each round judged after those before it."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.errors import DataError, ShapeError, UnsupportedModelError
from flexkd.models.slicing.depth import layers_by_loss, skip_losses
from flexkd.models.slicing.student import slice_student
from tests.closeness import assert_close
from tests.tiny import tiny_batch, tiny_model

MODELS = ["llama", "gpt2", "gemma2"]


def loss_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Slow: the labels' log-probabilities, one after the other."""
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    terms = [
        -F.log_softmax(logits[row, position - 1].double(), -1)[batch["labels"][row, position]]
        for row, position in (batch["labels"] != -100).nonzero().tolist()
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("model_type", MODELS)
def test_skipping_a_block_costs_what_a_model_without_it_costs(model_type: str) -> None:
    teacher = tiny_model(model_type, "causal")
    batch = tiny_batch(teacher, rows=6)
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 6))]
    for skipped in ((), (2,)):
        found = skip_losses(teacher, halves, skipped=skipped)
        for layer in range(1, 5):
            kept = [one for one in range(1, 5) if one not in {*skipped, layer}]
            shorter = slice_student(teacher, layers=kept)
            assert_close(found[layer - 1], loss_of(shorter, batch), dtype=torch.float32)
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.parametrize("model_type", MODELS)
def test_blocks_go_one_after_the_other(model_type: str) -> None:
    """Slow: a model without each block in turn; with all at once, the first losses decide alone."""
    teacher = tiny_model(model_type, "causal")
    batch = tiny_batch(teacher, rows=6)
    kept = [1, 2, 3, 4]
    alone = skip_losses(teacher, [batch])
    for num_layers in (3, 2, 1):
        shorter = itertools.combinations(kept, num_layers)
        kept = list(min(shorter, key=lambda layers: loss_of(slice_student(teacher, layers=layers), batch)))
        assert layers_by_loss(teacher, iter([batch]), num_layers) == kept
        going = alone.argsort()[: 4 - num_layers] + 1
        assert layers_by_loss(teacher, [batch], num_layers, at_once=4) == sorted({1, 2, 3, 4} - set(going.tolist()))
    assert layers_by_loss(teacher, [batch], 4) == [1, 2, 3, 4]


def test_of_two_blocks_alike_the_earlier_one_stays() -> None:
    teacher = tiny_model("llama", "causal")
    for block in teacher.model.layers[1:]:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    # Without its first block it answers worse: the labels are its own answers.
    batch = tiny_batch(teacher, rows=6)
    with torch.no_grad():
        best = teacher(**batch).logits.argmax(-1)
    batch["labels"][:, 1:] = best[:, :-1].where(batch["labels"][:, 1:] != -100, -100)
    assert layers_by_loss(teacher, [batch], 2) == [1, 2]


def test_what_cannot_be_judged_is_refused() -> None:
    teacher = tiny_model("llama", "causal")
    batch = tiny_batch(teacher)
    with pytest.raises(ShapeError, match=re.escape("layers: cannot keep 5 of the teacher's 4. Ask for 1 to 4.")):
        layers_by_loss(teacher, [batch], 5)
    unlabelled = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(DataError, match="no row of the calibration batches has a label"):
        layers_by_loss(teacher, [unlabelled], 2)
    with pytest.raises(UnsupportedModelError, match="LlamaForSequenceClassification is no causal language model"):
        layers_by_loss(tiny_model("llama"), [batch], 2)
