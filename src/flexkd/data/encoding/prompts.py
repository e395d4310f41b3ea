"""How a question is written for a model: with a chat template or by a plain layout, decided once for a run."""

import datetime
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from flexkd.data.encoding.chat_templates import asks_for_date, compiled_template, render, with_date, with_values
from flexkd.data.encoding.tokenizers import DEFAULT, TokenizerInfo, template_tokens, tokenizer_info
from flexkd.data.examples.generation import GenerationExample
from flexkd.data.examples.turns import GenerationKind
from flexkd.errors import DataError, RecipeError, VocabularyError, unknown_name

CHAT_CONTENT: Final[Mapping[GenerationKind, str]] = {
    "instruction": "{prompt}\n\n{context}",
    "summarization": "Summarize the following text.\n\n{document}",
}
"""What the user says in a chat template."""

DECODER_LAYOUTS: Final[Mapping[GenerationKind, str]] = {
    "instruction": "Instruction:\n{prompt}\n\nInput:\n{context}\n\nAnswer:\n",
    "summarization": "{document}\n\nSummary:\n",
}
"""Plain layouts for a decoder, which has to see where its answer begins."""

ENCODER_DECODER_LAYOUTS: Final[Mapping[GenerationKind, str]] = {
    "instruction": "{prompt}\n\n{context}",
    "summarization": "summarize: {document}",
}
"""Plain layouts of the source of an encoder-decoder; the prefix of summaries is the one that T5 was trained with."""

SLOTS: Final = ("prompt", "context", "document")
_SLOT: Final = re.compile(r"\{([A-Za-z_]+)\}")

PROBE: Final = "7093415826"
"""Stands for a text while a template is looked at: no template takes digits apart, trims them or changes their case."""

DEFAULT_DATE: Final = datetime.date(2026, 1, 1)
"""The day of every template that writes one. A fixed one, so that equal recipes give equal models on any day."""

# The BOS is written where the template writes it, once more at its head, there alone, or not at all. A line break after
# a block is not written, and the template begins a line, as it did.
_BOS_HEADS: Final = (
    "",
    "{%- if true %}{{ bos_token }}{% endif %}\n",
    "{{- bos_token }}{%- set bos_token = '' %}\n",
    "{%- set bos_token = '' %}\n",
)


@dataclass(frozen=True)
class PromptFormat:
    """One way to write prompts, the same in training, in evaluation and by the lines of the model card.

    A chat prompt is what `apply_chat_template` writes before an answer that is asked for (`add_generation_prompt`),
    because that is what a served student reads. Many templates write more before an answer that stands in a
    conversation, such as an empty thought: a student that was trained behind that would be asked without it.

    Attributes:
        kind: "chat" renders `chat_template` with the filled `layout` as the user's turn; "text" is the layout alone.
        layout: Text with the slots {prompt}, {context} and {document}. A paragraph whose slots are all empty in a row
            is left out there.
        chat_template: A Jinja template, as the student is saved with it; None where the kind is "text".
        end: What follows an answer, up to the token that ends it; empty where the tokenizer ends a target by itself.
        stop_token: The token that ends an answer: generation stops at it.
        owner: Whose chat template it is.
        date: The day that the template writes; None where it writes none.
        begin: White space before an answer that the template leaves to whoever answers.
        markup: Whether special tokens in the texts of rows are read as text, or as the tokens.
    """

    kind: Literal["chat", "text"]
    layout: str
    chat_template: str | None
    end: str
    stop_token: str
    owner: str = ""
    date: datetime.date | None = None
    begin: str = ""
    markup: Literal["text", "tokens"] = "text"

    def fingerprints(self) -> dict[str, str]:
        """What decides the prompts besides tokenizer and layout."""
        markup: dict[str, str] = {} if self.markup == "text" else {"markup": self.markup}
        if self.chat_template is None:
            return markup
        content = f"{self.chat_template}\x1f{self.begin}\x1f{self.end}"
        digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        date = {} if self.date is None else {"date": self.date.isoformat()}
        return {"chat_template": digest, **date, **markup}


