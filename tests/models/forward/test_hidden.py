"""The state at a layer is the tensor that the model itself passes on, and positions are those that a head reads."""

import re
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from flexkd.errors import ShapeError, UnsupportedModelError
from flexkd.facts.families.table import FAMILIES
from flexkd.models.forward.hidden import (
    HEAD_INPUT,
    hooked_states,
    is_causal,
    model_inputs,
    num_layers,
    prediction_labels,
    states_and_logits,
    supervised_mask,
    token_mask,
)
from tests.closeness import assert_close
from tests.tiny import tiny_batch, tiny_model

CLASSIFIERS = sorted(name for name, family in FAMILIES.items() if "classification" in family.tasks)
CAUSAL = sorted(name for name, family in FAMILIES.items() if "causal" in family.tasks)
every_classifier = pytest.mark.parametrize("model_type", CLASSIFIERS)
every_causal_model = pytest.mark.parametrize("model_type", CAUSAL)


def outputs_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Any:
    return model(**model_inputs(model, batch), output_hidden_states=True)


def states_of(model: PreTrainedModel, batch: dict[str, Tensor], layers: list[int]) -> dict[int, Tensor]:
    with hooked_states(model, dict.fromkeys(layers)) as states:
        model(**model_inputs(model, batch))
    return states


