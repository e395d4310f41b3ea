"""Folders of an earlier flexkd, made once by its own code: `python tests/old_folders/make.py CHECKOUT`.

CHECKOUT is a tree of the version that shall make them: these are of 0.1.0 at 8bb0c2d, the last one with a folder
`flexkd/train`. Everything is written beside this file, by the command line of that version, in float32 and on the CPU.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

HERE: Final = Path(__file__).resolve().parent
SHARD_BYTES: Final = 2000
"""Small, so that the cache that is interrupted has several files."""

_TINY: Final = {"hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 24}
_EXACT: Final[dict[str, Any]] = {"precision": "float32", "allow_weak": True}
_STUDENT: Final[dict[str, Any]] = {"hidden_size": 8, "num_layers": 1, "calibration_rows": 16}
_STEPS: Final[dict[str, Any]] = {
    "max_steps": 4,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "seed": 1,
    "logging_steps": 1,
    "evaluations": 2,
    "keep_checkpoints": 2,
    "precision": "float32",
}
_FINE_TUNE: Final[dict[str, Any]] = {"epochs": 2.0, "learning_rate": 1e-2, "batch_size": 16, "evaluations": 1}

RECIPES: Final[dict[str, dict[str, Any]]] = {
    "reviews": {
        "name": "reviews",
        "task": {"metric": "nll"},
        "data": {"train": "reviews.jsonl", "validation": 0.2, "test": 0.2, "max_length": 16},
        "teacher": {"model": "teacher", "cache": "never", **_EXACT},
        "student": _STUDENT,
        "training": _STEPS,
    },
    "summaries": {
        "name": "summaries",
        "task": {"type": "summarization"},
        "data": {
            "train": "texts.jsonl",
            "validation": 0.2,
            "test": 0.2,
            "max_length": 32,
            "max_answer_length": 6,
        },
        "generation": {"rows": 4, "examples": 2, "max_new_tokens": 6, "batch_size": 8},
        "teacher": {"model": "writer", "cache": "never", **_EXACT},
        "student": _STUDENT,
        "training": _STEPS,
    },
}
RUNS: Final[dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "finished": ("distill", "reviews", ()),
    "interrupted": ("distill", "reviews", ()),
    "scored": ("score", "reviews", ()),
    "cached": ("cache", "reviews", ("teacher.cache=always",)),
    "cached_int8": ("cache", "reviews", ("teacher.cache=always", "teacher.cache_storage=int8")),
    "cache_interrupted": ("cache", "reviews", ("teacher.cache=always",)),
    "comparison": (
        "compare",
        "reviews",
        (
            f"teacher.fine_tune={json.dumps(_FINE_TUNE)}",
            "training.max_steps=2",
            "compare.methods=[fine_tuning, flexkd]",
            "compare.seeds=[0, 1]",
        ),
    ),
    # Random weights end no answer.
    "answers": ("generate", "summaries", (f"teacher.fine_tune={json.dumps({**_FINE_TUNE, 'epochs': 30.0})}",)),
    "text": ("distill", "summaries", ()),
}
"""Run folder to the command, the recipe and the values that made it."""

MISSING_CELL: Final = "flexkd-1"

_CLASSIFICATION_KEYS: Final[dict[str, Any]] = {
    "name": "classification",
    "output": "runs/classification",
    "task": {"type": "classification", "problem": "single_label", "metric": "macro_f1"},
    "data": {
        "train": "reviews.jsonl",
        "validation": 0.25,
        "test": 0.15,
        "text": "body",
        "text_pair": "title",
        "label": "verdict",
        "label_names": ["bad", "good"],
        "where": {"lang": "en"},
        "max_length": 64,
        "max_rows": 500,
        "bad_rows": "skip",
        "unlabelled": "keep",
    },
    "teacher": {
        "model": "teacher",
        "tokenizer": "teacher",
        "fine_tune": {
            "epochs": 2.5,
            "max_minutes": 3.0,
            "batch_size": 24,
            "per_device_batch_size": 12,
            "learning_rate": 1e-4,
            "weight_decay": 0.02,
            "schedule": "cosine",
            "warmup_ratio": 0.1,
            "seed": 3,
            "gradient_checkpointing": True,
            "evaluations": 2,
        },
        "precision": "float32",
        "allow_weak": True,
        "cache": "folder",
        "cache_storage": "int8",
    },
    "student": {
        "start": "slice",
        "basis": "coordinates",
        "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.1, "target_modules": ["query", "value"]},
        "hidden_size": 8,
        "num_layers": 2,
        "num_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 12,
        "save_dtype": "bfloat16",
        "calibration_rows": 32,
    },
    "scores": {"target": "logit", "attribution": "gradient", "layer": [-1, 1], "rows": 100},
    "objective": {
        "task": {"weight": 0.5, "label_smoothing": 0.1},
        "logits": {"loss": "jensen_shannon", "weight": 2.0, "temperature": 3.0, "beta": 0.3},
        "features": {
            "loss": "correlation",
            "weight": 1.5,
            "positions": "supervised",
            "basis": "units",
            "mapping": "matched",
            "units": 6,
            "layer_map": {1: 1, -1: -1},
        },
    },
    "training": {
        "epochs": 1.5,
        "max_steps": 10,
        "batch_size": 16,
        "per_device_batch_size": 8,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "schedule": "constant",
        "warmup_ratio": 0.2,
        "max_grad_norm": 0.5,
        "seed": 7,
        "precision": "float32",
        "gradient_checkpointing": True,
        "compile": False,
        "evaluations": 3,
        "logging_steps": 5,
        "keep_checkpoints": 1,
        "report_to": ["tensorboard"],
        "dataloader_workers": 1,
        "resume": False,
    },
    "compare": {
        "methods": ["fine_tuning", "logit_kd", "flexkd"],
        "seeds": [1, 2],
        "search": {"training.learning_rate": [1e-3, 3e-3]},
    },
}
_TEXT: Final[dict[str, Any]] = {
    "chat": "auto",
    "date": "2025-03-04",
    "chat_variables": {"thinking": False},
    "markup": "tokens",
    "group": "thread",
    "max_length": 96,
    "max_answer_length": 24,
}
_SUMMARIZATION_KEYS: Final[dict[str, Any]] = {
    "name": "summarization",
    "task": {"type": "summarization", "problem": "generation", "metric": "rouge1"},
    "data": {
        **_TEXT,
        "train": "texts.jsonl",
        "document": "article",
        "summary": "highlights",
        "template": "{document} Summary :",
        "teacher_answers": "answers.jsonl",
    },
    "generation": {
        "rows": 50,
        "max_new_tokens": 12,
        "num_beams": 2,
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3,
        "length_penalty": 0.8,
        "batch_size": 4,
        "stemmer": False,
        "tokenizer": "unicode",
        "validation_rows": 20,
        "examples": 3,
    },
    "teacher": {"model": "writer", "adapter": "adapter"},
    "student": {"max_parameters": "10k"},
    "objective": {
        "logits": {"loss": "skew_kl", "alpha": 0.2, "top_k": 20},
        "features": {"mapping": "matched", "basis": "tangent", "coverage": 0.9},
    },
    "training": {"max_minutes": 2.0, "logit_chunk": 16, "packing": True},
}
_INSTRUCTION_KEYS: Final[dict[str, Any]] = {
    "name": "instruction",
    "task": {"type": "instruction"},
    "data": {**_TEXT, "train": "chats.jsonl", "prompt": "question", "context": "passage", "response": "reply"},
    "generation": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "seeds": [1, 2]},
    "teacher": {"model": "writer", "quantization": "4bit"},
    "student": {"start": "pretrained", "model": "small", "tokenizer": "small"},
}
EVERY_KEY: Final[dict[str, dict[str, Any]]] = {
    "classification": _CLASSIFICATION_KEYS,
    "summarization": _SUMMARIZATION_KEYS,
    "instruction": _INSTRUCTION_KEYS,
    "turns": {
        **_INSTRUCTION_KEYS,
        "name": "turns",
        "data": {**_TEXT, "train": "chats.jsonl", "messages": "turns"},
        "generation": {},
    },
    "derived": {**RECIPES["reviews"], "name": "derived", "student": {"size": 0.25}},
    "encoder_decoder": {
        **RECIPES["summaries"],
        "name": "encoder_decoder",
        "student": {"num_layers": 2, "num_encoder_layers": 1},
    },
    "baseline": {
        **RECIPES["reviews"],
        "name": "baseline",
        "objective": {"baseline": True, "logits": None, "features": None},
    },
}
"""Recipes that name every key between them, nearly all with another value than its default."""


def main() -> None:
    """Make all folders afresh."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="Root of a checkout of the version that makes the folders.")
    checkout = parser.parse_args().checkout.resolve()
    sys.path[:0] = [str(checkout / "src"), str(checkout)]
    for path in HERE.iterdir():
        if path.suffix != ".py" and path.name != "__pycache__":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.chdir(HERE)
    os.environ.update(FLEXKD_HOME="home", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    _write_material()
    _write_recipes()
    with _neutral_machine():
        for folder, (command, recipe, values) in RUNS.items():
            with _interruption(folder):
                code = _call(command, f"recipes/{recipe}.yaml", f"output={folder}", *values)
            assert code == (130 if "interrupted" in folder else 0), (folder, code)
    missing = Path("comparison/cells", MISSING_CELL)
    expected = {"cell": json.loads((missing / "cell.json").read_text(encoding="utf-8"))["metrics"]}
    shutil.rmtree(missing)
    _tidy()
    _check_paths(checkout)
    torch_entries = {"torch": torch.__version__, "arithmetic": arithmetic()}
    version = import_module("flexkd").__version__
    content = {"flexkd": version, **torch_entries, **expected}
    Path("made_with.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def arithmetic() -> str:
    """Digest of the gradients of the tiny teacher: equal where a machine adds in the same order."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(HERE / "teacher", attn_implementation="eager")
    model.train(False)
    ids = torch.arange(4, 24).repeat(8, 1)[:, :16]
    model(input_ids=ids, labels=torch.arange(8) % 2).loss.backward()
    digest = hashlib.blake2b(digest_size=12)
    for parameter in model.parameters():
        if parameter.grad is not None:
            digest.update(parameter.grad.numpy().tobytes())
    return digest.hexdigest()


def _write_material() -> None:
    """Teachers, tokenizers and rows."""
    job_files, tiny = import_module("tests.job_files"), import_module("tests.tiny")
    tiny.tiny_model("bert", seed=3, num_labels=2, **_TINY).save_pretrained("teacher")
    job_files.write_tokenizer(Path("teacher"))
    job_files.write_rows(Path("reviews.jsonl"), count=60)
    sizes = {**_TINY, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    tiny.tiny_model("llama", "causal", seed=3, **sizes).save_pretrained("writer")
    job_files.write_text_tokenizer(Path("writer"))
    job_files.write_text_rows(Path("texts.jsonl"), count=40)


def _write_recipes() -> None:
    """The recipes of the runs, and those that name every key, each beside what it says to the old version."""
    yaml, recipes = import_module("yaml"), import_module("flexkd.recipe")
    for name, content in {**RECIPES, **{f"every_key/{name}": content for name, content in EVERY_KEY.items()}}.items():
        path = Path("recipes", f"{name}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        if name.startswith("every_key"):
            understood = recipes.load_recipe(path).model_dump(mode="json")
            path.with_suffix(".json").write_text(json.dumps(understood, indent=1) + "\n", encoding="utf-8")
    keys = {key for content in EVERY_KEY.values() for key in dotted_keys(content)}
    unnamed = sorted(set(_schema_keys(recipes.Recipe)) - keys)
    assert not unnamed, f"no recipe names {unnamed}"


def dotted_keys(section: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Every key of a recipe, those of sections below each other."""
    for key, value in section.items():
        yield f"{at}{key}"
        if isinstance(value, Mapping) and key not in ("layer_map", "where", "chat_variables", "search", "label_names"):
            yield from dotted_keys(value, f"{at}{key}.")


def _schema_keys(section: Any, at: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{at}{name}"
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if hasattr(kind, "model_fields"):
                yield from _schema_keys(kind, f"{at}{name}.")


def _call(*arguments: str) -> int:
    """One call of the old command line."""
    runner = import_module("typer.testing").CliRunner()
    result = runner.invoke(import_module("flexkd.cli").app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return int(result.exit_code)


@contextmanager
def _neutral_machine() -> Iterator[None]:
    """Records that name no machine, and costs that nobody measured."""
    recording = import_module("flexkd.train.recording")
    environment = recording.environment
    fixed = import_module("flexkd.evaluate.cost").Cost(1000, 4000, 50.0, 10**6, "cpu")

    def neutral(precision: str) -> dict[str, str]:
        return {**environment(precision), "device": "a CPU", "platform": "Linux"}

    def measured(folders: list[Path], *_: Any, **__: Any) -> list[Any]:
        return [fixed] * len(folders)

    with (
        patch.object(recording, "environment", neutral),
        patch("flexkd.compare.environment", neutral),
        patch("flexkd.train.classification.measure_costs", measured),
        patch("flexkd.train.generation.measure_costs", measured),
    ):
        yield


@contextmanager
def _interruption(folder: str) -> Iterator[None]:
    """Ends a training after its first checkpoint, and a cache after its first file."""
    if folder == "interrupted":
        trainer = import_module("flexkd.train.trainer")
        with patch.object(trainer, "save_state", _raises_after(trainer.save_state)):
            yield
    elif folder == "cache_interrupted":
        building = import_module("flexkd.teacher.building")
        write = _raises_before_second(building.write_shard)
        with patch.object(building, "SHARD_BYTES", SHARD_BYTES), patch.object(building, "write_shard", write):
            yield
    else:
        yield


def _raises_after(function: Callable[..., Any]) -> Callable[..., Any]:
    def interrupted(*args: Any, **options: Any) -> Any:
        function(*args, **options)
        raise KeyboardInterrupt

    return interrupted


def _raises_before_second(function: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[bool] = []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(True)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return function(*args, **options)

    return interrupted


def _tidy() -> None:
    """Without what is drawn again from a record, locks, and the one file that says where training was started."""
    for path in sorted(HERE.rglob("*")):
        if path.name in ("README.md", "report.html", "training_args.bin", "lock") or path.suffix == ".lock":
            path.unlink()
    shutil.rmtree("home/locks", ignore_errors=True)


def _check_paths(checkout: Path) -> None:
    """No file names this machine."""
    names = [str(HERE), str(checkout), str(Path.home()), sys.prefix]
    for path in (path for path in HERE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")):
        content = path.read_bytes()
        for name in names:
            assert name.encode() not in content, f"{path} names {name}"


if __name__ == "__main__":
    main()