def choose_format(
    tokenizers: Mapping[str, Any],
    *,
    kind: GenerationKind,
    chat: Literal["auto", "always", "never"] = "auto",
    template: str | None = None,
    has_messages: bool = False,
    seq2seq: bool = False,
    date: datetime.date = DEFAULT_DATE,
    variables: Mapping[str, object] | None = None,
    markup: Literal["text", "tokens"] = "text",
) -> PromptFormat:
    """Decides how prompts are written.

    Args:
        tokenizers: Loaded tokenizers, or their `TokenizerInfo`, by the name of their model, such as "teacher"; the
            first with a chat template provides it.
        chat: "auto" takes a chat template where there is one.
        template: A layout of the whole prompt, in place of a chat template.
        has_messages: The rows are conversations.
        seq2seq: The prompt is the source of an encoder-decoder.
        date: What a chat template that writes today's date is told.
        variables: What else a chat template is told, such as enable_thinking.
        markup: How special tokens are read that stand in the texts of rows.

    Raises:
        VocabularyError: A chat template is needed and missing, is none, or no token ends an answer.
        RecipeError: The layout has an unknown slot, or a variable is none.
    """
    words = {name: tokenizer_info(tokenizer) for name, tokenizer in tokenizers.items()}
    asks_for_text = template is not None or chat == "never"
    owner = next((name for name, one in words.items() if one.templates), None)
    if (chat == "always" and owner is None) or (has_messages and (asks_for_text or owner is None)):
        raise VocabularyError(_without_template(words, has_messages))
    if owner is not None and not asks_for_text:
        source = _own_template(words[owner], owner)
        pinned = with_values(with_date(source, date), variables or {})
        day = date if asks_for_date(source) else None
        chosen = PromptFormat("chat", CHAT_CONTENT[kind], pinned, "", "", owner, day, markup=markup)
        chosen = _with_one_bos(chosen, words[owner], seq2seq)
        if not seq2seq:
            return _with_ends(chosen, words[owner])
        # The tokenizer of an encoder-decoder ends a target by itself, whatever ends a turn in its source.
        return replace(chosen, stop_token=_end_of_text(words[owner], owner))
    layout = template or (ENCODER_DECODER_LAYOUTS if seq2seq else DECODER_LAYOUTS)[kind]
    for slot in _SLOT.findall(layout):
        if slot not in SLOTS:
            raise RecipeError(unknown_name("data.template", "slot", slot, SLOTS))
    name, first = next(iter(words.items()))
    stop = _end_of_text(first, name)
    return PromptFormat("text", layout, None, "" if seq2seq else stop, stop, markup=markup)


def render_prompts(examples: Sequence[GenerationExample], tokenizer: Any, prompt_format: PromptFormat) -> list[str]:
    """The text before the answer of each example, with all special tokens that the format writes.

    Raises:
        DataError: The template refuses a row.
    """
    if prompt_format.kind == "text":
        return [_filled(prompt_format.layout, example) for example in examples]
    special_tokens = template_tokens(tokenizer)
    prompts = []
    for example in examples:
        try:
            prompts.append(written(prompt_format, messages_of(example, prompt_format), special_tokens))
        except DataError as error:
            raise DataError(
                f"{example.id}: the chat template of {prompt_format.owner} {error}. Remove the row, or set data.chat:"
                " never."
            ) from error
    return prompts


def written(
    prompt_format: PromptFormat,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, Any],
    *,
    asks: bool = True,
    guarded: bool = False,
) -> str:
    """What the chat template of a format writes for turns; see `render`.

    Raises:
        DataError: As `render`.
    """
    assert prompt_format.chat_template is not None
    return render(prompt_format.chat_template, messages, special_tokens, asks=asks, guarded=guarded)


def messages_of(example: GenerationExample, prompt_format: PromptFormat) -> list[dict[str, str]]:
    """The turns before the answer as a chat template takes them."""
    before = [{"role": turn.role, "content": turn.content} for turn in example.turns[:-1]]
    return [*before, {"role": "user", "content": _filled(prompt_format.layout, example)}]


def renderings_note(
    tokenizers: Mapping[str, Any], prompt_format: PromptFormat, example: GenerationExample
) -> str | None:
    """Says how else another model's own template would write a row; None where all agree.

    Only the chosen rendering is used. A model that was trained on another one may answer worse under it.
    """
    if prompt_format.kind == "text":
        return None
    words = {name: tokenizer_info(tokenizer) for name, tokenizer in tokenizers.items()}
    (chosen,) = render_prompts([example], words[prompt_format.owner], prompt_format)
    lines = []
    for name, one in words.items():
        if not one.templates or name == prompt_format.owner:
            continue
        source = with_date(_own_template(one, name), prompt_format.date or DEFAULT_DATE)
        (other,) = render_prompts([example], one, replace(prompt_format, chat_template=source, owner=name))
        if other.removeprefix(one.bos) != chosen.removeprefix(words[prompt_format.owner].bos):
            lines.append(f"  {name} would write {other!r}")
    if not lines:
        return None
    head = f"the chat templates differ; both models read that of {prompt_format.owner}. Row {example.id}:"
    return "\n".join([head, f"  {prompt_format.owner} writes {chosen!r}", *lines])


