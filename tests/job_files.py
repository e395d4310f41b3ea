"""A tiny job on disk: made-up sentences of two kinds, a tokenizer, a teacher, and a recipe for them."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flexkd.evaluate.cost import Cost
from flexkd.recipe import Recipe, load_recipe
from flexkd.tasks import classification, generation
from tests.tiny import tiny_model

GOOD = ["bright", "clever", "warm", "fresh", "sharp"]
BAD = ["dull", "clumsy", "cold", "stale", "flat"]
OTHER = ["film", "story", "scene", "song", "actor", "ending", "music", "plot", "joke", "town"]


def write_tokenizer(folder: Path, *, extra: str = "") -> None:
    """Words to ids; `extra` names a word that shifts all ids after the special tokens."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *([extra] if extra else []), *GOOD, *BAD, *OTHER]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    ).save_pretrained(folder)


def sentences(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Sentences of 3 to 8 words, two of which decide the class: 1 where they praise."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        telling = draw.sample(GOOD if index % 2 else BAD, 2)
        words = telling + draw.sample(OTHER, draw.randint(1, 6))
        draw.shuffle(words)
        rows.append((" ".join(words), index % 2))
    return rows


def write_rows(path: Path, problem: str = "single_label", count: int = 120) -> None:
    """The sentences as JSON lines, with labels for the problem."""
    with path.open("w", encoding="utf-8") as file:
        for text, kind in sentences(count):
            words = text.split()
            label: Any = ["bad", "good"][kind]
            if problem == "regression":
                label = float(sum(word in GOOD for word in words)) + 0.1 * len(words)
            elif problem == "multi_label":
                label = [kind, int(len(words) > 5)]
            file.write(json.dumps({"text": text, "label": label}) + "\n")


def _write_whole(path: Path, text: str) -> None:
    """Of several processes that write a recipe at once, none reads another's half."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    # JSON knows no keys but text, and layers are numbers.
    return "{" + ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items()) + "}"


def job(folder: Path, problem: str = "single_label", **changes: Any) -> Recipe:
    """A recipe whose teacher, tokenizer and rows stand in the folder; made there on the first call.

    Args:
        folder: Empty, or filled by an earlier call.
        problem: As in recipes.
        changes: Dotted recipe keys, `__` for the dot.
    """
    teacher, rows = folder / "teacher", folder / f"{problem}.jsonl"
    if not teacher.exists():
        tiny_model("bert", seed=3, num_labels=2).save_pretrained(teacher)
        write_tokenizer(teacher)
    if not rows.exists():
        write_rows(rows, problem)
    content = {
        "name": "tiny",
        "output": str(folder / "run"),
        "task": {"problem": problem},
        "data": {"train": str(rows), "validation": 0.2, "test": 0.2, "max_length": 16},
        "teacher": {"model": str(teacher), "fine_tune": {"epochs": 25, "learning_rate": 3e-3, "batch_size": 16}},
        "student": {"hidden_size": 16, "num_layers": 2, "calibration_rows": 16},
        "objective": {"features": {"weight": 1.0}},
        "training": {"max_steps": 6, "batch_size": 16, "logging_steps": 2, "evaluations": 2},
    }
    if problem == "multi_label":
        content["data"]["label_names"] = ["good", "long"]  # type: ignore[index]
    path = folder / f"{problem}.yaml"
    _write_whole(path, yaml.safe_dump(content))
    return load_recipe(path, [f"{key.replace('__', '.')}={_shown(value)}" for key, value in changes.items()])


def write_text_tokenizer(folder: Path, *, chat: bool = False) -> None:
    """Words to ids with an end of text, and on request a chat template in which an end of turn ends an answer."""
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "<|user|>", "<|assistant|>", "<|end|>", ":", "Summary", "Answer"]
    words += ["Instruction", "Input", "Summarize", "the", "following", "text", ".", *GOOD, *BAD, *OTHER]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    extra = ["<|user|>", "<|assistant|>", "<|end|>"] if chat else []
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=extra, **special)
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
            "{% if add_generation_prompt %}<|assistant|> {% endif %}"
        )
    tokenizer.save_pretrained(folder)


def write_text_rows(path: Path, count: int = 80) -> None:
    """Documents whose summary is their two telling words: something that a tiny model can learn."""
    with path.open("w", encoding="utf-8") as file:
        for text, _ in sentences(count, seed=5):
            words = text.split()
            summary = " ".join(word for word in words if word not in OTHER)
            file.write(json.dumps({"document": text, "summary": summary}) + "\n")


def text_job(folder: Path, model_type: str = "llama", *, chat: bool = False, **changes: Any) -> Recipe:
    """A summarization whose teacher, tokenizer and rows stand in the folder; made there on the first call.

    Args:
        folder: Empty, or filled by an earlier call of the same kind.
        model_type: Of the teacher; `t5` makes an encoder-decoder.
        chat: Whether the tokenizer has a chat template.
        changes: As in `job`.
    """
    teacher, rows = folder / "teacher", folder / "texts.jsonl"
    if not teacher.exists():
        task = "seq2seq" if model_type in ("t5", "bart") else "causal"
        tiny_model(model_type, task, seed=3).save_pretrained(teacher)  # type: ignore[arg-type]
        write_text_tokenizer(teacher, chat=chat)
        write_text_rows(rows)
    content = {
        "name": "tiny",
        "output": str(folder / "run"),
        "task": {"type": "summarization"},
        "data": {"train": str(rows), "validation": 0.2, "test": 0.2, "max_length": 32, "max_answer_length": 6},
        "generation": {"rows": 4, "examples": 2},
        "teacher": {"model": str(teacher), "fine_tune": {"epochs": 2, "learning_rate": 3e-3, "evaluations": 1}},
        "student": {"hidden_size": 16, "num_layers": 2, "calibration_rows": 16},
        "scores": {"rows": 20},
        "training": {"max_steps": 4, "batch_size": 16, "logging_steps": 2, "evaluations": 2},
    }
    path = folder / "text.yaml"
    _write_whole(path, yaml.safe_dump(content))
    return load_recipe(path, [f"{key.replace('__', '.')}={_shown(value)}" for key, value in changes.items()])


def fixed_costs(patch: pytest.MonkeyPatch) -> None:
    """Size, speed and memory of models are not measured, as that takes a process for each."""
    cost = Cost(1000, 4000, 50.0, 10**6, "cpu")
    for task in (classification, generation):
        patch.setattr(task, "measure_costs", lambda models, *_, **__: [cost] * len(models))


def count_optimizer_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets one entry for each step of an optimizer from now on."""
    steps: list[int] = []
    plain = torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
        steps.append(1)
        return plain(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return steps
