"""Parameters of real models, and operations as PyTorch's own counter counts them while a model runs."""

import copy
from typing import Any, Final

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from flexkd.costs.flops import BACKWARD, forward_flops, head_flops
from flexkd.costs.rows import Load, RowLength
from flexkd.costs.skeletons import skeleton
from tests.contract.variants import VARIANTS, Variant, name_of, shallow_of
from tests.tiny import BUILDERS

ROWS, SOURCE, TARGET = 6, 24, 16

SMOLLM2: Final = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)

SMALL: Final = LlamaConfig(**{**SMOLLM2.to_dict(), "num_hidden_layers": 2})


def without_weights(config: PreTrainedConfig, task: str) -> tuple[FakeTensorMode, PreTrainedModel]:
    """A model whose products are all counted: the fused attention of the CPU is unknown to the counter."""
    mode = FakeTensorMode()
    config._attn_implementation = "eager"
    return mode, skeleton(mode, BUILDERS[task], config)


def counted(mode: FakeTensorMode, model: PreTrainedModel, *, backward: bool = False) -> int:
    """Operations of one pass over `ROWS` rows, the head on all positions."""
    with mode, torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        ids = torch.zeros(ROWS, SOURCE, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.zeros(ROWS, TARGET, dtype=torch.long)
        logits = model(**inputs).logits
        if backward:
            logits.sum().backward()
    return int(counter.get_total_flops())


def load_of(model: PreTrainedModel) -> Load:
    target = TARGET if model.config.is_encoder_decoder else 0
    predictions = (target or SOURCE) if model.get_output_embeddings() is not None else 1
    return Load.of([RowLength(SOURCE, target, predictions)] * ROWS)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_parameters_and_operations_of_every_family_are_those_that_are_counted(variant: Variant) -> None:
    real = shallow_of(variant)
    mode, model = without_weights(copy.deepcopy(real.config), variant.task)
    assert type(model) is type(real)
    assert model.num_parameters() == real.num_parameters()
    found = forward_flops(model, load_of(model), batches=1)
    # The head of a causal classifier runs on all tokens, of which one counts.
    head = getattr(model, "score", None)
    unread = 0 if head is None else 2 * head.weight.numel() * ROWS * (SOURCE - 1)
    assert found + unread == pytest.approx(counted(mode, model), rel=1e-3)


def test_a_real_shape_and_its_backward_are_within_two_percent() -> None:
    mode, model = without_weights(SMOLLM2, "causal")
    assert model.num_parameters() == 134_515_008
    assert forward_flops(model, load_of(model)) == pytest.approx(counted(mode, model), rel=1e-6)
    mode, model = without_weights(SMALL, "causal")
    once = forward_flops(model, load_of(model))
    assert (1 + BACKWARD) * once == pytest.approx(counted(mode, model, backward=True), rel=2e-2)


def test_the_head_costs_what_its_supervised_positions_cost() -> None:
    _, model = without_weights(SMALL, "causal")
    loads = [Load.of([RowLength(SOURCE, 0, predictions)]) for predictions in (3, 4)]
    assert head_flops(model, loads[0]) == 3 * 2 * 49152 * 576
    assert forward_flops(model, loads[1]) - forward_flops(model, loads[0]) == 2 * 49152 * 576


def test_a_load_is_a_sum_over_rows_and_long_rows_weigh_more_than_many_short_ones() -> None:
    _, model = without_weights(SMALL, "causal")
    one, two = Load.of([RowLength(10, 0, 1)]), Load.of([RowLength(20, 0, 1)])
    both = Load.of([RowLength(10, 0, 1), RowLength(20, 0, 1)])
    assert one.plus(two) == both
    assert both.times(2) == Load.of([RowLength(10, 0, 1), RowLength(20, 0, 1)] * 2)
    assert forward_flops(model, two) > forward_flops(model, one.times(2)) - head_flops(model, one)