def has_slot_for_document(prompt_format: PromptFormat) -> bool:
    """Whether a layout shows the text that a prompt is about."""
    return bool({"context", "document"} & set(_SLOT.findall(prompt_format.layout)))


def _filled(layout: str, example: GenerationExample) -> str:
    prompt = next((turn.content for turn in reversed(example.turns) if turn.role == "user"), "")
    document = example.document or ""
    values = {"prompt": prompt, "context": document, "document": document}
    paragraphs = []
    for paragraph in layout.split("\n\n"):
        slots = _SLOT.findall(paragraph)
        if not slots or any(values[slot] for slot in slots):
            paragraphs.append(_SLOT.sub(lambda match: values[match[1]], paragraph))
    return "\n\n".join(paragraphs)


def _own_template(words: TokenizerInfo, owner: str) -> str:
    """The template, or the one called default where there are several."""
    source = words.templates.get(DEFAULT)
    if source is None:
        names = ", ".join(sorted(words.templates))
        raise VocabularyError(
            f"{_titled(owner, words)}: its chat templates are called {names}, and none of them {DEFAULT}. Save it with"
            " one, or set data.chat: never."
        )
    try:
        compiled_template(source)
    except DataError as error:
        raise VocabularyError(
            f"{_titled(owner, words)}: its chat template {error}. Mend chat_template.jinja in its folder, or set"
            " data.chat: never."
        ) from error
    return source


_QUESTION: Final = ({"role": "user", "content": PROBE[::-1]},)


def _with_one_bos(prompt_format: PromptFormat, words: TokenizerInfo, seq2seq: bool) -> PromptFormat:
    """The template with a head under which its prompts begin with one BOS, where the tokenizer uses one at all.

    `apply_chat_template` adds none to what a template writes, and a tokenizer of an encoder-decoder adds its own.
    """
    if not words.bos:
        return prompt_format
    adds = bool(words.adds_bos)
    for head in _BOS_HEADS:
        changed = replace(prompt_format, chat_template=head + str(prompt_format.chat_template))
        try:
            text = written(changed, _QUESTION, words.special_tokens, guarded=True)
        except DataError:  # it is said of which rows
            return prompt_format
        number = int(adds and seq2seq)
        while text.startswith(words.bos):
            text, number = text.removeprefix(words.bos), number + 1
        if number == 1 or (number == 0 and not adds):
            return changed
    return prompt_format


def _with_ends(prompt_format: PromptFormat, words: TokenizerInfo) -> PromptFormat:
    """The format with what a template writes after an answer, up to and with the first special token."""
    before, after = around_answer(prompt_format, list(_QUESTION), words.special_tokens)
    begin = ""
    if before is not None:
        asked = written(prompt_format, _QUESTION, words.special_tokens)
        gap = before.removeprefix(asked) if before.startswith(asked) else ""
        begin = gap if gap.isspace() else ""
    places = [(after.index(token), -len(token), token) for token in words.added_tokens if token and token in after]
    if places:
        place, _, token = min(places)
        return replace(prompt_format, begin=begin, end=after[: place + len(token)], stop_token=token)
    eos = _end_of_text(words, prompt_format.owner)
    return replace(prompt_format, begin=begin, end=eos, stop_token=eos)


def around_answer(
    prompt_format: PromptFormat, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, Any]
) -> tuple[str | None, str]:
    """What the template writes before and after an answer that stands in a conversation; None where it writes none."""
    try:
        answer = {"role": "assistant", "content": PROBE}
        whole = written(prompt_format, [*messages, answer], special_tokens, asks=False, guarded=True)
        written(prompt_format, messages, special_tokens, guarded=True)
    except DataError:  # what cannot be written is said row by row
        return None, ""
    before, answer_text, after = whole.rpartition(PROBE)
    return (before, after) if answer_text else (None, "")


def _end_of_text(words: TokenizerInfo, name: str) -> str:
    if words.eos is None:
        raise VocabularyError(f"{_titled(name, words)}: no token ends an answer. Set eos_token in its folder.")
    return words.eos


def _without_template(words: Mapping[str, TokenizerInfo], has_messages: bool) -> str:
    lacking = [_titled(name, one) for name, one in words.items() if not one.templates]
    why = "the rows are messages" if has_messages else "data.chat is always"
    key = "data.messages" if has_messages else "data.chat"
    missing = (
        f"{key}: {' and '.join(lacking)}: no chat template"
        if lacking
        else ("data.template: replaces the chat template")
    )
    return (
        f"{missing}, but {why}. Use a model that was tuned on instructions, put a chat_template.jinja into the model's"
        " folder, or give the rows as prompt and response, which need none."
    )


def _titled(name: str, words: TokenizerInfo) -> str:
    return f"{name} tokenizer '{words.name}'"
