"""Adapters: a LoRA student ends as a plain model, what would be lost is refused, a teacher's adapter is merged."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from flexkd.errors import MissingDependencyError, RecipeError, UnsupportedModelError
from flexkd.models.loading.adapters import LoraSettings, add_lora, load_adapter, merge_lora, unwrapped, without_gradient
from flexkd.preflight.model_files import check_adapter
from flexkd.scoring.units import score_units
from tests.closeness import assert_close
from tests.tiny import tiny_batch, tiny_model

# What PEFT itself still asks transformers for.
with_prompts = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CLASSIFIERS = ["bert", "roberta", "distilbert", "electra", "llama"]


def moved(model: nn.Module, seed: int = 3) -> nn.Module:
    """As after training: whatever is trained has moved, B from zero among it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def causal(**changes: Any) -> PreTrainedModel:
    """In float64, where merging is exact and float32 only rounds."""
    return tiny_model("llama", "causal", num_hidden_layers=2, **changes).double()


@pytest.mark.parametrize("is_tied", [True, False])
def test_A06_a_merged_language_model_is_plain_keeps_its_tie_and_the_adapters_logits(
    is_tied: bool, tmp_path: Path
) -> None:
    student = causal(tie_word_embeddings=is_tied)
    batch = tiny_batch(student)
    before = logits(student, batch)
    keys = set(student.state_dict())
    model = add_lora(student, LoraSettings(rank=4))
    assert torch.equal(logits(model, batch), before), "B starts at zero"
    assert all(".lora_A." in name or ".lora_B." in name for name in trained(model))
    assert len(trained(model)) == 2 * 2 * 7, "seven matrices in each of two blocks"
    expected = logits(moved(model), batch)
    assert (expected - before).abs().max() > 0.1
    merged = merge_lora(model)
    assert merged is student
    assert set(merged.state_dict()) == keys
    assert not merged.training
    assert trained(merged) == {name for name, _ in merged.named_parameters()}
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == is_tied
    assert_close(logits(merged, batch), expected)
    merged.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_close(logits(loaded, batch), expected)


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_A06_a_classifiers_head_is_trained_whole_and_merged(model_type: str, tmp_path: Path) -> None:
    student = tiny_model(model_type).double()
    batch = tiny_batch(student)
    own_head = {name for name, _ in student.named_parameters() if not name.startswith(student.base_model_prefix)}
    model = add_lora(student, LoraSettings(rank=4, dropout=0.1))
    whole = {name for name in trained(model) if ".lora_" not in name}
    assert {re.sub(r"base_model\.model\.|modules_to_save\.default\.", "", name) for name in whole} == own_head
    assert any(".lora_B." in name for name in trained(model))
    expected = logits(moved(model), batch)
    merge_lora(model).save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_close(logits(loaded, batch), expected)


def test_A06_an_encoder_decoder_is_merged() -> None:
    config = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    student = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", vocab_size=61, **config)).eval().double()
    batch = {"input_ids": torch.arange(4, 10)[None], "decoder_input_ids": torch.arange(4, 8)[None]}
    model = add_lora(student, LoraSettings(rank=2))
    expected = logits(moved(model), batch)
    assert_close(logits(merge_lora(model), batch), expected)


