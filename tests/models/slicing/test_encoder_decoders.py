"""What is special about two stacks: shared units, position biases that stay, heads that say how they are scaled."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from flexkd.errors import DataError, ShapeError, UnsupportedModelError
from flexkd.models.forward.hidden import model_inputs, states_and_logits, supervised_mask
from flexkd.models.loading.language import fresh_language_model, load_language_model
from flexkd.models.loading.t5_head import has_own_head, normalize_head
from flexkd.models.slicing.importance import spaced_blocks
from flexkd.models.slicing.proportions import derive_shape, parameter_counter
from flexkd.models.slicing.shape import resolve_shape, shape_of
from flexkd.models.slicing.student import slice_student
from tests.closeness import assert_close
from tests.tiny import tiny_batch, tiny_model

UNITS = torch.tensor([0, 2, 3, 5, 7, 11, 13, 14, 17, 19, 20, 23, 26, 29, 30, 31])
T5_V1_1: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def logits_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    loaded: PreTrainedModel = AutoModelForSeq2SeqLM.from_pretrained(folder)
    return loaded.eval()


def silence(model: PreTrainedModel, *endings: str) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(endings):
            parameter.data.zero_()


# Sizes


@pytest.mark.parametrize(("model_type", "encoder"), [("bart", (1, 2, 2, 3)), ("t5", (1, 2, 4, 5))])
def test_the_encoder_scales_with_the_decoder_unless_it_is_asked_for(model_type: str, encoder: tuple[int, ...]) -> None:
    config = tiny_model(model_type, "seq2seq").config
    assert [resolve_shape(config, num_layers=depth).num_encoder_layers for depth in (1, 2, 3, 4)] == list(encoder)
    assert resolve_shape(config) == shape_of(config)
    least = encoder[-1] - 1
    assert resolve_shape(config, num_encoder_layers=least) == replace(shape_of(config), num_encoder_layers=least)
    message = f"slice_student.num_encoder_layers: 6 is larger than the teacher's {encoder[-1]}. "
    with pytest.raises(ShapeError, match=re.escape(message)):
        resolve_shape(config, num_encoder_layers=6)


def test_a_t5_that_could_not_generate_is_refused() -> None:
    """The cache of transformers 5 has as many places as the encoder has blocks."""
    config = tiny_model("t5", "seq2seq").config
    message = "slice_student.num_encoder_layers: 2 is below num_layers = 3, and a t5 cannot generate"
    with pytest.raises(ShapeError, match=re.escape(message)):
        resolve_shape(config, num_layers=3, num_encoder_layers=2)
    shallow = tiny_model("t5", "seq2seq", num_layers=2, num_decoder_layers=3)
    ids = tiny_batch(shallow)["input_ids"]
    with pytest.raises(IndexError):
        shallow.generate(input_ids=ids, max_new_tokens=2)


def test_one_stack_has_no_encoder_layers_to_ask_for() -> None:
    config = tiny_model("llama", "causal").config
    assert resolve_shape(config).num_encoder_layers is None
    with pytest.raises(ShapeError, match=r"slice_student.num_encoder_layers: 1 asked, but the teacher has one stack"):
        resolve_shape(config, num_encoder_layers=1)


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_parameters_are_counted_in_both_stacks(model_type: str) -> None:
    teacher = tiny_model(model_type, "seq2seq")
    student = slice_student(teacher, hidden_size=16, num_layers=1, num_encoder_layers=2, intermediate_size=20)
    assert parameter_counter(teacher.config)(shape_of(student.config)) == student.num_parameters()
    derived = derive_shape(teacher.config, size=0.4)
    assert parameter_counter(teacher.config)(derived) <= 0.4 * teacher.num_parameters()


def test_stacks_of_unlike_blocks_are_refused() -> None:
    teacher = tiny_model("bart", "seq2seq", encoder_ffn_dim=40)
    with pytest.raises(UnsupportedModelError, match="encoder_ffn_dim = 40 and decoder_ffn_dim = 48"):
        slice_student(teacher, hidden_size=16)


# Both stacks


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_blocks_that_change_nothing_are_cut_from_each_stack(model_type: str) -> None:
    teacher = tiny_model(model_type, "seq2seq")
    stack, names = ("block", ("o.weight", "wo.weight")) if model_type == "t5" else ("layers", ("out_proj", "fc2"))
    silent = ["encoder.{}.1.", "decoder.{}.0.", "decoder.{}.2."] + ["encoder.{}.3.", "encoder.{}.4."] * (
        stack == "block"
    )
    for path in (path.format(stack) for path in silent):
        for name, parameter in teacher.named_parameters():
            if path in name and any(part in name for part in names):
                parameter.data.zero_()
    batch = tiny_batch(teacher)
    student = slice_student(teacher, num_layers=2, num_encoder_layers=2, batches=[batch])
    if model_type == "t5":
        assert_close(logits_of(student, batch), logits_of(teacher, batch))
        return
    # BART norms what it leaves unchanged, too: those blocks are found, but not without a trace.
    own = dict(teacher.named_parameters())
    kept = {"encoder.layers.1": "encoder.layers.2", "decoder.layers.0": "decoder.layers.1"}
    for ours, theirs in kept.items():
        weight = student.get_submodule(f"model.{ours}").fc1.weight
        assert torch.equal(weight, own[f"model.{theirs}.fc1.weight"])


def test_calibration_needs_a_target() -> None:
    teacher = tiny_model("bart", "seq2seq")
    batch = tiny_batch(teacher)
    del batch["labels"]
    message = (
        "slice_student.batches: a batch has no labels, which a bart's decoder reads, only input_ids, attention_mask."
    )
    with pytest.raises(DataError, match=re.escape(message)):
        slice_student(teacher, hidden_size=16, batches=[batch])


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_padding_of_source_and_target_does_not_move_what_is_measured(model_type: str) -> None:
    teacher = tiny_model(model_type, "seq2seq")
    batch = tiny_batch(teacher)
    wider = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 3), value=5),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 3)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 2), value=-100),
    }
    sizes = {"hidden_size": 16, "num_layers": 2, "intermediate_size": 20}
    one, other = (slice_student(teacher, **sizes, batches=[rows]) for rows in (batch, wider))
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert_close(ours, theirs)


def test_silent_cross_attention_heads_are_the_ones_cut() -> None:
    """Self-attention and cross-attention of one block keep heads of their own."""
    teacher = tiny_model("t5", "seq2seq")
    kept = {"SelfAttention": [0, 3, 4, 6], "EncDecAttention": [1, 2, 5, 7]}
    for name, parameter in teacher.named_parameters():
        for attention, heads in kept.items():
            if name.endswith(f"{attention}.o.weight"):
                torch.unflatten(parameter.data, 1, (8, -1))[:, [head for head in range(8) if head not in heads]] = 0
    batch = tiny_batch(teacher)
    for batches in (None, [batch]):
        student = slice_student(teacher, num_heads=4, batches=batches)
        assert_close(logits_of(student, batch), logits_of(teacher, batch))


# T5


def test_the_position_bias_of_t5_stays_when_its_block_goes() -> None:
    """Block 0 computes the bias for all; without it the first block that is left has to."""
    teacher = tiny_model("t5", "seq2seq")
    for stack in ("encoder", "decoder"):
        silence(teacher.get_submodule(f"{stack}.block.0"), "o.weight", "wo.weight")
    batch = tiny_batch(teacher)
    silence(teacher.get_submodule("encoder.block.2"), "o.weight", "wo.weight")
    student = slice_student(teacher, layers=[2, 3, 4], num_encoder_layers=3, batches=[batch])
    for stack in ("encoder", "decoder"):
        bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        assert torch.equal(student.get_parameter(f"{stack}.{bias}"), teacher.get_parameter(f"{stack}.{bias}"))
    assert_close(logits_of(student, batch), logits_of(teacher, batch))


def test_all_blocks_of_t5_keep_the_same_heads_as_the_bias_is_shared() -> None:
    teacher = tiny_model("t5", "seq2seq")
    student = slice_student(teacher, num_heads=3)
    head_dim = teacher.config.d_kv
    for stack in ("encoder", "decoder"):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        theirs, ours = teacher.get_parameter(bias), student.get_parameter(bias)
        kept = [next(head for head in range(8) if torch.equal(theirs[:, head], ours[:, own])) for own in range(3)]
        rows = (torch.tensor(kept)[:, None] * head_dim + torch.arange(head_dim)).flatten()
        for block in range(4):
            query = f"{stack}.block.{block}.layer.0.SelfAttention.q.weight"
            assert torch.equal(student.get_parameter(query), teacher.get_parameter(query)[rows])


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("t5", {}),
        ("t5", T5_V1_1),
        ("bart", {"scale_embedding": True}),
        ("mbart", {"scale_embedding": True}),
        ("pegasus", {"scale_embedding": True}),
    ],
)
def test_A05_at_half_width_embeddings_and_head_are_those_of_the_kept_units(
    model_type: str, changes: dict[str, Any]
) -> None:
    """Units that are cut carry nothing: what the code does with its width must not show."""
    teacher = tiny_model(model_type, "seq2seq", **changes)
    batch = tiny_batch(teacher)
    student = slice_student(teacher, units=UNITS)
    stack = "block" if model_type == "t5" else "layers"
    prefix = "" if model_type == "t5" else "model."
    place = {"bart": "model.{}.layernorm_embedding", "mbart": "model.{}.layernorm_embedding"}.get(
        model_type, f"{prefix}{{}}.{stack}.0"
    )
    for side in ("encoder", "decoder"):
        found = []
        for model in (teacher, student):
            states: list[Tensor] = []
            handle = model.get_submodule(place.format(side)).register_forward_pre_hook(
                lambda _, args, states=states: states.append(args[0])
            )
            logits_of(model, batch)
            handle.remove()
            found.append(states[0])
        assert_close(found[1], found[0][..., UNITS])
    _assert_same_head(teacher, student)


def _assert_same_head(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Scale of the last norm, of the code and of the head's columns multiply to the teacher's."""
    norm = {
        "t5": "decoder.final_layer_norm",
        "bart": "model.decoder.layers.3.final_layer_norm",
    }.get(teacher.config.model_type, "model.decoder.layer_norm")
    products = []
    for model in (teacher, student):
        scaled = getattr(model.config, "scale_decoder_outputs", False)
        scale = model.config.d_model**-0.5 if scaled else 1.0
        products.append(model.get_submodule(norm).weight * scale * model.get_output_embeddings().weight)
    assert_close(products[1], products[0][:, UNITS])


