"""The chat templates that the pinned TRL carries: each trains what its student serves, or is refused."""

import importlib.util
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flexkd.data.encoding.generation import encode_generation, encode_prompts
from flexkd.data.encoding.prompts import choose_format
from flexkd.data.encoding.rendering import rendering_notes, with_renderable_rows
from flexkd.data.examples.generation import GenerationData, GenerationExample, Turn
from flexkd.errors import DataError
from tests.data.encoding.byte_tokenizers import SPECIALS, byte_tokenizer

REFUSED = {"idefics3", "llava_next", "smolvlm"}
"""They take lists of pictures and texts, and leave out or refuse a turn that is a plain text."""

_TOKEN = re.compile(r"<[|\uff5c/]?[\w\u2581]+[|\uff5c]?>|\[\w+\]")


def trl_templates() -> list[Path]:
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        reason = "trl is not installed: pip install -c constraints.txt trl"
        if os.environ.get("FLEXKD_REQUIRE_REAL") == "1":
            pytest.fail(f"FLEXKD_REQUIRE_REAL=1, but {reason}", pytrace=False)
        pytest.skip(reason)
    return sorted(Path(spec.origin).parent.glob("chat_templates/*.jinja"))


def rows() -> GenerationData:
    conversations = [
        [("user", "Sort b a")],
        [("user", "Sort d c")],
        [("system", "Be kind."), ("user", "Sort f e")],
        [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")],
    ]
    examples = [
        GenerationExample(f"{split}:{number}#0", tuple(Turn(*turn) for turn in turns), None, "a b", ("a b",))  # type: ignore[arg-type]
        for split in ("train", "validation", "test")
        for number, turns in enumerate(conversations)
    ]
    splits = {
        name: tuple(entry for entry in examples if entry.id.startswith(name))
        for name in ("train", "validation", "test")
    }
    return GenerationData(**splits, kind="instruction", has_messages=False, bad_rows=(), sources={}, fingerprint="")


def outcome_of(path: Path) -> str:
    """What becomes of a template, after its prompts were compared with those of the call that serves them."""
    source = path.read_text(encoding="utf-8")
    tokens = [token for token in sorted(set(_TOKEN.findall(source))) if token not in SPECIALS]
    tokenizer = byte_tokenizer(chat_template=source, specials=(*SPECIALS, *tokens))
    chosen = choose_format({"teacher": tokenizer}, kind="instruction")
    if path.stem.removesuffix("_training") in REFUSED:
        with pytest.raises(DataError, match="the chat template of teacher writes none of 12 rows"):
            with_renderable_rows(rows(), tokenizer, chosen, "skip")
        return "refused"
    data = with_renderable_rows(rows(), tokenizer, chosen, "skip")
    limits: dict[str, Any] = {"max_length": 6000, "max_answer_length": 60}
    trained = encode_generation(data.train, tokenizer, chosen, **limits)
    asked = encode_prompts(data.train, tokenizer, chosen, **limits)
    assert (trained.notes, trained.dropped) == ((), ())
    tokenizer.chat_template = chosen.chat_template
    for example, row, prompt in zip(data.train, trained.rows, asked.rows, strict=True):
        turns = [{"role": turn.role, "content": turn.content} for turn in example.turns]
        served = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        width = row["labels"].count(-100)
        assert row["input_ids"][:width] == prompt["input_ids"] == served
        assert tokenizer.decode(row["labels"][width:]) == f"a b{chosen.stop_token}"
    return "said" if rendering_notes(data, tokenizer, chosen) else "trains"


def test_R03_each_template_of_trl_trains_what_it_serves_or_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    outcomes = {path.stem: outcome_of(path) for path in trl_templates()}
    assert Counter(outcomes.values()) == {"trains": 39, "said": 27, "refused": 6}
    for name in ("qwen3", "glm4moe", "deepseekv3", "gptoss", "nemotron_3_nano", "llama3_2"):
        assert outcomes[name] == "said", name
    # Gemma refuses system turns: those rows are bad rows, the others train.
    assert "3 of 12 rows are skipped (chat template: 3, first train:2)" in caplog.text