def test_updates_are_a_function_of_the_seed_and_leave_the_callers_numbers() -> None:
    state = torch.get_rng_state()
    first, same, other = (add_lora(causal(), LoraSettings(rank=2), seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    updates = [name for name in first if ".lora_A." in name]
    assert all(torch.equal(first[name], same[name]) for name in updates)
    assert not any(torch.equal(first[name], other[name]) for name in updates)


def test_only_the_named_matrices_get_an_update_with_the_asked_strength() -> None:
    model = add_lora(causal(), LoraSettings(rank=3, alpha=6.0, target_modules=("q_proj", "down_proj")))
    assert {name.split(".")[-4] for name in trained(model)} == {"q_proj", "down_proj"}
    layer = unwrapped(model).model.layers[0].self_attn.q_proj
    assert (layer.r["default"], layer.scaling["default"]) == (3, 2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            LoraSettings(target_modules=("q_prj",)),
            "student.lora.target_modules: LlamaForCausalLM has no module 'q_prj'.",
        ),
        (
            LoraSettings(modules_to_save=("heads",)),
            "student.lora.modules_to_save: LlamaForCausalLM has no module 'heads'.",
        ),
        (LoraSettings(modules_to_save=("embed_tokens",)), "'model.embed_tokens' shares its weight between"),
        (LoraSettings(modules_to_save=("lm_head",)), "'lm_head' shares its weight between the embeddings and the head"),
        (LoraSettings(target_modules=("q_proj", "lm_head")), "'lm_head' shares its weight"),
    ],
)
def test_A06_what_would_untie_the_head_or_change_nothing_is_refused(settings: LoraSettings, message: str) -> None:
    student = causal(tie_word_embeddings=True)
    keys = set(student.state_dict())
    with pytest.raises(RecipeError, match=re.escape(message)):
        add_lora(student, settings)
    assert set(student.state_dict()) == keys


def test_A06_untied_embeddings_can_be_trained_whole() -> None:
    student = causal(tie_word_embeddings=False)
    batch = tiny_batch(student)
    before = student.model.embed_tokens.weight.clone()
    model = add_lora(student, LoraSettings(rank=2, modules_to_save=("embed_tokens", "lm_head")))
    expected = logits(moved(model), batch)
    merged = merge_lora(model)
    assert not torch.equal(merged.model.embed_tokens.weight, before)
    assert_close(logits(merged, batch), expected)


def test_A06_new_tokens_with_frozen_embeddings_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger=add_lora.__module__):
        saved = LoraSettings(rank=2, modules_to_save=("embed_tokens", "lm_head"))
        add_lora(causal(tie_word_embeddings=False), saved, new_tokens=[60])
        add_lora(causal(), LoraSettings(rank=2))
        assert not caplog.messages
        add_lora(causal(), LoraSettings(rank=2), new_tokens=[60, 59])
    assert caplog.messages == [
        "student.lora: 2 tokens are new to the student (59, 60), and LoRA leaves their embeddings as they are. "
        "Add 'embed_tokens' to student.lora.modules_to_save."
    ]


def test_merging_wants_an_adapter_over_weights_that_can_take_it() -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape("LlamaForCausalLM has no adapter. Give what add_lora")):
        merge_lora(causal())
    model = add_lora(causal(), LoraSettings(rank=2))
    unwrapped(model).is_quantized = True
    with pytest.raises(UnsupportedModelError, match="its weights would round the updates away"):
        merge_lora(model)


