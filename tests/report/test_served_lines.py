"""The lines of the model card give the student the ids that it was trained on, with any kind of tokenizer."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers.generation import GenerationMixin

from flexkd.data.encoding.generation import encode_prompts, plain_call
from flexkd.data.encoding.prompts import choose_format
from flexkd.data.examples.generation import GenerationExample, Turn
from flexkd.report.answers import SAMPLE_DOCUMENT
from flexkd.report.card import inference_lines
from tests.data.encoding.byte_tokenizers import CHATML, WITH_BOS, byte_tokenizer
from tests.report.test_answers import GENERATION, generation_record
from tests.tiny import tiny_model

THOUGHT = CHATML.replace("{{ m.content }}", "{{ '<t>' if m.role == 'assistant' }}{{ m.content }}")
DATED = "{{ strftime_now('%d %B %Y') }}" + CHATML


class AskedError(Exception):
    """A model was asked."""


@pytest.mark.parametrize(
    ("kind", "post", "chat_template"),
    [
        ("causal", None, None),
        ("causal", "<s> $A", None),
        ("causal", "<s> $A </s>", None),
        ("causal", "$A </s>", None),
        ("causal", None, CHATML),
        ("causal", "<s> $A", CHATML),
        ("causal", "<s> $A", WITH_BOS),
        ("causal", "<s> $A </s>", "{{ bos_token }}" + WITH_BOS),
        ("causal", None, THOUGHT),
        ("causal", "<s> $A", DATED),
        ("seq2seq", "$A </s>", None),
        ("seq2seq", "<s> $A </s>", CHATML),
        ("seq2seq", "<s> $A </s>", WITH_BOS),
    ],
)
def test_R03_the_card_asks_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, post: str | None, chat_template: str | None
) -> None:
    example = GenerationExample("a:1#0", (Turn("user", "Name three colours."),), None, "a", ("a",))
    trained, asked = served_ids(tmp_path, monkeypatch, kind, post, chat_template, example, "instruction", 200)
    assert asked == trained


LONG = "A long text. " * 5 + "It ends  \n here, at last."


@pytest.mark.parametrize(
    ("kind", "post", "chat_template", "task"),
    [
        ("causal", None, None, "summarization"),
        ("causal", "<s> $A </s>", None, "instruction"),
        ("causal", "<s> $A", CHATML, "summarization"),
        ("causal", None, WITH_BOS, "instruction"),
        ("seq2seq", "$A </s>", None, "summarization"),
        ("seq2seq", "<s> $A </s>", CHATML, "instruction"),
    ],
)
def test_the_card_cuts_long_documents_as_training_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, post: str | None, chat_template: str | None, task: str
) -> None:
    turns = (Turn("user", "Name three colours."),) if task == "instruction" else ()
    example = GenerationExample("a:1#0", turns, LONG, "a", ("a",))
    whole, asked = served_ids(tmp_path, monkeypatch, kind, post, chat_template, example, task, 500)
    assert asked == whole
    # The second cut falls into white space, which goes as well.
    for lost in (1, 15):
        max_length = len(whole) - lost + (0 if kind == "seq2seq" else 9)
        trained, asked = served_ids(tmp_path, monkeypatch, kind, post, chat_template, example, task, max_length)
        assert asked == trained
        assert len(whole) - lost - 3 <= len(trained) <= len(whole) - lost


def served_ids(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    post: str | None,
    chat_template: str | None,
    example: GenerationExample,
    task: Any,
    max_length: int,
) -> tuple[list[int], list[int]]:
    """The ids of a prompt in training, and those that the lines of the card ask a model with."""
    tokenizer, seq2seq = byte_tokenizer(post=post, chat_template=chat_template), kind == "seq2seq"
    chosen = choose_format({"teacher": tokenizer}, kind=task, seq2seq=seq2seq)
    limits: dict[str, Any] = {"max_length": max_length, "max_answer_length": 9}
    trained = encode_prompts([example], tokenizer, chosen, seq2seq=seq2seq, **limits).rows[0]["input_ids"]
    adds_special_tokens, prefix = plain_call(tokenizer, chosen, seq2seq=seq2seq)
    generation = dataclasses.replace(
        GENERATION,
        kind=kind,
        is_chat=chosen.kind == "chat",
        layout=chosen.layout,
        adds_special_tokens=adds_special_tokens,
        prefix=prefix,
    )
    if not (folder / "config.json").exists():
        tokenizer.chat_template = chosen.chat_template
        tokenizer.save_pretrained(folder)
        tiny_model("t5" if seq2seq else "llama", kind, vocab_size=len(tokenizer)).save_pretrained(folder)  # type: ignore[arg-type]
    asked: list[list[int]] = []

    def ask(self: Any, *_: Any, input_ids: Any, **__: Any) -> None:
        asked.extend(input_ids.tolist())
        raise AskedError

    monkeypatch.setattr(GenerationMixin, "generate", ask)
    monkeypatch.chdir(folder)
    record = generation_record(
        generation=generation, recipe={"data": {**limits, "context": "input" if example.document else None}}
    )
    lines = "\n".join(inference_lines(record))
    with pytest.raises(AskedError):
        exec(lines.replace(json.dumps(SAMPLE_DOCUMENT), json.dumps(example.document or "")), {})
    return trained, asked[0]
