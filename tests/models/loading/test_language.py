"""Language models: loaded whole or refused, never with weights that nobody trained; quantised ones too."""

import contextlib
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from flexkd.errors import MissingDependencyError, RecipeError, UnsupportedModelError
from flexkd.models.loading.language import fresh_language_model, load_language_model
from flexkd.models.loading.quantized_weights import quantization_settings
from flexkd.scoring.units import score_units
from tests.tiny import tiny_batch, tiny_model


def llama(**changes: Any) -> PreTrainedModel:
    return tiny_model("llama", "causal", num_hidden_layers=2, **changes)


def test_language_models_come_back_as_they_were_saved(tmp_path: Path) -> None:
    config = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    t5 = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **config))
    for model in (llama(tie_word_embeddings=True), tiny_model("gpt2", "causal", n_embd=32, n_layer=1, n_head=4), t5):
        folder = tmp_path / model.config.model_type
        model.to(torch.bfloat16).save_pretrained(folder)
        loaded = load_language_model(str(folder))
        assert (type(loaded), loaded.dtype, loaded.training) == (type(model), torch.float32, False)
        assert load_language_model(str(folder), dtype=None).dtype == torch.bfloat16
        assert all(torch.equal(value.float(), loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_without_its_head_is_refused_and_unused_weights_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "classifier")
    expected = "lacks 1 weights of its head (lm_head.weight), and random ones would take their place. Give a model that"
    with pytest.raises(UnsupportedModelError, match=re.escape(expected)):
        load_language_model(str(tmp_path / "classifier"))
    tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    load_language_model(str(tmp_path / "tied"), where="student.model")
    assert caplog.messages == [f"student.model: 1 weights of '{tmp_path / 'tied'}' are not used (score.weight)"]


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_an_encoder_generates_no_text(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match=r"teacher\.model: .*(is an encoder|Unrecognized configuration class)"
    ):
        load_language_model(str(tmp_path), where="teacher.model")


def test_an_adapters_folder_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=r"holds an adapter\. Give the model that it was trained on"):
        load_language_model(str(tmp_path))


def test_a_fresh_language_model_has_the_changed_sizes_and_random_weights(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    changes = {"hidden_size": 16, "num_hidden_layers": 1}
    state = torch.get_rng_state()
    first, same, other = (fresh_language_model(str(tmp_path), changes, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.config.hidden_size, len(first.model.layers), first.training) == (16, 1, False)
    assert torch.equal(first.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    with pytest.raises(UnsupportedModelError, match=r"student\.model: .* Change the sizes or the config."):
        fresh_language_model(str(tmp_path), {"hidden_size": 15, "num_attention_heads": 4, "head_dim": None})


def test_quantised_teachers_need_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    llama().save_pretrained(tmp_path)
    expected = "'4bit' needs the package 'bitsandbytes'. Run: pip install 'flexkd[quantized]'"
    with pytest.raises(MissingDependencyError, match=re.escape(expected)):
        load_language_model(str(tmp_path), quantization="4bit", where="teacher.quantization")


def test_quantizations_are_those_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkd.models.loading.quantized_weights.require_package", lambda *names: None)
    four, eight = quantization_settings("4bit"), quantization_settings("8bit")
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == (True, "nf4", torch.bfloat16)
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    with pytest.raises(
        RecipeError, match=re.escape("teacher.quantization: unknown quantization '5bit'. Known: 4bit, 8b")
    ):
        quantization_settings("5bit")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_F21_a_quantised_teacher_scores_as_its_plain_self_nearly(quantization: Any, tmp_path: Path) -> None:
    # Kernels of 4 bits want multiples of 32.
    sizes = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "intermediate_size": 128}
    teacher = tiny_model("llama", "causal", **sizes)
    batch = tiny_batch(teacher)
    teacher.save_pretrained(tmp_path)
    packed = load_language_model(str(tmp_path), quantization=quantization, dtype=None)
    assert packed.is_quantized
    scores = torch.stack([score_units(model, [batch]).values for model in (teacher, packed)])
    assert torch.corrcoef(scores)[0, 1] > 0.99
    below: list[Any] = []
    with contextlib.suppress(UnsupportedModelError):  # as where a CPU's 4-bit kernels have no backward
        below = [score_units(model, [batch], layer=2).values for model in (teacher, packed)]
    assert not below or torch.corrcoef(torch.stack(below))[0, 1] > 0.9
