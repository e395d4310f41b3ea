import re
from typing import Any

import pytest

from flexkd.data.encoding.prompts import PromptFormat, choose_format, render_prompts, renderings_note
from flexkd.data.examples.generation import GenerationExample, Turn
from flexkd.errors import DataError, RecipeError, VocabularyError
from tests.data.encoding.byte_tokenizers import CHATML, WITH_BOS, byte_tokenizer

CHAT = byte_tokenizer(chat_template=CHATML)
PLAIN = byte_tokenizer()


def example(prompt: str | None = "Sort", document: str | None = None, *before: Turn) -> GenerationExample:
    turns = (*before, Turn("user", prompt)) if prompt is not None else ()
    return GenerationExample("a:1#0", turns, document, "an answer", ("an answer",))


def render(prompt_format: PromptFormat, one: GenerationExample, tokenizer: Any = CHAT) -> str:
    return render_prompts([one], tokenizer, prompt_format)[0]


def test_a_chat_template_writes_the_turns_and_says_what_ends_an_answer() -> None:
    chosen = choose_format({"teacher": PLAIN, "student": CHAT}, kind="instruction")
    assert (chosen.kind, chosen.owner, chosen.end, chosen.stop_token) == ("chat", "student", "<|end|>", "<|end|>")
    assert render(chosen, example()) == "<|user|>Sort<|end|>\n<|assistant|>"
    assert render(chosen, example("Sort", "b a")) == "<|user|>Sort\n\nb a<|end|>\n<|assistant|>"
    before = (Turn("system", "be kind"), Turn("user", "hi"), Turn("assistant", "hello"))
    assert render(chosen, example("bye", None, *before)) == (
        "<|system|>be kind<|end|>\n<|user|>hi<|end|>\n<|assistant|>hello<|end|>\n<|user|>bye<|end|>\n<|assistant|>"
    )
    summary = choose_format({"teacher": CHAT}, kind="summarization")
    assert render(summary, example(None, "Text.")).startswith("<|user|>Summarize the following text.\n\nText.<|end|>")
    other = choose_format({"teacher": byte_tokenizer(chat_template=WITH_BOS)}, kind="instruction")
    assert (other.end, other.stop_token) == ("</s>", "</s>")


def test_R03_the_prompt_is_what_is_served_even_where_more_stands_before_an_answer() -> None:
    thinking = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    )
    tokenizer = byte_tokenizer(chat_template=thinking)
    chosen = choose_format({"teacher": tokenizer}, kind="instruction")
    assert render(chosen, example(), tokenizer) == "<|user|>Sort<|end|>\n<|assistant|>"
    assert (chosen.begin, chosen.end) == ("", "<|end|>")


def test_a_template_that_ends_no_turn_leaves_it_to_the_end_of_text() -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chosen = choose_format({"teacher": byte_tokenizer(chat_template=bare)}, kind="instruction")
    assert (chosen.end, chosen.stop_token) == ("</s>", "</s>")
    with pytest.raises(VocabularyError, match="no token ends an answer"):
        choose_format({"teacher": byte_tokenizer(chat_template=bare, eos_token=None)}, kind="instruction")
    with pytest.raises(VocabularyError, match="no token ends an answer"):
        choose_format({"teacher": byte_tokenizer(eos_token=None)}, kind="instruction")


def test_plain_layouts_leave_out_paragraphs_without_a_text() -> None:
    chosen = choose_format({"teacher": PLAIN}, kind="instruction")
    assert (chosen.kind, chosen.end, chosen.chat_template) == ("text", "</s>", None)
    assert render(chosen, example("Sort", "b {prompt} a")) == (
        "Instruction:\nSort\n\nInput:\nb {prompt} a\n\nAnswer:\n"
    )
    assert render(chosen, example()) == "Instruction:\nSort\n\nAnswer:\n"
    assert choose_format({"teacher": CHAT}, kind="instruction", chat="never").kind == "text"
    summary = choose_format({"teacher": PLAIN}, kind="summarization", seq2seq=True)
    assert (render(summary, example(None, "Text.")), summary.end) == ("summarize: Text.", "")
    plain = choose_format({"teacher": CHAT}, kind="instruction", template="Q {prompt} {context}\n\nA:")
    assert render(plain, example()) == "Q Sort \n\nA:"
    with pytest.raises(RecipeError, match=r"data\.template: unknown slot 'promt'\. .* Did you mean 'prompt'\?"):
        choose_format({"teacher": CHAT}, kind="instruction", template="{promt}")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"chat": "always"}, "but data.chat is always"),
        ({"has_messages": True}, "but the rows are messages"),
        ({"has_messages": True, "chat": "never"}, "but the rows are messages"),
    ],
)
def test_D09_a_missing_chat_template_names_whose_it_is_and_what_can_be_done(options: dict[str, Any], why: str) -> None:
    first, second = byte_tokenizer(name_or_path="base/one"), byte_tokenizer(name_or_path="base/two")
    with pytest.raises(VocabularyError) as caught:
        choose_format({"teacher": first, "student": second}, kind="instruction", **options)
    message = str(caught.value)
    key = "data.messages" if "has_messages" in options else "data.chat"
    titles = "teacher tokenizer 'base/one' and student tokenizer 'base/two'"
    assert message.startswith(f"{key}: {titles}: no chat template, {why}")
    for cure in ("tuned on instructions", "chat_template.jinja", "prompt and response"):
        assert cure in message
    with pytest.raises(VocabularyError, match=re.escape("data.template: replaces the chat template, but the rows are")):
        choose_format({"teacher": CHAT}, kind="instruction", template="{prompt}", has_messages=True)


def test_D12_both_renderings_are_shown_where_templates_differ() -> None:
    tokenizers = {"teacher": byte_tokenizer(chat_template=CHATML), "student": byte_tokenizer(chat_template=WITH_BOS)}
    chosen = choose_format(tokenizers, kind="instruction")
    note = renderings_note(tokenizers, chosen, example())
    assert note is not None
    assert note.splitlines() == [
        "the chat templates differ; both models read that of teacher. Row a:1#0:",
        r"  teacher writes '<|user|>Sort<|end|>\n<|assistant|>'",
        "  student would write '<s>[Q] Sort [A]'",
    ]
    # The student reads what the teacher reads, with a tokenizer whose own template is another.
    assert render(chosen, example(), tokenizers["student"]) == "<|user|>Sort<|end|>\n<|assistant|>"
    for same in ({"teacher": CHAT, "student": CHAT}, {"teacher": CHAT, "student": PLAIN}):
        assert renderings_note(same, chosen, example()) is None
    text = choose_format(tokenizers, kind="instruction", chat="never")
    assert renderings_note(tokenizers, text, example()) is None


def test_a_template_that_refuses_a_row_names_it() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    tokenizer = byte_tokenizer(chat_template=strict)
    chosen = choose_format({"teacher": tokenizer}, kind="instruction")
    with pytest.raises(DataError, match=r"a:1#0: the chat template of teacher refuses the turns system, user \(no"):
        render(chosen, example("hi", None, Turn("system", "be kind")), tokenizer)
