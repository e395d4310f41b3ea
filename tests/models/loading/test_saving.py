"""What transformers would not save is repaired or refused by name, and the number type on disk is the one asked for."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from flexkd.errors import UnsupportedModelError
from flexkd.evaluate.generation import GenerationSettings, saved_settings
from flexkd.models.loading.saving import make_savable, round_weights, save_model
from flexkd.models.slicing.student import slice_student
from tests.tiny import tiny_batch, tiny_model


def test_R04_settings_that_count_for_nothing_are_taken_out_and_named(tmp_path: Path) -> None:
    model = tiny_model("llama", "causal")
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 7], temperature=0.7, length_penalty=2.0, output_scores=True, max_new_tokens=5
    )
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path)
    (note,) = make_savable(model, where="model")
    assert "(temperature 0.7, length_penalty 2.0, output_scores True)" in note
    model.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.eos_token_id, saved.max_new_tokens, saved.temperature) == ([2, 7], 5, None)
    assert make_savable(model, where="model") == []


def test_R04_the_advice_of_the_note_keeps_the_settings() -> None:
    model = tiny_model("llama", "causal")
    model.generation_config = GenerationConfig(
        temperature=0.7, length_penalty=2.0, output_scores=True, do_sample=True, num_beams=2,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert make_savable(model, where="model") == []
    assert model.generation_config.temperature == 0.7


def test_R04_a_published_config_is_saved_back_as_it_is_and_so_is_that_of_a_slice(tmp_path: Path) -> None:
    teacher = tiny_model("llama", "causal")
    teacher.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, "temperature": 0.7}), encoding="utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in (loaded, slice_student(loaded, hidden_size=16)):
        assert make_savable(model, where="model") == []
        assert model.generation_config.temperature == 0.7
        model.save_pretrained(tmp_path / "again")
    # Changed in code, it is saved no more, and a slice inherits that.
    loaded.generation_config.max_new_tokens = 9
    student = slice_student(loaded, hidden_size=16)
    with pytest.raises(ValueError, match="temperature"):
        student.save_pretrained(tmp_path / "again")
    assert len(make_savable(student, where="model")) == 1
    student.save_pretrained(tmp_path / "again")


def _set_in_config(model: PreTrainedModel) -> None:
    model.config.temperature = 0.3


def _too_many_answers(model: PreTrainedModel) -> None:
    model.generation_config.num_return_sequences = 3


def _no_json(model: PreTrainedModel) -> None:
    model.generation_config.strange = object()


def _shared(model: PreTrainedModel) -> None:
    layers = model.get_submodule("model.layers")
    layers[1].mlp = layers[0].mlp  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set_in_config, "transformers will not save its config: Some generation parameters"),
        (_too_many_answers, "transformers will not save its generation_config: Greedy methods"),
        (_no_json, "transformers will not save its generation_config: Object of type object is not JSON serializable"),
        (_shared, "transformers will not save its weights: The weights trying to be saved contained shared tensors"),
    ],
)
def test_R04_what_cannot_be_saved_is_refused_before_training(
    change: Callable[[PreTrainedModel], None], said: str, tmp_path: Path
) -> None:
    model = tiny_model("llama", "causal")
    change(model)
    with pytest.raises(UnsupportedModelError, match=rf"^teacher\.model: {re.escape(said)}.* before training\.$"):
        make_savable(model, where="teacher.model")
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "t5", "bart", "bert", "gpt2"])
def test_R04_models_that_are_saved_every_day_pass(model_type: str) -> None:
    task = {"bert": "classification", "t5": "seq2seq", "bart": "seq2seq"}.get(model_type, "causal")
    model = tiny_model(model_type, task)  # type: ignore[arg-type]
    before = model.generation_config if model.can_generate() else None
    assert make_savable(model, where="model") == []
    assert not model.can_generate() or model.generation_config is before


def test_R04_every_student_gets_settings_that_are_saved(tmp_path: Path) -> None:
    model = tiny_model("llama", "causal")
    for settings in (
        GenerationSettings(4),
        GenerationSettings(4, length_penalty=2.0, temperature=0.5, top_p=0.5, top_k=3),
        GenerationSettings(4, num_beams=3, length_penalty=2.0),
        GenerationSettings(4, do_sample=True, temperature=0.5, top_p=0.5, top_k=3),
    ):
        saved_settings(model, settings, [2, 7]).save_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "bart"])
def test_R04_weights_on_disk_have_the_number_type_that_the_config_names(
    model_type: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(model_type, "seq2seq" if model_type == "bart" else "causal")
    names = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    tables = {name: buffer.clone() for name, buffer in model.named_buffers() if name in names}
    round_weights(model, torch.bfloat16)
    batch = {key: value for key, value in tiny_batch(model).items() if key != "labels"}
    batch |= {"decoder_input_ids": batch["input_ids"]} if model_type == "bart" else {}
    before = model(**batch).logits
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert capfd.readouterr() == ("", ""), "transformers has a bar of its own"
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    # The model goes on in float32 with the very weights that were saved, and its tables as they were.
    assert (model.dtype, model.config.dtype) == (torch.float32, torch.float32)
    assert torch.equal(model(**batch).logits, before)
    assert all(torch.equal(buffer, tables[name]) for name, buffer in model.named_buffers() if name in names)
    assert torch.equal(type(model).from_pretrained(tmp_path, dtype=torch.float32)(**batch).logits, before)


def test_R04_a_model_without_a_generation_config_is_refused_and_the_advice_works() -> None:
    model = tiny_model("llama", "causal")
    model.generation_config = None
    with pytest.raises(UnsupportedModelError, match=r"its generation_config is None.*from_model_config"):
        make_savable(model, where="model")
    model.generation_config = GenerationConfig.from_model_config(model.config)
    assert make_savable(model, where="model") == []
