"""What recipes take from the hub, in small: models of the same architecture, tokenizers, rows with the same columns."""

import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flexkd.recipe import Recipe, override_recipe
from tests.tiny import tiny_model


class StandIn(NamedTuple):
    """A model on the hub: its architecture, whether its tokenizer has a chat template."""

    model_type: str
    task: Literal["classification", "causal", "seq2seq"]
    has_chat: bool = False


MODELS: Final = {
    "google-bert/bert-base-uncased": StandIn("bert", "classification"),
    "microsoft/MiniLM-L12-H384-uncased": StandIn("bert", "classification"),
    "openai-community/gpt2-xl": StandIn("gpt2", "causal"),
    "openai-community/gpt2-large": StandIn("gpt2", "causal"),
    "openai-community/gpt2-medium": StandIn("gpt2", "causal"),
    "openai-community/gpt2": StandIn("gpt2", "causal"),
    "facebook/opt-6.7b": StandIn("opt", "causal"),
    "facebook/opt-1.3b": StandIn("opt", "causal"),
    "huggyllama/llama-7b": StandIn("llama", "causal"),
    "princeton-nlp/Sheared-LLaMA-1.3B": StandIn("llama", "causal"),
    "facebook/bart-large-cnn": StandIn("bart", "seq2seq"),
    "facebook/bart-large-xsum": StandIn("bart", "seq2seq"),
    "Qwen/Qwen3-14B": StandIn("qwen3", "causal", has_chat=True),
    "Qwen/Qwen3-8B": StandIn("qwen3", "causal", has_chat=True),
    "Qwen/Qwen3-4B": StandIn("qwen3", "causal", has_chat=True),
    "Qwen/Qwen3-1.7B": StandIn("qwen3", "causal", has_chat=True),
    "Qwen/Qwen3-0.6B": StandIn("qwen3", "causal", has_chat=True),
    "meta-llama/Llama-3.2-3B-Instruct": StandIn("llama", "causal", has_chat=True),
    "meta-llama/Llama-3.2-1B-Instruct": StandIn("llama", "causal", has_chat=True),
    "google/gemma-3-1b-it": StandIn("gemma3_text", "causal", has_chat=True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": StandIn("llama", "causal", has_chat=True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": StandIn("llama", "causal", has_chat=True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": StandIn("llama", "causal", has_chat=True),
}
"""Every model that a recipe names."""

COLORS: Final = ["red", "blue", "green", "white", "black", "brown"]
THINGS: Final = ["river", "house", "bird", "stone", "road", "field", "boat", "tree"]
PLACES: Final = ["north", "south", "east", "west"]
_FRAME: Final = ["what", "color", "is", "the", "of", "in", "which", "seen", "was", "not", "and", "far", "near"]
_LAYOUT: Final = ["Instruction", "Input", "Answer", "Summary", "Summarize", "following", "text", ":", ".", "?"]
WORDS: Final = [*COLORS, *THINGS, *PLACES, *_FRAME, *_LAYOUT]
CHAT: Final = (
    "{% for message in messages %}<|start|>{{ message['role'] }} {{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)

_Draw = random.Random
_WHOLE: Final = 120


def _scene(draw: _Draw) -> tuple[str, str, str]:
    return draw.choice(COLORS), draw.choice(THINGS), draw.choice(PLACES)


def _sentence(draw: _Draw, words: int = 7) -> str:
    return " ".join(draw.choice([*COLORS, *THINGS, *PLACES]) for _ in range(words))


def _class(names: int, *columns: str) -> Callable[[_Draw], dict[str, Any]]:
    """Texts whose first word decides the class."""

    def row(draw: _Draw) -> dict[str, Any]:
        texts = {column: _sentence(draw) for column in columns}
        first = next(iter(texts.values())).split()[0]
        return {**texts, "label": f"class {[*COLORS, *THINGS, *PLACES].index(first) % names}"}

    return row


def _likeness(draw: _Draw) -> dict[str, Any]:
    first, second = _sentence(draw), _sentence(draw)
    return {"sentence1": first, "sentence2": second, "label": float(len(set(first.split()) & set(second.split())))}


def _dolly(draw: _Draw) -> dict[str, Any]:
    color, thing, place = _scene(draw)
    near = _sentence(draw, 3)
    context = f"the {color} {thing} was seen in the {place} near {near} ." if draw.random() < 0.5 else ""
    prompt = f"what color is the {thing} in the {place} and not {near} ?"
    return {"instruction": prompt, "context": context, "response": f"the {thing} is {color} .", "category": "open_qa"}


def _document(document: str, summary: str) -> Callable[[_Draw], dict[str, Any]]:
    def row(draw: _Draw) -> dict[str, Any]:
        color, thing, place = _scene(draw)
        text = f"the {thing} in the {place} is {color} . {_sentence(draw)} . {_sentence(draw)} ."
        return {document: text, summary: f"{color} {thing} , {place} ."}

    return row


ROWS: Final[dict[str, Callable[[_Draw], dict[str, Any]]]] = {
    "nyu-mll/glue:sst2": _class(2, "sentence"),
    "nyu-mll/glue:cola": _class(2, "sentence"),
    "nyu-mll/glue:mrpc": _class(2, "sentence1", "sentence2"),
    "nyu-mll/glue:rte": _class(2, "sentence1", "sentence2"),
    "nyu-mll/glue:qnli": _class(2, "question", "sentence"),
    "nyu-mll/glue:qqp": _class(2, "question1", "question2"),
    "nyu-mll/glue:mnli": _class(3, "premise", "hypothesis"),
    "nyu-mll/glue:stsb": _likeness,
    "stanfordnlp/imdb": _class(2, "text"),
    "databricks/databricks-dolly-15k": _dolly,
    "abisee/cnn_dailymail:3.0.0": _document("article", "highlights"),
    "EdinburghNLP/xsum": _document("document", "summary"),
    "knkarthick/dialogsum": _document("dialogue", "summary"),
}
"""Every data set that a recipe names, without its split."""


class TinyHub:
    """Folders and files that stand in for what is on the hub; each is made once.

    Args:
        root: An empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = cache(self._model)
        self.rows = cache(self._rows)

    def _model(self, hub_id: str, role: str) -> str:
        """A folder with weights of their own for teacher and student, and one tokenizer for both."""
        stand_in = MODELS[hub_id]
        folder = self.root / f"{role}-{stand_in.model_type}{'-chat' if stand_in.has_chat else ''}"
        if not folder.exists():
            words = len(WORDS) + 8
            seed = {"teacher": 1, "student": 2}[role]
            model = tiny_model(
                stand_in.model_type, stand_in.task, seed, vocab_size=words, max_position_embeddings=64
            )  # fmt: skip
            # Encoders are on the hub without a head for classes.
            (model.base_model if stand_in.task == "classification" else model).save_pretrained(folder)
            _write_tokenizer(folder, stand_in)
        return str(folder)

    def _rows(self, source: str, split: str) -> str:
        name = source.partition("[")[0]
        path = self.root / f"{name.replace('/', '-').replace(':', '-')}-{split}.jsonl"
        draw = random.Random(f"{name} {split}")
        rows = [ROWS[name](draw) for _ in range(_WHOLE)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    def small(self, recipe: Recipe, output: Path) -> Recipe:
        """The recipe with stand-ins for all that is on the hub, and two steps of training."""
        return override_recipe(recipe, [f"output={output}", *self._changes(recipe)])

    def _changes(self, recipe: Recipe) -> Iterator[str]:
        for split in ("train", "validation", "test"):
            source = getattr(recipe.data, split)
            if isinstance(source, str):
                yield f"data.{split}={self.rows(source, split)}"
        yield f"teacher.model={self.model(recipe.teacher.model, 'teacher')}"
        yield "teacher.allow_weak=true"  # its weights are random
        if recipe.teacher.fine_tune is not None:
            yield from ("teacher.fine_tune.epochs=0.01", "teacher.fine_tune.evaluations=1")
            yield "teacher.fine_tune.batch_size=16"
        student = recipe.student
        if student.model is not None:
            yield f"student.model={self.model(student.model, 'student')}"
        for key, value in (("hidden_size", 16), ("num_layers", 2)):
            if getattr(student, key) is not None:
                yield f"student.{key}={value}"
        if student.max_parameters is not None:
            yield from ("student.max_parameters=null", "student.size=0.5")
        yield from ("student.calibration_rows=16", "scores.rows=16")
        yield from ("training.max_steps=2", "training.evaluations=1", "training.logging_steps=1")
        yield "training.batch_size=16"
        if recipe.generation is None:
            yield "data.max_length=24"
            return
        yield from ("data.max_length=48", "data.max_answer_length=8")
        yield from ("generation.rows=4", "generation.max_new_tokens=3")
        if recipe.generation.validation_rows is not None:
            yield "generation.validation_rows=2"
        if len(recipe.generation.seeds) > 1:
            yield f"generation.seeds={list(recipe.generation.seeds[:2])}"


def _write_tokenizer(folder: Path, stand_in: StandIn) -> None:
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "<|start|>", "<|end|>"]
    words = [*special, "user", "assistant", *WORDS]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if not stand_in.has_chat and stand_in.model_type != "gpt2":
        single = "[CLS] $A" if stand_in.task == "causal" else "[CLS] $A [SEP]"
        backend.post_processor = processors.TemplateProcessing(
            single=single, pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if stand_in.task == "classification" else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="<|end|>" if stand_in.has_chat else "[SEP]",
        additional_special_tokens=["<|start|>", "<|end|>"],
        **names,
    )
    tokenizer.chat_template = CHAT if stand_in.has_chat else None
    tokenizer.save_pretrained(folder)
