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
from flexkd.models.adapters import LoraSettings, add_lora
from flexkd.models.language import load_language_model
from flexkd.models.loading import load_classifier
from flexkd.preflight import preflight
from flexkd.train.teachers import classifying_teacher
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
    found = problems(job(material, **PLAIN, teacher__model=source))
    assert len(found) == 1
    assert re.match(rf"teacher\.model: '.*' lacks \d weights of its head \({re.escape(named)}.weight", found[0])
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
    found = problems(job(material, **PLAIN, teacher__model=source))
    assert len(found) == 1
    assert f"files that model.safetensors.index.json names ({shard.name})" in found[0]


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
    found = preflight(recipe).data
    teacher = classifying_teacher(recipe.teacher, found.labels, fine_tunes=True)  # type: ignore[union-attr]
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
    found = preflight(recipe)
    assert len(found.problems) == 1
    assert re.search(message, found.problems[0]), found.problems
    assert found.problems[0].startswith("teacher.adapter: ")
    with pytest.raises(FlexKDError, match=message):
        classifying_teacher(recipe.teacher, found.data.labels, fine_tunes=True)  # type: ignore[union-attr]


def test_R01_an_adapter_whose_file_lacks_the_head_that_it_names_is_refused(material: Path, tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "lora" in name}, file, {"format": "pt"})
    recipe = job(material, **PLAIN, teacher__model=model(tmp_path / "base", headless), teacher__adapter=source)
    found = preflight(recipe)
    assert "does not bring 2 weights of the head" in found.problems[0]
    with pytest.raises(UnsupportedModelError, match=r"teacher\.adapter: "):
        classifying_teacher(recipe.teacher, found.data.labels, fine_tunes=True)  # type: ignore[union-attr]


def test_R01_an_empty_adapter_folder_is_refused_by_the_check(material: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = problems(job(material, **PLAIN, teacher__adapter=str(tmp_path / "empty")))
    assert len(found) == 1
    assert "holds no adapter_config.json that names a peft_type" in found[0]


def test_R01_a_lora_of_our_own_goes_onto_its_base(material: Path, tmp_path: Path) -> None:
    recipe = job(material, **PLAIN, teacher__adapter=str(tmp_path))
    add_lora(load_classifier(recipe.teacher.model)[0], LoraSettings(rank=2)).save_pretrained(tmp_path)
    assert problems(recipe) == []