# Positions


def test_positions_of_pegasus_are_the_kept_columns_after_reloading(tmp_path: Path) -> None:
    """A narrower sinusoid would be another one; the code makes it anew for each width, the checkpoint does not."""
    teacher = tiny_model("pegasus", "seq2seq")
    student = slice_student(teacher, units=UNITS)
    for model in (student, reloaded(student, tmp_path)):
        for side in ("encoder", "decoder"):
            name = f"model.{side}.embed_positions.weight"
            assert torch.equal(model.get_parameter(name), teacher.get_parameter(name)[:, UNITS])


# The head


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_A03_states_are_the_decoders_and_each_model_runs_its_own_encoder(model_type: str) -> None:
    teacher = tiny_model(model_type, "seq2seq")
    student = slice_student(teacher, hidden_size=16, num_layers=2)
    batch = tiny_batch(teacher)
    target = batch["labels"].shape[1]
    assert batch["input_ids"].shape[1] != target
    for model, depth in ((teacher, 4), (student, 2)):
        inputs = model_inputs(model, batch)
        positions = supervised_mask(model, inputs, batch["labels"])
        with torch.no_grad():
            states, logits = states_and_logits(model, inputs, range(1, depth + 1), positions=positions)
            outputs = model(**inputs, output_hidden_states=True)
        assert not hasattr(outputs, "hidden_states")
        for layer in range(1, depth):
            assert states[layer].shape == (len(positions), target, model.config.d_model)
            assert_close(states[layer], outputs.decoder_hidden_states[layer])
        assert_close(logits, outputs.logits[positions])


