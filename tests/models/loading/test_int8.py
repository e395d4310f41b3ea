"""Copies in int8 stay close to the model, leave it and its head alone, and come back from disk as they were."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from flexkd.errors import UnsupportedModelError
from flexkd.evaluate.classification import predict
from flexkd.models.loading.int8 import computes_in_int8, int8_copy, int8_loader, save_int8
from tests.contract.variants import FIRST, Variant, name_of, teacher_of
from tests.tiny import tiny_batch, tiny_model

WHERE = "rivals.int8_teacher"


@pytest.mark.parametrize("variant", [one for one in FIRST if one.model_type != "gpt2"], ids=name_of)
def test_every_family_computes_in_int8_and_comes_back_from_disk(variant: Variant, tmp_path: Path) -> None:
    model = teacher_of(variant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = tiny_batch(model)
    quantized = int8_copy(model, where=WHERE)
    save_int8(quantized, tmp_path)
    load = int8_loader(tmp_path)
    assert load is not None
    with torch.no_grad():
        exact, rounded, loaded = (one(**batch).logits for one in (model, quantized, load()))
    # The largest gap of these tiny models with weights of all sizes was 0.16 of the largest logit.
    assert 0 < float((rounded - exact).abs().max()) < 0.25 * float(exact.abs().max())
    assert torch.equal(loaded, rounded)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    linear = [module for module in quantized.modules() if type(module) is nn.Linear]
    head = quantized.get_output_embeddings()
    assert linear == ([] if head is None else [head])
    assert computes_in_int8(quantized)
    assert not computes_in_int8(model)


def test_a_layer_is_within_half_a_step_of_its_weights_and_of_its_inputs() -> None:
    model = tiny_model("bert", seed=2)
    plain = model.bert.encoder.layer[0].attention.self.query
    layer = int8_copy(model, where=WHERE).bert.encoder.layer[0].attention.self.query
    inputs = torch.randn(3, plain.in_features, generator=torch.Generator().manual_seed(0))
    weight = plain.weight.detach()
    # One step a row of the weight in 8 bits; one step for all inputs, in 7 bits where the CPU could overflow in 8.
    weight_step = weight.abs().amax(1) / 127
    input_step = (inputs.max().clamp(min=0) - inputs.min().clamp(max=0)) / 127
    bound = inputs.abs().sum(1, keepdim=True) * weight_step / 2 + input_step / 2 * (
        weight.abs().sum(1) + weight.shape[1] * weight_step / 2
    )
    with torch.no_grad():
        gap = (layer(inputs) - plain(inputs)).abs()
    assert bool((gap <= 1.01 * bound).all())
    assert float(gap.max()) > 0


def test_weights_take_a_quarter_of_the_disk(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
    model = BertForSequenceClassification(BertConfig(vocab_size=8, max_position_embeddings=8, **sizes))
    save_int8(int8_copy(model, where=WHERE), tmp_path)
    packed = (tmp_path / "int8_model.bin").stat().st_size
    assert 0.25 < packed / (4 * model.num_parameters()) < 0.32


def test_inference_runs_a_copy_in_int8_as_it_is_whatever_the_precision() -> None:
    quantized = int8_copy(tiny_model("bert", seed=2), where=WHERE)
    batch = tiny_batch(quantized)
    first, second = (predict(quantized, [batch], precision=precision).logits for precision in ("float32", "bfloat16"))
    assert torch.equal(first, second)


def test_a_model_without_linear_layers_is_refused() -> None:
    words = r"rivals\.int8_teacher: GPT2LMHeadModel has no linear layers that torch could compute in int8\. Set it to"
    with pytest.raises(UnsupportedModelError, match=words):
        int8_copy(tiny_model("gpt2", "causal"), where=WHERE)


def test_a_plain_folder_holds_no_copy_in_int8(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    assert int8_loader(tmp_path) is None
