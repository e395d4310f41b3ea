"""What the headers of weights tell: a check refuses, in the same words, what loading would refuse."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexkd.errors import FlexKDError, UnsupportedModelError
from flexkd.facts.families.table import FAMILIES
from flexkd.models.loading.adapters import LoraSettings, add_lora
from flexkd.models.loading.language import load_language_model
from flexkd.models.loading.pretrained import load_classifier
from flexkd.preflight import preflight
from flexkd.tasks.classifiers import classifying_teacher
from tests.job_files import job, text_job, write_tokenizer
from tests.tiny import tiny_model

PLAIN = {"teacher__fine_tune": None, "training__precision": "float32", "teacher__precision": "float32"}
NO_SHAPE = {"student__hidden_size": None, "student__num_layers": None}
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    job(folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(file).items()}
    save_file(change(weights), file, {"format": "pt"})


def prefixed(prefix: str) -> Change:
    return lambda folder: rewrite(folder, lambda weights: {f"{prefix}{name}": value for name, value in weights.items()})


def dropped(pattern: str) -> Change:
    return lambda folder: rewrite(
        folder, lambda weights: {name: weights[name] for name in weights if not re.search(pattern, name)}
    )


def configured(**entries: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **entries}), encoding="utf-8")

    return change


def model(folder: Path, change: Change, model_type: str = "bert") -> str:
    tiny_model(model_type, num_labels=2).save_pretrained(folder)
    write_tokenizer(folder)
    change(folder)
    return str(folder)


def problems(recipe: Any) -> list[str]:
    return preflight(recipe).problems


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(prefixed("_orig_mod."), id="compiled"),
        pytest.param(prefixed("module."), id="parallel"),
        pytest.param(prefixed("model."), id="framework"),
        pytest.param(prefixed("base_model.model."), id="peft"),
        pytest.param(configured(num_hidden_layers=6), id="more blocks"),
        pytest.param(configured(num_hidden_layers=3), id="fewer blocks"),
    ],
)
def test_R01_a_check_refuses_what_loading_refuses_in_the_same_words(
    change: Change, material: Path, tmp_path: Path
) -> None:
    source = model(tmp_path / "teacher", change)
    with pytest.raises(UnsupportedModelError) as caught:
        load_classifier(source, where="teacher.model")
    assert problems(job(material, **PLAIN, teacher__model=source)) == [str(caught.value)]
    # Fine-tuning would train the random body as the teacher.
    assert problems(job(material, teacher__model=source)) == [str(caught.value)]
    start = {"student__start": "pretrained", "student__model": source}
    expected = str(caught.value).replace("teacher.model", "student.model")
    assert problems(job(material, **PLAIN, **NO_SHAPE, **start)) == [expected]


def test_R01_language_models_are_checked_alike(tmp_path: Path) -> None:
    recipe = text_job(tmp_path, "t5", **PLAIN)
    assert problems(recipe) == []
    configured(num_layers=7)(tmp_path / "teacher")
    with pytest.raises(UnsupportedModelError) as caught:
        load_language_model(str(tmp_path / "teacher"), where="teacher.model")
    assert problems(recipe) == [str(caught.value)]
    assert "num_layers of its config is 7, its weights have 5 blocks" in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "pattern", "named"),
    [("bert", "pooler", "bert.pooler.dense"), ("distilbert", "classifier", "classifier"), ("llama", "score", "score")],
)
def test_R01_a_head_that_is_not_in_the_files_is_refused_unless_it_is_trained(
    model_type: str, pattern: str, named: str, material: Path, tmp_path: Path
) -> None:
    source = model(tmp_path / "teacher", dropped(pattern), model_type)
    messages = problems(job(material, **PLAIN, teacher__model=source))
    assert len(messages) == 1
    assert re.match(rf"teacher\.model: '.*' lacks \d weights of its head \({re.escape(named)}.weight", messages[0])
    assert problems(job(material, teacher__model=source)) == []


def test_R01_a_head_of_another_size_than_its_config_is_refused(material: Path, tmp_path: Path) -> None:
    three = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    source = model(tmp_path / "teacher", configured(**three))
    assert "classifier.weight is [2, 32] in the file and [3, 32] by the config" in "".join(
        problems(job(material, **PLAIN, teacher__model=source))
    )


def test_R01_a_missing_shard_is_an_error_before_anything_is_loaded(material: Path, tmp_path: Path) -> None:
    source = model(tmp_path / "teacher", lambda folder: (folder / "model.safetensors").unlink())
    tiny_model("bert", num_labels=2).save_pretrained(source, max_shard_size="20KB")
    shard = sorted(Path(source).glob("model-*.safetensors"))[2]
    shard.unlink()
    messages = problems(job(material, **PLAIN, teacher__model=source))
    assert len(messages) == 1
    assert f"files that model.safetensors.index.json names ({shard.name})" in messages[0]


def headless(folder: Path) -> None:
    """The body that an adapter for classes is trained on, under the config that a body is saved with."""
    tiny_model("distilbert").distilbert.save_pretrained(folder)


def adapter(folder: Path, *, whole: tuple[str, ...] = ("pre_classifier", "classifier"), labels: int = 2) -> str:
    """A LoRA of a classifier whose head is trained whole, as PEFT saves it."""
    import peft

    base = tiny_model("distilbert", num_labels=labels)
    # Of a task of classes, PEFT keeps every module whose name ends in `classifier` or `score`.
    kind = "SEQ_CLS" if whole else None
    config = peft.LoraConfig(task_type=kind, target_modules=["q_lin"], modules_to_save=list(whole) or None, r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what PEFT still asks transformers for
        adapted = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(folder)
    return str(folder)


def test_R01_an_adapter_that_brings_the_head_of_a_headless_base_is_accepted(material: Path, tmp_path: Path) -> None:
    changes = {"teacher__model": model(tmp_path / "base", headless), "teacher__adapter": adapter(tmp_path / "adapter")}
    recipe = job(material, **PLAIN, **changes)
    assert problems(recipe) == []
    data = preflight(recipe).data
    teacher = classifying_teacher(recipe.teacher, data.labels)  # type: ignore[union-attr]
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for module in ("pre_classifier", "classifier"):
        expected = stored[f"base_model.model.{module}.weight"]
        assert torch.equal(teacher.get_parameter(f"{module}.weight"), expected)
    assert teacher.config.id2label == {0: "bad", 1: "good"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"whole": ()}, r"does not bring \d weights of the head that teacher\.model lacks \(classifier\."),
        ({"labels": 3}, r"classifier\.\w+ is \[3.*\] in the adapter and \[2.*\] in the model\."),
    ],
)
def test_R01_an_adapter_without_the_head_or_with_another_one_is_refused(
    options: dict[str, Any], message: str, material: Path, tmp_path: Path
) -> None:
    source = adapter(tmp_path / "adapter", **options)
    base = model(tmp_path / "base", headless)
    recipe = job(material, **PLAIN, teacher__model=base, teacher__adapter=source)
    result = preflight(recipe)
    assert len(result.problems) == 1
    assert re.search(message, result.problems[0]), result.problems
    assert result.problems[0].startswith("teacher.adapter: ")
    with pytest.raises(FlexKDError, match=message):
        classifying_teacher(recipe.teacher, result.data.labels)  # type: ignore[union-attr]


def test_R01_an_adapter_whose_file_lacks_the_head_that_it_names_is_refused(material: Path, tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "lora" in name}, file, {"format": "pt"})
    recipe = job(material, **PLAIN, teacher__model=model(tmp_path / "base", headless), teacher__adapter=source)
    result = preflight(recipe)
    assert "does not bring 2 weights of the head" in result.problems[0]
    with pytest.raises(UnsupportedModelError, match=r"teacher\.adapter: "):
        classifying_teacher(recipe.teacher, result.data.labels)  # type: ignore[union-attr]


def test_R01_an_empty_adapter_folder_is_refused_by_the_check(material: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    messages = problems(job(material, **PLAIN, teacher__adapter=str(tmp_path / "empty")))
    assert len(messages) == 1
    assert "holds no adapter_config.json that names a peft_type" in messages[0]


def test_R01_a_lora_of_our_own_goes_onto_its_base(material: Path, tmp_path: Path) -> None:
    recipe = job(material, **PLAIN, teacher__adapter=str(tmp_path))
    add_lora(load_classifier(recipe.teacher.model)[0], LoraSettings(rank=2)).save_pretrained(tmp_path)
    assert problems(recipe) == []


def renamed(rename: Callable[[str], str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {rename(name): value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: f"module.{name}", "its own are behind 'module.'"),
        (lambda name: name.replace("layer.0", "layer.9"), "was trained on another model, or is not whole: "),
    ],
)
def test_R01_an_adapter_whose_names_are_not_those_of_its_base_is_refused(
    material: Path, tmp_path: Path, rename: Callable[[str], str], message: str
) -> None:
    source, base = adapter(tmp_path / "adapter"), model(tmp_path / "base", lambda _: None, "distilbert")
    recipe = job(material, **PLAIN, **NO_SHAPE, teacher__model=base, teacher__adapter=source)
    assert problems(recipe) == []
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(renamed(rename)({name: value.clone() for name, value in load_file(file).items()}), file)
    messages = problems(recipe)
    assert len(messages) == 1
    assert message in messages[0]


def test_R01_an_adapter_without_weights_is_refused(material: Path, tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    base = model(tmp_path / "base", headless)
    message = f"teacher.adapter: '{source}' holds no weights (as adapter_model.safetensors)"
    assert message in problems(job(material, **PLAIN, teacher__model=base, teacher__adapter=source))[0]


def test_R01_an_adapter_is_no_model_with_or_without_a_config(material: Path, tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter")
    recipe = job(material, **PLAIN, teacher__model=source)
    assert any("holds an adapter. Give the model that it was trained on" in problem for problem in problems(recipe))
    tiny_model("distilbert", num_labels=2).config.save_pretrained(source)
    with pytest.raises(UnsupportedModelError) as refusal:
        load_classifier(source, where="teacher.model")
    assert str(refusal.value) in problems(recipe)


@pytest.mark.parametrize("name", ["weights.safetensors", "training_args.bin", "model-00001-of-00002.safetensors"])
def test_R01_files_that_no_loader_looks_for_are_no_weights(material: Path, tmp_path: Path, name: str) -> None:
    source = model(tmp_path / "model", lambda folder: None)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / name)
    messages = problems(job(material, **PLAIN, **NO_SHAPE, teacher__model=source))
    assert messages == [
        f"teacher.model: '{source}' holds no weights (as model.safetensors), only {name}. Give the folder of a saved "
        "model."
    ]


def test_R01_a_shard_that_lacks_what_its_index_names_is_refused(material: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny_model("bert", num_labels=2).save_pretrained(source, max_shard_size="40KB")
    write_tokenizer(source)
    recipe = job(material, **PLAIN, **NO_SHAPE, teacher__model=str(source))
    assert problems(recipe) == []
    shard = sorted(source.glob("model-*.safetensors"))[1]
    weights = {name: value.clone() for name, value in load_file(shard).items()}
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights, shard, {"format": "pt"})
    assert f"lack 1 weights that model.safetensors.index.json names ({lost})" in problems(recipe)[0]


def test_R01_a_link_to_nothing_is_named_as_one(material: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    messages = problems(job(material, **PLAIN, teacher__model=str(tmp_path / "link")))
    assert messages == [
        f"teacher.model: '{tmp_path}/link' is a link to '{tmp_path}/moved', which is not there. Correct it."
    ]


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.classifies])
def test_R01_embeddings_of_another_vocabulary_than_the_config_are_refused(
    material: Path, tmp_path: Path, model_type: str
) -> None:
    source = model(tmp_path / "model", lambda _: None, model_type)
    recipe = job(material, **PLAIN, **NO_SHAPE, teacher__model=source)
    assert not any("do not fit its config" in problem for problem in problems(recipe))
    configured(vocab_size=64)(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="do not fit its config") as refusal:
        load_classifier(source, where="teacher.model")
    assert str(refusal.value) in problems(recipe)


def test_R01_weights_that_are_whole_numbers_are_refused_unless_a_config_tells_how(
    material: Path, tmp_path: Path
) -> None:
    source = model(tmp_path / "model", lambda _: None)
    rewrite(
        tmp_path / "model",
        lambda weights: {
            name: (10 * value).to(torch.int8) if "query.weight" in name else value for name, value in weights.items()
        },
    )
    recipe = job(material, **PLAIN, **NO_SHAPE, teacher__model=source)
    assert f"teacher.model: '{source}' stores 4 weights as whole numbers" in problems(recipe)[0]
    configured(quantization_config={"quant_method": "other"})(tmp_path / "model")
    assert not any("whole numbers" in problem for problem in problems(recipe))