@pytest.mark.parametrize("model_type", ["bart", "mbart", "pegasus"])
def test_A04_the_bias_of_the_head_is_in_every_logit_and_in_the_student(model_type: str, tmp_path: Path) -> None:
    teacher = tiny_model(model_type, "seq2seq")
    assert teacher.final_logits_bias.abs().min() > 0
    batch = tiny_batch(teacher)
    student = slice_student(teacher, hidden_size=16, num_layers=2)
    for model in (teacher, student, reloaded(student, tmp_path)):
        assert torch.equal(model.final_logits_bias, teacher.final_logits_bias)
        inputs = model_inputs(model, batch)
        positions = supervised_mask(model, inputs, batch["labels"])
        with torch.no_grad():
            states, logits = states_and_logits(model, inputs, (-1,), positions=positions)
            head = model.get_output_embeddings()(states[-1])
        full = head if head.ndim == 2 else head[positions]
        assert_close(logits, full + model.final_logits_bias)


@pytest.mark.parametrize(("own", "scaled"), [(True, False), (False, True), (True, True), (False, False)])
def test_S10_the_config_of_a_t5_says_what_every_version_reads(own: bool, scaled: bool, tmp_path: Path) -> None:
    """Transformers 4 knows one rule: a tied head is scaled, its own is not. 5 writes more, which 4 does not read."""
    teacher = tiny_model("t5", "seq2seq", tie_word_embeddings=not own)
    assert has_own_head(teacher) == own
    teacher.config.scale_decoder_outputs = scaled
    batch = tiny_batch(teacher)
    expected = logits_of(teacher, batch)
    normalize_head(teacher)
    assert_close(logits_of(teacher, batch), expected)
    for name, model in (("teacher", teacher), ("student", slice_student(teacher, hidden_size=16, num_layers=2))):
        again = reloaded(model, tmp_path / name)
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written["tie_word_embeddings"] is not own
        assert written["scale_decoder_outputs"] is not own
        assert has_own_head(again) == has_own_head(model) == own
        assert torch.equal(logits_of(again, batch), logits_of(model, batch))
        # Resuming and some trainers call this: an own head must not be overwritten.
        model.tie_weights()
        assert torch.equal(logits_of(model, batch), logits_of(again, batch))