@with_prompts
def test_unwrapped_is_the_model_with_its_adapters_at_work() -> None:
    student = causal()
    batch = tiny_batch(student)
    assert unwrapped(student) is student
    model = moved(add_lora(student, LoraSettings(rank=2)))
    assert unwrapped(model) is student
    assert torch.equal(logits(student, batch), logits(model, batch))
    with pytest.raises(
        UnsupportedModelError, match="Linear is neither a model of transformers nor one with an adapter"
    ):
        unwrapped(nn.Linear(2, 2))
    prompts = peft.get_peft_model(causal(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedModelError, match="PeftModelForCausalLM is neither"):
        unwrapped(prompts)


def test_a_model_with_adapters_is_scored_as_its_merged_self() -> None:
    student = causal()
    batch = tiny_batch(student)
    model = moved(add_lora(student, LoraSettings(rank=2)))
    inside = score_units(model, [batch], layer=[1, -1])
    for one, two in zip(inside, score_units(merge_lora(model), [batch], layer=[1, -1]), strict=True):
        assert_close(one.values, two.values, dtype=torch.float32)


def test_A07_the_first_backward_tells_which_updates_are_not_reached() -> None:
    model = add_lora(causal(), LoraSettings(rank=2))
    batch = tiny_batch(unwrapped(model))
    assert len(without_gradient(model)) == 14
    state = model(**batch, output_hidden_states=True).hidden_states[1]
    state.square().sum().backward()
    assert {name.split(".layers.")[1][0] for name in without_gradient(model)} == {"1"}
    model(**batch).loss.backward()
    assert without_gradient(model) == []


@pytest.fixture
def saved_adapter(tmp_path: Path) -> tuple[Path, dict[str, Tensor], Tensor]:
    """A saved adapter, a batch, and the logits of model and adapter."""
    model = moved(add_lora(causal(), LoraSettings(rank=2, target_modules=("q_proj", "down_proj"))))
    batch = tiny_batch(unwrapped(model))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", batch, logits(model, batch)


def test_a_teachers_adapter_is_merged_in_memory(saved_adapter: tuple[Path, dict[str, Tensor], Tensor]) -> None:
    folder, batch, expected = saved_adapter
    check_adapter("teacher.adapter", str(folder))
    teacher = causal()
    keys = set(teacher.state_dict())
    merged = load_adapter(teacher, str(folder))
    assert isinstance(merged, PreTrainedModel)
    assert (set(merged.state_dict()), merged.training) == (keys, False)
    assert_close(logits(merged, batch), expected)


def test_over_quantised_weights_an_adapter_runs_beside_them(
    saved_adapter: tuple[Path, dict[str, Tensor], Tensor],
) -> None:
    folder, batch, expected = saved_adapter
    teacher = causal()
    before = teacher.model.layers[0].self_attn.q_proj.weight.clone()
    teacher.is_quantized = True
    found = load_adapter(teacher, str(folder))
    assert torch.equal(found.model.layers[0].self_attn.q_proj.weight, before)
    assert trained(found) == set()
    assert_close(logits(found, batch), expected)


def test_a_classifiers_adapter_brings_its_head(tmp_path: Path) -> None:
    model = moved(add_lora(tiny_model("bert"), LoraSettings(rank=2)))
    batch = tiny_batch(tiny_model("bert"))
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    other_head = tiny_model("bert")
    nn.init.zeros_(other_head.classifier.weight)
    assert_close(logits(load_adapter(other_head, str(tmp_path)), batch), expected)


@pytest.mark.parametrize(
    "teacher",
    [
        pytest.param({"num_hidden_layers": 1}, id="fewer blocks"),
        pytest.param({"num_hidden_layers": 3}, id="more blocks"),
        pytest.param({"intermediate_size": 40}, id="another width"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    teacher: dict[str, int], saved_adapter: tuple[Path, dict[str, Tensor], Tensor]
) -> None:
    other = tiny_model("llama", "causal", **{"num_hidden_layers": 2, **teacher})
    with pytest.raises(
        UnsupportedModelError,
        match=r"teacher\.adapter: (cannot load the adapter|.* another model|.* does not fit teacher)",
    ):
        load_adapter(other, str(saved_adapter[0]))


@with_prompts
def test_an_adapter_that_is_not_there_or_changes_no_weight_is_refused(tmp_path: Path) -> None:
    for source in ("owner/none", str(tmp_path)):
        expected = f"teacher.adapter: cannot load the adapter '{source}': "
        with pytest.raises(UnsupportedModelError, match=re.escape(expected)) as caught:
            load_adapter(causal(), source)
        assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedModelError, match=r"holds no adapter_config\.json that names a peft_type"):
        check_adapter("teacher.adapter", str(tmp_path))
    check_adapter("teacher.adapter", "owner/none")
    prompts = peft.get_peft_model(causal(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompts.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="is of kind PROMPT_TUNING, which adds positions and no weights"):
        check_adapter("teacher.adapter", str(tmp_path))
    with pytest.raises(UnsupportedModelError, match="is of kind PROMPT_TUNING, which adds positions and no weights"):
        load_adapter(causal(), str(tmp_path))


def test_without_peft_the_error_holds_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    expected = "student.lora: an adapter needs the package 'peft'. Run: pip install 'flexkd[lora]'"
    with pytest.raises(MissingDependencyError, match=re.escape(expected)):
        add_lora(causal(), LoraSettings())
