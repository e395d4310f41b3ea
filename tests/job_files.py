"""A tiny job on disk: made-up sentences of two kinds, a tokenizer, a teacher, and a recipe for them."""

import json
import random
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flexkd.recipe import Recipe, load_recipe
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
    """Sentences of 3 to 8 words with 2 that tell: class 1 where they praise."""
    draw = random.Random(seed)
    found = []
    for index in range(count):
        telling = draw.sample(GOOD if index % 2 else BAD, 2)
        words = telling + draw.sample(OTHER, draw.randint(1, 6))
        draw.shuffle(words)
        found.append((" ".join(words), index % 2))
    return found


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


def _shown(value: Any) -> str:
    # JSON knows no keys but text, and layers are numbers.
    return (
        "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}" if isinstance(value, dict) else json.dumps(value)
    )


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
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_recipe(path, [f"{key.replace('__', '.')}={_shown(value)}" for key, value in changes.items()])