def test_S10_a_teacher_that_was_not_settled_gives_a_settled_student() -> None:
    """As transformers 5 loads Flan-T5: its own head, and a config that says it is tied."""
    teacher = tiny_model("t5", "seq2seq", **T5_V1_1)
    teacher.config.tie_word_embeddings = True
    student = slice_student(teacher)
    assert student.config.tie_word_embeddings is False
    assert student.encoder.embed_tokens.weight is student.shared.weight
    batch = tiny_batch(teacher)
    assert_close(logits_of(student, batch), logits_of(teacher, batch))


def test_S10_a_t5_that_transformers_5_has_saved_is_settled_when_it_is_loaded(tmp_path: Path) -> None:
    teacher = tiny_model("t5", "seq2seq", **T5_V1_1)
    teacher.config.tie_word_embeddings = True
    teacher.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path))
    assert loaded.config.tie_word_embeddings is False
    batch = tiny_batch(teacher)
    assert torch.equal(logits_of(loaded, batch), logits_of(teacher, batch))
    # A fresh one of that config has a tied head, and so the scale of a tied head.
    fresh = fresh_language_model(str(tmp_path), {})
    assert (has_own_head(fresh), fresh.config.tie_word_embeddings, fresh.config.scale_decoder_outputs) == (
        False, True, True,
    )  # fmt: skip


# Encoders with a first block of another kind


def test_the_first_block_of_modernbert_stays_as_it_has_no_norm_before_its_attention() -> None:
    teacher = tiny_model("modernbert")
    batch = tiny_batch(teacher)
    for choice in ({"num_layers": 2}, {"num_layers": 2, "batches": [batch]}, {"layers": [1, 4]}):
        student = slice_student(teacher, **choice)
        assert torch.equal(student.model.layers[0].attn.Wqkv.weight, teacher.model.layers[0].attn.Wqkv.weight)
    with pytest.raises(ShapeError, match=r"slice_student.layers: the first block of a modernbert model has to stay"):
        slice_student(teacher, layers=[2, 4])
    spaced = [spaced_blocks(6, kept, keeps_first=True) for kept in (1, 2, 3, 6)]
    assert spaced == [[0], [0, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5]]


def test_A05_half_of_t5_is_not_scaled_twice() -> None:
    """The factor by number: the head's d ** -0.5 grows when the width is halved, the last norm makes up for it."""
    teacher = tiny_model("t5", "seq2seq")
    student = slice_student(teacher, units=UNITS)
    norm = "decoder.final_layer_norm"
    assert_close(student.get_submodule(norm).weight, teacher.get_submodule(norm).weight[UNITS] * math.sqrt(16 / 32))
    assert_close(student.get_submodule("shared").weight, teacher.get_submodule("shared").weight[:, UNITS])