def num_hooks(model: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_D14_each_model_gets_what_its_forward_takes() -> None:
    bert, distilbert = tiny_model("bert"), tiny_model("distilbert")
    batch = {**tiny_batch(bert), "example_id": ["a", "b", "c", "d"], "teacher_topk": torch.zeros(4)}
    assert set(model_inputs(bert, batch)) == {"input_ids", "attention_mask", "token_type_ids"}
    assert set(model_inputs(distilbert, batch)) == {"input_ids", "attention_mask"}


def test_a_teacher_reads_its_own_encoding_where_there_is_one() -> None:
    model = tiny_model("bert")
    student, teacher = tiny_batch(model, seed=1), tiny_batch(model, length=5, seed=2)
    both = {**student, **{f"teacher_{key}": value for key, value in teacher.items() if key != "labels"}}
    for as_teacher, expected in ((True, teacher), (False, student)):
        inputs = model_inputs(model, both, as_teacher=as_teacher)
        assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
        assert all(torch.equal(inputs[key], expected[key]) for key in inputs)
    assert torch.equal(model_inputs(model, student, as_teacher=True)["input_ids"], student["input_ids"])


def test_every_token_is_real_without_an_attention_mask() -> None:
    ids = torch.tensor([[5, 0, 0]])
    assert token_mask({"input_ids": ids}).tolist() == [[True, True, True]]
    assert token_mask({"input_ids": ids, "attention_mask": torch.tensor([[1, 0, 0]])}).tolist() == [
        [True, False, False]
    ]


@pytest.mark.parametrize("padding", ["right", "left"])
@every_classifier
def test_the_supervised_position_is_the_one_whose_state_moves_the_logits(model_type: str, padding: Any) -> None:
    model = tiny_model(model_type)
    batch = tiny_batch(model, rows=5, padding=padding)
    outputs = outputs_of(model, batch)
    (gradient,) = torch.autograd.grad(outputs.logits.square().sum(), outputs.hidden_states[-1])
    mask = supervised_mask(model, model_inputs(model, batch), batch["labels"])
    assert torch.equal(mask, (gradient != 0).any(-1))
    assert mask.sum(1).tolist() == [1] * 5


def test_D01_a_padding_id_inside_of_a_row_is_seen_as_the_model_sees_it() -> None:
    model = tiny_model("llama")
    # The second row ends with the padding id as a real token; the third holds nothing else.
    ids = torch.tensor([[5, 6, 0, 7, 0], [5, 6, 7, 8, 0], [0, 0, 0, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    outputs = outputs_of(model, inputs)
    (gradient,) = torch.autograd.grad(outputs.logits.square().sum(), outputs.hidden_states[-1])
    mask = supervised_mask(model, inputs, None)
    assert torch.equal(mask, (gradient != 0).any(-1))
    assert mask.int().argmax(1).tolist() == [3, 3, 0]


def test_D03_without_a_padding_id_the_last_position_is_read() -> None:
    model = tiny_model("llama", pad_token_id=None)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    outputs = outputs_of(model, inputs)
    (gradient,) = torch.autograd.grad(outputs.logits.square().sum(), outputs.hidden_states[-1])
    assert torch.equal(supervised_mask(model, inputs, None), (gradient != 0).any(-1))


def test_which_position_an_unknown_head_reads_is_not_guessed() -> None:
    model = tiny_model("albert", embedding_size=16)
    with pytest.raises(UnsupportedModelError, match=re.escape("AlbertForSequenceClassification: which position its")):
        supervised_mask(model, model_inputs(model, tiny_batch(model)), None)


def test_D04_M16_padding_never_predicts_the_first_token() -> None:
    model = tiny_model("llama", "causal")
    labels = torch.tensor([[-100, -100, 5, 6, 7], [5, 6, 7, -100, -100]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": labels.clamp(min=0), "attention_mask": mask}
    supervised = supervised_mask(model, inputs, labels)
    assert [row.nonzero().flatten().tolist() for row in supervised] == [[2, 3], [0, 1]]


@pytest.mark.parametrize("switch", [{}, {"output_hidden_states": -1}, {"tie_last_hidden_states": False}])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert", "llama", "mistral", "gpt2"])
def test_F15_F16_layers_are_the_models_own_states_whatever_its_config_holds(
    model_type: str, switch: dict[str, Any]
) -> None:
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4} if model_type == "gpt2" else {}
    model = tiny_model(model_type, **sizes)
    batch = tiny_batch(model)
    expected = outputs_of(model, batch).hidden_states
    for name, value in switch.items():
        setattr(model.config, name, value)
    states = states_of(model, batch, [1, 2, 3, HEAD_INPUT])
    assert len(expected) == num_layers(model) + 1 == 5
    for layer in (1, 2, 3, HEAD_INPUT):
        assert torch.equal(states[layer], expected[layer])


# What the tiny configs ask for behind the head.
AFTER_THE_HEAD: Final[dict[str, Any]] = {
    "gemma2": lambda logits: 5 * torch.tanh(logits / 5),
    "gemma3_text": lambda logits: 5 * torch.tanh(logits / 5),
    "granite": lambda logits: logits / 2.5,
}


@every_causal_model
def test_F15_A01_the_head_of_a_causal_model_turns_the_state_into_the_logits(model_type: str) -> None:
    model = tiny_model(model_type, "causal")
    batch = tiny_batch(model)
    before_norm, at_head = states_of(model, batch, [4, HEAD_INPUT]).values()
    logits = outputs_of(model, batch).logits
    expected = F.linear(at_head, model.get_output_embeddings().weight)
    assert_close(AFTER_THE_HEAD.get(model_type, lambda same: same)(expected), logits)
    # Layer 4 of 4 is the residual stream, which the final norm has not seen yet.
    norm = FAMILIES[model_type].final_norm
    assert norm is not None
    assert_close(model.get_submodule(norm)(before_norm), at_head)
    assert not torch.allclose(before_norm, at_head, atol=0.1)


@pytest.mark.parametrize("layer", [2, HEAD_INPUT])
@pytest.mark.parametrize(("model_type", "task"), [("bert", "classification"), ("llama", "causal")])
def test_a_replaced_state_goes_on_in_the_forward(model_type: str, task: Any, layer: int) -> None:
    model, other = tiny_model(model_type, task), tiny_batch(tiny_model(model_type, task), seed=7)
    batch = tiny_batch(model, seed=8)
    foreign = states_of(model, other, [layer])[layer]
    with hooked_states(model, {layer: lambda _: foreign}) as states:
        logits = model(**{**model_inputs(model, batch), "attention_mask": other["attention_mask"]}).logits
    # What came in is kept, what went on is the other batch's.
    assert torch.equal(
        states[layer], states_of(model, {**batch, "attention_mask": other["attention_mask"]}, [layer])[layer]
    )
    assert torch.equal(logits, outputs_of(model, other).logits)


def test_F06_hooks_go_after_an_error_within_and_after_a_layer_that_is_not_there() -> None:
    model = tiny_model("bert")
    with hooked_states(model, {1: None, HEAD_INPUT: None}):
        assert num_hooks(model) == 2
    broken = {"input_ids": torch.full((1, 3), 10_000)}
    with pytest.raises(IndexError), hooked_states(model, {1: None, HEAD_INPUT: None}):
        model(**broken)
    assert num_hooks(model) == 0
    message = "layer: BertForSequenceClassification has no layer 5. Layers are 1 to 4, the output of each block, or -1,"
    with pytest.raises(ShapeError, match=re.escape(message)), hooked_states(model, {1: None, 5: None}):
        pass
    assert num_hooks(model) == 0
    for layer in (0, -2):
        with pytest.raises(ShapeError, match=f"no layer {layer}"), hooked_states(model, {layer: None}):
            pass


def test_blocks_that_are_run_several_times_or_are_not_plain_are_refused_by_name() -> None:
    albert = tiny_model("albert", embedding_size=16)
    assert num_layers(albert) == 4
    # PLBART has two lists of equal length: its head reads what comes out of the decoder's.
    plbart = tiny_model(
        "plbart",
        d_model=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_layers=2,
        decoder_layers=2,
        num_hidden_layers=2,
    )
    with hooked_states(plbart, {1: None}):
        assert num_hooks(plbart.model.decoder.layers[0]) == 1
    message = "AlbertForSequenceClassification: no list of blocks found. Use layer -1"
    with pytest.raises(UnsupportedModelError, match=message), hooked_states(albert, {1: None}):
        pass


def test_a_longer_list_of_modules_inside_of_a_block_is_not_taken_for_the_blocks() -> None:
    model = tiny_model("gpt2", n_embd=32, n_layer=4, n_head=4)
    batch = tiny_batch(model)
    expected = states_of(model, batch, [2])[2]
    model.transformer.h[0].experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(9))
    assert num_layers(model) == 4
    assert torch.equal(states_of(model, batch, [2])[2], expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_F07_blocks_that_turn_batch_and_sequence_round_are_refused(rows: int) -> None:
    config = XLNetConfig(vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48, num_labels=3, pad_token_id=0)
    model = XLNetForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.full((rows, 5), 7), "attention_mask": torch.ones(rows, 5, dtype=torch.long)}
    message = f"the state of layer 1 is [5, {rows}, 32] for input_ids [{rows}, 5], not [batch, seq, hidden]"
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=re.escape(message)):
        states_and_logits(model, inputs, [1])
    with torch.no_grad():
        states, _ = states_and_logits(model, inputs, [HEAD_INPUT])
    assert states[HEAD_INPUT].shape == (rows, 5, 32)


@every_causal_model
def test_Y01_a_causal_head_runs_on_the_supervised_positions_alone(model_type: str) -> None:
    model = tiny_model(model_type, "causal")
    batch = tiny_batch(model)
    inputs = model_inputs(model, batch)
    positions = supervised_mask(model, inputs, batch["labels"])
    seen: list[torch.Size] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    states, logits = states_and_logits(model, inputs, [HEAD_INPUT, 2], positions=positions)
    handle.remove()
    assert seen == [(1, int(positions.sum()), 32)]
    assert_close(logits, outputs_of(model, batch).logits[positions])
    assert states[2].shape == states[HEAD_INPUT].shape == (4, 9, 32)


@every_classifier
def test_a_classifier_gives_its_own_logits_with_the_states(model_type: str) -> None:
    model = tiny_model(model_type)
    batch = tiny_batch(model)
    states, logits = states_and_logits(model, model_inputs(model, batch), [1, HEAD_INPUT])
    assert torch.equal(logits, outputs_of(model, batch).logits)
    assert not is_causal(model)
    assert list(states) == [1, HEAD_INPUT]


def seq2seq_model(model_type: str) -> PreTrainedModel:
    """A tiny encoder-decoder whose norms and biases are neither 1 nor 0, and a batch of unequal targets for it."""
    sizes: dict[str, Any] = {
        "t5": {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4},
        "bart": {
            "d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
        },
    }  # fmt: skip
    config = AutoConfig.for_model(
        model_type, vocab_size=41, pad_token_id=0, eos_token_id=1, decoder_start_token_id=2, **sizes[model_type]
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def seq2seq_batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 41, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = torch.randint(3, 41, (3, 5))
    labels[0, 3:] = -100
    labels[:, 2:3] = torch.where(labels[:, 2:3] == -100, labels[:, 2:3], 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_A03_M16_an_encoder_decoder_predicts_each_label_at_its_own_position(model_type: str) -> None:
    """Positions 0..n-1 of the target, no second shift: the loss is the model's own."""
    model, batch = seq2seq_model(model_type), seq2seq_batch()
    inputs = model_inputs(model, batch)
    positions = supervised_mask(model, inputs, batch["labels"])
    assert torch.equal(positions, batch["labels"] != -100)
    assert torch.equal(token_mask(inputs), positions)
    states, logits = states_and_logits(model, inputs, (HEAD_INPUT, 1, 3), positions=positions)
    labels = prediction_labels(model, batch["labels"], positions)
    assert len(logits) == len(labels) == 13
    assert states[3].shape == (3, 5, 16)
    assert num_layers(model) == 3
    with torch.no_grad():
        own = model(**batch)
    assert_close(torch.nn.functional.cross_entropy(logits, labels), own.loss)
    assert_close(logits, own.logits[positions])


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_M17_padding_of_source_and_target_changes_no_prediction(model_type: str) -> None:
    model, batch = seq2seq_model(model_type), seq2seq_batch()
    longer = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 4)),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 4)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 6), value=-100),
    }
    found = []
    for one in (batch, longer):
        inputs = model_inputs(model, one)
        states, logits = states_and_logits(model, inputs, (2,), positions=supervised_mask(model, inputs, one["labels"]))
        found.append((states[2][token_mask(inputs)], logits))
    assert_close(found[1][0], found[0][0])
    assert_close(found[1][1], found[0][1])
