"""The three lines of the model card give the student the ids that it was trained on, with any kind of tokenizer."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers.generation import GenerationMixin

from flexkd.data.encoding.generation import encode_prompts, plain_call
from flexkd.data.encoding.prompts import choose_format
from flexkd.data.examples.generation import GenerationExample, Turn
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
    tokenizer, seq2seq = byte_tokenizer(post=post, chat_template=chat_template), kind == "seq2seq"
    chosen = choose_format({"teacher": tokenizer}, kind="instruction", seq2seq=seq2seq)
    example = GenerationExample("a:1#0", (Turn("user", "Name three colours."),), None, "a", ("a",))
    limits: dict[str, Any] = {"max_length": 200, "max_answer_length": 9, "seq2seq": seq2seq}
    trained = encode_prompts([example], tokenizer, chosen, **limits).rows[0]["input_ids"]
    adds_special_tokens, prefix = plain_call(tokenizer, chosen, seq2seq=seq2seq)
    generation = dataclasses.replace(
        GENERATION,
        kind=kind,
        is_chat=chosen.kind == "chat",
        layout=chosen.layout,
        adds_special_tokens=adds_special_tokens,
        prefix=prefix,
    )
    tokenizer.chat_template = chosen.chat_template
    tokenizer.save_pretrained(tmp_path)
    tiny_model("t5" if seq2seq else "llama", kind, vocab_size=len(tokenizer)).save_pretrained(tmp_path)  # type: ignore[arg-type]
    asked: list[list[int]] = []

    def ask(self: Any, *_: Any, input_ids: Any, **__: Any) -> None:
        asked.extend(input_ids.tolist())
        raise AskedError

    monkeypatch.setattr(GenerationMixin, "generate", ask)
    monkeypatch.chdir(tmp_path)
    lines = inference_lines(generation_record(generation=generation))
    with pytest.raises(AskedError):
        exec("\n".join(lines), {})
    assert asked == [trained], json.dumps(lines)
