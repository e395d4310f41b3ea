"""Weights that are missing, misnamed, of another shape or not read: refused by name, wherever a model is loaded."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexkd.errors import UnsupportedModelError
from flexkd.models.loading.language import load_language_model
from flexkd.models.loading.loaded_weights import is_head
from flexkd.models.loading.pretrained import load_classifier
from flexkd.models.loading.stored_weights import foreign_prefix, stored_shapes
from tests.tiny import TinyTask, tiny_model


class Labels(NamedTuple):
    names: tuple[str, ...] = ("a", "b", "c")
    problem: str = "single_label"


RENAMED = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "model.": lambda name: f"model.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
}


def saved(folder: Path, model_type: str = "bert", task: TinyTask = "classification", **config: Any) -> Path:
    tiny_model(model_type, task, **config).save_pretrained(folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """The same folder with other weights under its config."""
    file = folder / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(file).items()}
    save_file(change(weights), file, {"format": "pt"})
    return folder


def rename(folder: Path, name: Callable[[str], str]) -> Path:
    return rewrite(folder, lambda weights: {name(key): value for key, value in weights.items()})


def without(folder: Path, pattern: str) -> Path:
    return rewrite(
        folder, lambda weights: {key: value for key, value in weights.items() if not re.search(pattern, key)}
    )


def configured(folder: Path, **entries: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **entries}), encoding="utf-8")
    return folder


def refused(load: Callable[..., Any], folder: Path, **options: Any) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        load(str(folder), where="teacher.model", **options)
    message = str(caught.value)
    assert message.startswith("teacher.model: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("prefix", sorted(RENAMED))
def test_R01_weights_behind_a_prefix_are_refused_and_the_advice_works(prefix: str, tmp_path: Path) -> None:
    folder = rename(saved(tmp_path), RENAMED[prefix])
    message = refused(load_classifier, folder, labels=Labels() if prefix == "module." else None)
    assert "lacks 73 weights (bert.embeddings.LayerNorm.bias, bert.embeddings.LayerNorm.weight, " in message
    assert f"its own are behind '{prefix}'" in message
    exec(message[message.index("from safetensors") :], {"FILE": folder / "model.safetensors"})
    model, fresh = load_classifier(str(folder))
    assert fresh == []
    stored = tiny_model("bert").state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def test_R01_blocks_that_were_compiled_one_by_one_are_named_too(tmp_path: Path) -> None:
    def inside(name: str) -> str:
        return re.sub(r"(layer\.\d+)\.", r"\1._orig_mod.", name)

    folder = rename(saved(tmp_path), inside)
    message = refused(load_classifier, folder)
    assert "its own are behind '_orig_mod.', as torch.compile leaves them" in message
    exec(message[message.index("from safetensors") :], {"FILE": folder / "model.safetensors"})
    load_classifier(str(folder))


def test_R01_what_is_inside_a_wrapper_is_saved_under_its_own_names(tmp_path: Path) -> None:
    """The other half of the advice, as `model.module`."""
    nn.DataParallel(tiny_model("bert")).module.save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path))[1] == []


@pytest.mark.parametrize(("model_type", "task"), [("llama", "causal"), ("gpt2", "causal"), ("t5", "seq2seq")])
def test_R01_language_models_say_the_prefix_and_count_no_ties(model_type: str, task: TinyTask, tmp_path: Path) -> None:
    folder = rename(saved(tmp_path, model_type, task), RENAMED["module."])
    count = len(load_file(folder / "model.safetensors"))
    assert f"lacks {count} weights (" in refused(load_language_model, folder)


def test_R01_a_body_alone_behind_a_prefix_is_seen(tmp_path: Path) -> None:
    tiny_model("bert").bert.save_pretrained(tmp_path)
    message = refused(load_classifier, rename(tmp_path, RENAMED["_orig_mod."]), labels=Labels())
    assert "its own are behind '_orig_mod.'" in message


def test_R01_a_pickled_checkpoint_goes_through_the_same_rule(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    weights = load_file(folder / "model.safetensors")
    torch.save({f"module.{name}": value for name, value in weights.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "its own are behind 'module.'" in refused(load_classifier, folder)


@pytest.mark.parametrize(
    ("model_type", "task", "key", "stored", "difference"),
    [
        ("bert", "classification", "num_hidden_layers", 4, 2),
        ("bert", "classification", "num_hidden_layers", 4, -1),
        ("gpt2", "causal", "n_layer", 4, 2),
        ("gpt2", "causal", "n_layer", 4, -1),
        ("t5", "seq2seq", "num_decoder_layers", 4, 2),
        ("t5", "seq2seq", "num_layers", 5, -1),
        ("bart", "seq2seq", "encoder_layers", 3, -1),
        ("falcon", "causal", "num_hidden_layers", 4, 2),
    ],
)
def test_R01_a_config_of_other_blocks_is_refused_and_the_advice_works(
    model_type: str, task: TinyTask, key: str, stored: int, difference: int, tmp_path: Path
) -> None:
    load = load_classifier if task == "classification" else load_language_model
    folder = configured(saved(tmp_path, model_type, task), **{key: stored + difference})
    message = refused(load, folder)
    assert (
        f"{key} of its config is {stored + difference}, its weights have {stored} blocks. Set {key}: {stored}"
        in message
    )
    assert ("weights too many (" if difference < 0 else "lacks ") in message
    load(str(configured(folder, **{key: stored})))


def test_R01_lists_with_an_entry_for_each_block_are_named_in_the_advice(tmp_path: Path) -> None:
    folder = saved(tmp_path, "gemma2", "causal")
    kinds = json.loads((folder / "config.json").read_text(encoding="utf-8"))["layer_types"]
    message = refused(load_language_model, configured(folder, num_hidden_layers=6, layer_types=[*kinds, *kinds[:2]]))
    assert "Set num_hidden_layers: 4 and give layer_types 4 entries in config.json" in message
    load_language_model(str(configured(folder, num_hidden_layers=4, layer_types=kinds)))


@pytest.mark.parametrize("labels", [None, Labels()], ids=["own head", "new head"])
def test_R01_single_weights_of_the_body_are_refused_as_many(labels: Labels | None, tmp_path: Path) -> None:
    message = refused(load_classifier, without(saved(tmp_path), r"layer\.[12]\.output\.dense"), labels=labels)
    names = "bert.encoder.layer.1.output.dense.bias, bert.encoder.layer.1.output.dense.weight, "
    assert f"lacks 4 weights of a BertForSequenceClassification ({names}" in message


@pytest.mark.parametrize("labels", [None, Labels()], ids=["own head", "new head"])
def test_R01_a_body_of_another_width_is_never_made_anew(labels: Labels | None, tmp_path: Path) -> None:
    message = refused(load_classifier, configured(saved(tmp_path), intermediate_size=64), labels=labels)
    assert "12 weights of " in message
    assert "bert.encoder.layer.0.intermediate.dense.bias is [48] in the file and [64] by the config" in message
    folder = configured(saved(tmp_path / "text", "llama", "causal"), intermediate_size=64)
    assert "is [32, 48] in the file and [32, 64] by the config" in refused(load_language_model, folder)


def no_biases(folder: Path) -> Path:
    """A checkpoint with biases under a config that has none."""
    return rewrite(
        saved(folder, "llama", "causal"),
        lambda weights: {**weights, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
    )


def test_R01_weights_that_the_config_leaves_out_of_the_body_are_refused(tmp_path: Path) -> None:
    message = refused(load_language_model, no_biases(tmp_path))
    assert "has 1 weights that its config leaves out (model.layers.0.self_attn.q_proj.bias), and it would" in message


@pytest.mark.parametrize(
    "name",
    ["vision_tower.patch.weight", "model.vision_tower.patch.weight", "mtp.fc.weight", "score.weight"],
)
def test_R01_weights_beside_the_body_are_named_and_left_alone(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = rewrite(saved(tmp_path, "llama", "causal"), lambda weights: {**weights, name: torch.ones(2)})
    load_language_model(str(folder), where="student.model")
    assert caplog.messages == [f"student.model: 1 weights of '{folder}' are not used ({name})"]


def test_R01_tables_of_earlier_versions_do_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables = {
        "transformer.h.0.attn.bias": torch.ones(2),
        "transformer.h.0.attn.masked_bias": torch.ones(1),
        "transformer.h.1.attn.rotary_emb.inv_freq": torch.ones(1),
    }
    load_language_model(str(rewrite(saved(tmp_path, "gpt2", "causal"), lambda weights: {**weights, **tables})))
    assert caplog.messages == []


HEADS = {
    "bert": ("bert.pooler.dense.weight", "classifier.weight"),
    "roberta": ("classifier.dense.weight", "classifier.out_proj.weight"),
    "distilbert": ("pre_classifier.weight", "classifier.weight"),
    "deberta-v2": ("pooler.dense.weight", "classifier.weight"),
    "modernbert": ("head.dense.weight", "head.norm.weight", "classifier.weight"),
    "albert": ("albert.pooler.weight", "classifier.weight"),
    "llama": ("score.weight",),
    "gpt2": ("score.weight",),
}


@pytest.mark.parametrize("model_type", sorted(HEADS))
def test_R01_a_head_is_all_that_comes_after_the_last_state(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    heads = {name for name, _ in model.named_parameters() if is_head(model, name) and name.endswith("weight")}
    assert heads == set(HEADS[model_type])
    model.save_pretrained(tmp_path)
    pattern = "|".join(re.escape(name) for name, _ in model.named_parameters() if is_head(model, name))
    folder = without(tmp_path, f"^({pattern})$")
    message = refused(load_classifier, folder)
    assert "weights of its head (" in message
    assert "Add teacher.fine_tune: {} to train one first" in message
    assert set(load_classifier(str(folder), Labels())[1]) >= heads


def test_R01_a_head_that_is_to_be_trained_may_be_new_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = without(saved(tmp_path), "pooler")
    assert "lacks 2 weights of its head (bert.pooler.dense.bias" in refused(load_classifier, folder)
    _, fresh = load_classifier(str(folder), Labels(), where="student.model")
    assert fresh == ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages == [
        f"student.model: '{folder}' brings no head for this task: 2 weights are new and will be trained "
        "(bert.pooler.dense.bias, bert.pooler.dense.weight)"
    ]


def test_R01_a_head_of_another_size_is_an_error_where_it_is_not_trained(tmp_path: Path) -> None:
    folder = configured(saved(tmp_path), id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    assert "classifier.bias is [3] in the file and [2] by the config. Correct id2label" in refused(
        load_classifier, folder
    )
    assert load_classifier(str(folder), Labels(("a", "b")))[1] == ["classifier.bias", "classifier.weight"]


def test_R01_an_adapters_folder_is_no_classifier(tmp_path: Path) -> None:
    (saved(tmp_path) / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    assert "holds an adapter" in refused(load_classifier, tmp_path)


def test_R01_missing_and_damaged_files_are_named_by_the_headers(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path, max_shard_size="20KB")
    shapes = stored_shapes(tmp_path, where="x")
    assert shapes is not None
    assert shapes["classifier.weight"] == (3, 32)
    assert len(shapes) == 73
    shards = sorted(tmp_path.glob("*.safetensors"))
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path, damaged)
    (damaged / shards[1].name).write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(UnsupportedModelError, match=rf"x: cannot read '.*{shards[1].name}': .*save the file again"):
        stored_shapes(damaged, where="x")
    (damaged / shards[1].name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UnsupportedModelError, match="a pointer of Git LFS and holds no weights: run git lfs pull"):
        stored_shapes(damaged, where="x")
    shards[1].unlink()
    with pytest.raises(UnsupportedModelError, match=rf"lacks 1 of the {len(shards)} files .* \({shards[1].name}\)"):
        stored_shapes(tmp_path, where="x")


def test_R01_names_that_share_no_prefix_have_none() -> None:
    assert foreign_prefix(["a.weight", "b.weight"], ["c.weight"]) is None
    assert foreign_prefix([], ["c.weight"]) is None
    assert foreign_prefix(["x.c.weight", "x.d.weight"], ["c.weight", "d.weight"]) == "x."


def gamma(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize(
    ("model_type", "name", "beside"),
    [
        ("bert", gamma, ("cls.predictions.bias", "cls.seq_relationship.weight", "bert.embeddings.position_ids")),
        ("roberta", str, ("roberta.pooler.dense.weight", "lm_head.dense.weight", "roberta.embeddings.position_ids")),
        ("distilbert", str, ("vocab_transform.weight", "vocab_layer_norm.bias")),
        ("electra", str, ("discriminator_predictions.dense.weight",)),
        ("deberta-v2", str, ("mask_predictions.dense.weight", "lm_predictions.lm_head.bias")),
        ("gpt2", lambda name: name.removeprefix("transformer."), ("h.0.attn.bias", "lm_head.weight")),
    ],
)
def test_R01_checkpoints_as_they_lie_on_the_hub_are_taken(
    model_type: str, name: Callable[[str], str], beside: tuple[str, ...], tmp_path: Path
) -> None:
    folder = rename(without(saved(tmp_path, model_type), "^(classifier|score|pre_classifier)"), name)
    rewrite(folder, lambda weights: {**weights, **{other: torch.ones(2) for other in beside}})
    model, fresh = load_classifier(str(folder), Labels())
    assert all(is_head(model, weight) for weight in fresh)
    body = model.base_model_prefix
    expected = {key: value for key, value in tiny_model(model_type).state_dict().items() if key.startswith(f"{body}.")}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in expected.items())
