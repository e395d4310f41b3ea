"""What a model does to its head's output is known for every family of the table, and proved before it is relied on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, PreTrainedModel

from flexkd.core.outputs import HeadOutputs
from flexkd.errors import UnsupportedModelError
from flexkd.models.forward.head import check_head, head_of, linear_head, states_before_head
from flexkd.models.forward.hidden import HEAD_INPUT, model_inputs, states_and_logits, states_at, supervised_mask
from flexkd.models.loading.adapters import LoraSettings, add_lora, unwrapped
from tests.closeness import assert_close
from tests.contract.variants import VARIANTS, Variant, name_of
from tests.tiny import tiny_batch, tiny_model

WRITERS = [pytest.param(variant, id=name_of(variant)) for variant in VARIANTS if variant.task != "classification"]


def made(variant: Variant) -> PreTrainedModel:
    model = tiny_model(variant.model_type, variant.task, **variant.changes).eval()
    if hasattr(model, "final_logits_bias"):
        bias: Any = model.final_logits_bias
        bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("variant", WRITERS)
def test_A01_A04_the_head_of_every_family_makes_the_models_logits(variant: Variant) -> None:
    model = made(variant)
    batch = tiny_batch(model)
    inputs = model_inputs(model, batch)
    check_head(model, inputs)
    positions = supervised_mask(model, inputs, batch["labels"])
    with torch.no_grad():
        states, expected = states_and_logits(model, inputs, (1, HEAD_INPUT), positions=positions)
        found, outputs = states_before_head(
            model, inputs, (1, HEAD_INPUT), positions=positions, use=lambda outputs: outputs
        )
    assert_close(outputs[:], expected)
    for layer in (1, HEAD_INPUT):
        assert torch.equal(found[layer], states[layer])


def test_A01_a_scale_of_cohere_is_known() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CohereForCausalLM(CohereConfig(**sizes, vocab_size=61, logit_scale=0.0625, pad_token_id=0)).eval()
    check_head(model, model_inputs(model, tiny_batch(model)))
    assert head_of(model).finish is not None


@pytest.mark.parametrize("variant", WRITERS)
def test_a_head_is_a_linear_map_with_its_scale_and_bias_unless_it_caps(variant: Variant) -> None:
    model = made(variant)
    batch = tiny_batch(model)
    positions = supervised_mask(model, model_inputs(model, batch), batch["labels"])
    with torch.no_grad():
        states, logits = states_and_logits(model, model_inputs(model, batch), (HEAD_INPUT,), positions=positions)
    head = linear_head(model)
    if getattr(model.config, "final_logit_softcapping", None):
        assert head is None
        return
    assert head is not None
    assert_close(states_at(states[HEAD_INPUT], positions) @ head[0].T + head[1], logits)


def test_A01_a_model_that_does_something_unknown_to_its_logits_is_refused() -> None:
    model = tiny_model("llama", "causal").eval()
    plain = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        output = plain(*args, **options)
        output.logits = output.logits * 1.01
        return output

    model.forward = forward
    inputs = {name: value for name, value in tiny_batch(model).items() if name in ("input_ids", "attention_mask")}
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: its logits .*training\.logit_chunk: off"):
        check_head(model, inputs)


def test_only_a_plain_linear_head_hands_out_its_weight() -> None:
    model = tiny_model("llama", "causal")
    assert head_of(model).weight is model.lm_head.weight
    adapted = add_lora(model, LoraSettings(target_modules=("lm_head",)), seed=0)
    assert head_of(unwrapped(adapted)).weight is None
    half = tiny_model("llama", "causal")
    nn.utils.parametrizations.weight_norm(half.lm_head)
    assert head_of(half).weight is None


def test_the_states_are_used_while_the_forward_runs_and_hooks_are_gone_afterwards() -> None:
    model = tiny_model("llama", "causal")
    batch = tiny_batch(model)
    inputs = model_inputs(model, batch)
    inside = SimpleNamespace(depth=0, seen=0)

    def forward(**options: Any) -> Any:
        inside.depth += 1
        try:
            return model(**options)
        finally:
            inside.depth -= 1

    def use(outputs: HeadOutputs) -> int:
        # The head is called again, as an adapter or a sharded weight needs it.
        outputs.head.module(outputs.states)
        inside.seen = inside.depth
        return len(outputs)

    positions = supervised_mask(model, inputs, batch["labels"])
    _, count = states_before_head(model, inputs, (), positions=positions, use=use, forward=forward)
    assert (count, inside.seen) == (int(positions.sum()), 1)
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks
