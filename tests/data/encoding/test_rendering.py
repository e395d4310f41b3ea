"""Rows that a chat template cannot write are bad rows, and what it writes otherwise than in a conversation is said."""

import dataclasses
import re

import pytest

from flexkd.data.encoding import chat_templates
from flexkd.data.encoding.prompts import PromptFormat, choose_format
from flexkd.data.encoding.rendering import rendering_notes, with_renderable_rows
from flexkd.data.examples.generation import GenerationData, GenerationExample, Turn
from flexkd.errors import DataError, RecipeError, VocabularyError
from tests.data.encoding.byte_tokenizers import CHATML, byte_tokenizer

STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
ONLY_SORT = "{% if 'Sort' not in messages[-1].content and messages[-1].role == 'user' %}{{ 1 / 0 }}{% endif %}" + CHATML


def row(name: str, *turns: tuple[str, str]) -> GenerationExample:
    return GenerationExample(name, tuple(Turn(*turn) for turn in turns), None, "a b", ("a b",))  # type: ignore[arg-type]


def rows(*train: GenerationExample, has_messages: bool = True) -> GenerationData:
    other = (row("v:1#0", ("user", "Sort b")),), (row("t:1#0", ("user", "Sort c")),)
    return GenerationData(train, *other, "instruction", has_messages, (), {}, "")


def chosen(source: str) -> tuple[object, PromptFormat]:
    tokenizer = byte_tokenizer(chat_template=source)
    return tokenizer, choose_format({"teacher": tokenizer}, kind="instruction")


PLAIN = row("a:1#0", ("user", "Sort"))
SYSTEM = row("a:2#0", ("system", "Be kind."), ("user", "Sort"))
OTHER = row("a:3#0", ("user", "Count"))


@pytest.mark.parametrize(
    ("source", "bad", "reason"),
    [
        (STRICT, SYSTEM, "chat template: it refuses the turns system, user (no system turn)"),
        (ONLY_SORT, OTHER, "chat template: it cannot write the turns user (division by zero)"),
    ],
)
def test_R03_a_row_that_cannot_be_written_is_a_bad_row(source: str, bad: GenerationExample, reason: str) -> None:
    data = rows(PLAIN, bad)
    usable = with_renderable_rows(data, *chosen(source), "skip")
    assert usable.train == (PLAIN,)
    assert [(entry.where, entry.reason) for entry in usable.bad_rows] == [(bad.id.partition("#")[0], reason)]
    with pytest.raises(DataError, match=re.escape(reason)):
        with_renderable_rows(data, *chosen(source), "stop")
    assert with_renderable_rows(data, *chosen(CHATML), "stop") is data


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('never') }}", "it refuses the turns user (never)"),
        ("{% for m in messages %}{{ m.content[0].text.more }}{% endfor %}", "it cannot write the turns user ("),
        ("{% for m in messages %}<|{{ m.role }}|>{% endfor %}", "it leaves out the question"),
        (
            "{% for i in range(9) %}{{ range(1000) | random }}{% endfor %}" + CHATML,
            "it writes something else each time",
        ),
        ("{{ messages[0].content if messages | length > 9 }}", "it leaves out the question"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "it takes longer than 0.1 seconds",
        ),
    ],
)
def test_R03_a_template_that_writes_no_row_is_refused_with_a_cure(
    source: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "takes longer" in reason:
        monkeypatch.setattr(chat_templates, "SECONDS", 0.1)
    with pytest.raises(DataError) as caught:
        with_renderable_rows(rows(PLAIN, has_messages=False), *chosen(source), "skip")
    assert f"data: the chat template of teacher writes none of 3 rows. The first, a:1: {reason}" in str(caught.value)
    assert "Set data.chat: never" in str(caught.value)
    # The advice works.
    tokenizer, _ = chosen(source)
    plain = choose_format({"teacher": tokenizer}, kind="instruction", chat="never")
    assert with_renderable_rows(rows(PLAIN), tokenizer, plain, "stop").train == (PLAIN,)


def test_R03_what_is_no_template_is_refused_by_name() -> None:
    for source, why in (("{% if %}", "is no Jinja template"), ({"tool_use": CHATML}, "called tool_use, and none")):
        with pytest.raises(VocabularyError, match=why):
            choose_format({"teacher": byte_tokenizer(chat_template=source)}, kind="instruction")  # type: ignore[arg-type]


def test_R03_a_split_whose_rows_cannot_be_written_is_named() -> None:
    data = dataclasses.replace(rows(PLAIN), test=(SYSTEM,))
    with pytest.raises(DataError, match=r"data\.test: the chat template of teacher writes none of its 1 rows"):
        with_renderable_rows(data, *chosen(STRICT), "skip")


def test_R03_a_check_judges_a_sample_of_each_kind() -> None:
    many = [row(f"b:{index}#0", ("system", "Be kind."), ("user", f"Sort {index}")) for index in range(9)]
    data = rows(PLAIN, *many)
    whole, sampled = (with_renderable_rows(data, *chosen(STRICT), "skip", sample=sample) for sample in (None, 2))
    assert whole == sampled
    assert len(whole.bad_rows) == 9


def test_R03_what_stands_before_an_answer_and_what_is_left_out_is_said() -> None:
    thought = CHATML.replace("{{ m.content }}", "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}")
    (note,) = rendering_notes(rows(PLAIN), *chosen(thought))
    assert "writes '<think></think>' before an answer in a conversation and '' as the generation prompt" in note
    quiet = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    (note,) = rendering_notes(rows(PLAIN, SYSTEM), *chosen(quiet))
    assert "leaves out or changes a turn in 1 of the first 2 training rows (first a:2: system)" in note
    loud = CHATML.replace("m.content", "(m.content | upper)")
    (note,) = rendering_notes(rows(PLAIN), *chosen(loud))
    assert "leaves out or changes a turn in 1 of the first 1 training rows (first a:1: user)" in note
    no_answer = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'assistant' %}")
    (note,) = rendering_notes(rows(PLAIN), *chosen(no_answer))
    assert "writes no answer of a conversation, so that '</s>' ends answers" in note
    assert rendering_notes(rows(PLAIN), *chosen(CHATML)) == []


def test_R03_a_turn_that_plain_text_can_forge_is_counted_and_named() -> None:
    inst = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
    )
    data = rows(PLAIN, row("a:5#0", ("user", "Sort [/INST] no")), row("a:6#0", ("user", "Sort [x] <y>")))
    (note,) = rendering_notes(data, *chosen(inst + "{% endif %}{% endfor %}"))
    assert note == (
        "the chat template of teacher writes '[/INST]' around turns as plain text, and 1 rows hold it or the like"
        " (first a:5): a model may read a turn there."
    )


def test_R03_a_template_is_told_to_think_of_nothing_as_its_note_advises() -> None:
    thinks = CHATML.replace(
        "{% if add_generation_prompt %}<|assistant|>",
        "{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is defined and not enable_thinking %}<t></t>{% endif %}",
    ).replace("{{ m.content }}", "{{ '<t></t>' if m.role == 'assistant' }}{{ m.content }}")
    (note,) = rendering_notes(rows(PLAIN), *chosen(thinks))
    assert note.endswith("data.chat_variables: {enable_thinking: false} asks for answers without a thought.")
    tokenizer = byte_tokenizer(chat_template=thinks)
    told = choose_format({"teacher": tokenizer}, kind="instruction", variables={"enable_thinking": False})
    assert rendering_notes(rows(PLAIN), tokenizer, told) == []
    served = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Sort"}],
        chat_template=told.chat_template,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert served == "<|user|>Sort<|end|>\n<|assistant|><t></t>"
    for name in ("messages", "no name"):
        with pytest.raises(RecipeError, match=rf"data\.chat_variables: '{name}' is no variable"):
            choose_format({"teacher": tokenizer}, kind="instruction", variables={name: 1})
