"""How prompts are written: with a chat template or in a plain layout, decided once for a run."""

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
"""The content of the user's turn in a chat template."""

DECODER_LAYOUTS: Final[Mapping[GenerationKind, str]] = {
    "instruction": "Instruction:\n{prompt}\n\nInput:\n{context}\n\nAnswer:\n",
    "summarization": "{document}\n\nSummary:\n",
}
"""Plain layouts for a decoder, which needs to see where its answer begins."""

ENCODER_DECODER_LAYOUTS: Final[Mapping[GenerationKind, str]] = {
    "instruction": "{prompt}\n\n{context}",
    "summarization": "summarize: {document}",
}
"""Plain layouts for the source of an encoder-decoder; T5 was trained with this prefix for summaries."""

SLOTS: Final = ("prompt", "context", "document")
_SLOT: Final = re.compile(r"\{([A-Za-z_]+)\}")

PROBE: Final = "7093415826"
"""Placeholder for a text while a template is examined: no template splits digits, trims them or changes their case."""

DEFAULT_DATE: Final = datetime.date(2026, 1, 1)
"""The date given to templates that write today's date; fixed, so that equal recipes give equal models on any day."""

# Four ways to begin: BOS as the template writes it, one more BOS at its head, one at its head alone, and no BOS. The
# line break after a block is not rendered, so that the template itself still begins a line.
_BOS_HEADS: Final = (
    "",
    "{%- if true %}{{ bos_token }}{% endif %}\n",
    "{{- bos_token }}{%- set bos_token = '' %}\n",
    "{%- set bos_token = '' %}\n",
)


@dataclass(frozen=True)
class PromptFormat:
    """One way to write prompts, the same in training, in evaluation and in the code lines of the model card.

    A chat prompt is what `apply_chat_template` writes with `add_generation_prompt`, because that is what a served
    student reads. Many templates write more before an answer that is already in a conversation, such as an empty
    thought; a student trained on that would be served without it.

    Attributes:
        kind: "chat" renders `chat_template` with the filled `layout` as the user's turn; "text" is the layout alone.
        layout: Text with the slots {prompt}, {context} and {document}. A paragraph whose slots are all empty in a row
            is left out of its prompt.
        chat_template: Jinja template, saved with the student; None where the kind is "text".
        end: What follows an answer, up to and with its end token; empty where the tokenizer adds the end by itself.
        stop_token: The token that ends an answer, at which generation stops.
        owner: Name of the model whose chat template it is.
        date: The date that the template writes; None where it writes none.
        begin: White space before an answer that the template leaves to the answering model.
        markup: Whether special tokens in the texts of rows are read as text or as tokens.
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
        """Settings that change the prompts, besides the tokenizer and the layout."""
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
    """Decide how prompts are written.

    Args:
        tokenizers: Loaded tokenizers, or their `TokenizerInfo`, by the name of their model, such as "teacher"; the
            first with a chat template provides it.
        chat: "auto" uses a chat template where a tokenizer has one.
        template: Layout of the whole prompt, in place of a chat template.
        has_messages: The rows are conversations.
        seq2seq: The prompt is the source of an encoder-decoder.
        date: Written by chat templates that write today's date.
        variables: Other variables of the chat template, such as enable_thinking.
        markup: How special tokens in the texts of rows are read.

    Raises:
        VocabularyError: A chat template is needed and missing or invalid, or no token ends an answer.
        RecipeError: The layout has an unknown slot, or a variable is not valid.
    """
    infos = {name: tokenizer_info(tokenizer) for name, tokenizer in tokenizers.items()}
    asks_for_text = template is not None or chat == "never"
    owner = next((name for name, info in infos.items() if info.templates), None)
    if (chat == "always" and owner is None) or (has_messages and (asks_for_text or owner is None)):
        raise VocabularyError(_missing_template_text(infos, has_messages))
    if owner is not None and not asks_for_text:
        source = _default_template(infos[owner], owner)
        pinned = with_values(with_date(source, date), variables or {})
        day = date if asks_for_date(source) else None
        chat_format = PromptFormat("chat", CHAT_CONTENT[kind], pinned, "", "", owner, day, markup=markup)
        chat_format = _with_one_bos(chat_format, infos[owner], seq2seq)
        if not seq2seq:
            return _with_ends(chat_format, infos[owner])
        # The tokenizer of an encoder-decoder ends a target by itself, whatever ends a turn in its source.
        return replace(chat_format, stop_token=_end_of_text(infos[owner], owner))
    layout = template or (ENCODER_DECODER_LAYOUTS if seq2seq else DECODER_LAYOUTS)[kind]
    for slot in _SLOT.findall(layout):
        if slot not in SLOTS:
            raise RecipeError(unknown_name("data.template", "slot", slot, SLOTS))
    name, first = next(iter(infos.items()))
    stop = _end_of_text(first, name)
    return PromptFormat("text", layout, None, "" if seq2seq else stop, stop, markup=markup)


def render_prompts(examples: Sequence[GenerationExample], tokenizer: Any, prompt_format: PromptFormat) -> list[str]:
    """The prompt of each example as text, with all special tokens that the format writes.

    Raises:
        DataError: The template refuses a row.
    """
    if prompt_format.kind == "text":
        return [_fill(prompt_format.layout, example) for example in examples]
    special_tokens = template_tokens(tokenizer)
    prompts = []
    for example in examples:
        try:
            prompts.append(render_messages(prompt_format, messages_of(example, prompt_format), special_tokens))
        except DataError as error:
            raise DataError(
                f"{example.id}: the chat template of {prompt_format.owner} {error}. Remove the row, or set data.chat:"
                " never."
            ) from error
    return prompts


def render_messages(
    prompt_format: PromptFormat,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, Any],
    *,
    add_generation_prompt: bool = True,
    guarded: bool = False,
) -> str:
    """What the chat template of a format writes for a conversation; see `render`.

    Raises:
        DataError: As `render`.
    """
    assert prompt_format.chat_template is not None
    return render(
        prompt_format.chat_template,
        messages,
        special_tokens,
        add_generation_prompt=add_generation_prompt,
        guarded=guarded,
    )


def messages_of(example: GenerationExample, prompt_format: PromptFormat) -> list[dict[str, str]]:
    """The turns before the answer, as a chat template takes them."""
    earlier = [{"role": turn.role, "content": turn.content} for turn in example.turns[:-1]]
    return [*earlier, {"role": "user", "content": _fill(prompt_format.layout, example)}]


def renderings_note(
    tokenizers: Mapping[str, Any], prompt_format: PromptFormat, example: GenerationExample
) -> str | None:
    """How the other models' own templates would write a row differently; None where all templates agree.

    Only the template of the format is used. A model that was trained with another one may answer worse.
    """
    if prompt_format.kind == "text":
        return None
    infos = {name: tokenizer_info(tokenizer) for name, tokenizer in tokenizers.items()}
    (prompt,) = render_prompts([example], infos[prompt_format.owner], prompt_format)
    lines = []
    for name, info in infos.items():
        if not info.templates or name == prompt_format.owner:
            continue
        source = with_date(_default_template(info, name), prompt_format.date or DEFAULT_DATE)
        (alternative,) = render_prompts([example], info, replace(prompt_format, chat_template=source, owner=name))
        if alternative.removeprefix(info.bos) != prompt.removeprefix(infos[prompt_format.owner].bos):
            lines.append(f"  {name} would write {alternative!r}")
    if not lines:
        return None
    head = f"the chat templates differ; both models read that of {prompt_format.owner}. Row {example.id}:"
    return "\n".join([head, f"  {prompt_format.owner} writes {prompt!r}", *lines])


def has_slot_for_document(prompt_format: PromptFormat) -> bool:
    """Whether the layout has a slot for the context or document."""
    return bool({"context", "document"} & set(_SLOT.findall(prompt_format.layout)))


def _fill(layout: str, example: GenerationExample) -> str:
    prompt = next((turn.content for turn in reversed(example.turns) if turn.role == "user"), "")
    document = example.document or ""
    values = {"prompt": prompt, "context": document, "document": document}
    paragraphs = []
    for paragraph in layout.split("\n\n"):
        slots = _SLOT.findall(paragraph)
        if not slots or any(values[slot] for slot in slots):
            paragraphs.append(_SLOT.sub(lambda match: values[match[1]], paragraph))
    return "\n\n".join(paragraphs)


def _default_template(info: TokenizerInfo, owner: str) -> str:
    """The only chat template of a tokenizer, or the one called default."""
    source = info.templates.get(DEFAULT)
    if source is None:
        names = ", ".join(sorted(info.templates))
        raise VocabularyError(
            f"{_tokenizer_title(owner, info)}: its chat templates are called {names}, and none of them {DEFAULT}. Save "
            "it with one, or set data.chat: never."
        )
    try:
        compiled_template(source)
    except DataError as error:
        raise VocabularyError(
            f"{_tokenizer_title(owner, info)}: its chat template {error}. Fix chat_template.jinja in its folder, or "
            "set data.chat: never."
        ) from error
    return source


_QUESTION: Final = ({"role": "user", "content": PROBE[::-1]},)


def _with_one_bos(prompt_format: PromptFormat, info: TokenizerInfo, seq2seq: bool) -> PromptFormat:
    """The format with a template head that makes prompts begin with exactly one BOS, where the tokenizer uses one.

    `apply_chat_template` adds no BOS to what a template writes; the tokenizer of an encoder-decoder adds its own.
    """
    if not info.bos:
        return prompt_format
    adds_bos = bool(info.adds_bos)
    for head in _BOS_HEADS:
        changed = replace(prompt_format, chat_template=head + str(prompt_format.chat_template))
        try:
            text = render_messages(changed, _QUESTION, info.special_tokens, guarded=True)
        except DataError:  # reported later, with the rows that cannot be rendered
            return prompt_format
        num_bos = int(adds_bos and seq2seq)
        while text.startswith(info.bos):
            text, num_bos = text.removeprefix(info.bos), num_bos + 1
        if num_bos == 1 or (num_bos == 0 and not adds_bos):
            return changed
    return prompt_format


def _with_ends(prompt_format: PromptFormat, info: TokenizerInfo) -> PromptFormat:
    """The format with what its template writes after an answer, up to and with the first special token."""
    prefix, suffix = around_answer(prompt_format, list(_QUESTION), info.special_tokens)
    begin = ""
    if prefix is not None:
        prompt = render_messages(prompt_format, _QUESTION, info.special_tokens)
        gap = prefix.removeprefix(prompt) if prefix.startswith(prompt) else ""
        begin = gap if gap.isspace() else ""
    # Where two tokens begin at the same place, the longer one counts.
    ends = [(suffix.index(token), -len(token), token) for token in info.added_tokens if token and token in suffix]
    if ends:
        start, _, token = min(ends)
        return replace(prompt_format, begin=begin, end=suffix[: start + len(token)], stop_token=token)
    eos = _end_of_text(info, prompt_format.owner)
    return replace(prompt_format, begin=begin, end=eos, stop_token=eos)


def around_answer(
    prompt_format: PromptFormat, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, Any]
) -> tuple[str | None, str]:
    """What the template writes before and after an answer in a conversation; None and "" where it writes no answer."""
    try:
        answer = {"role": "assistant", "content": PROBE}
        whole = render_messages(
            prompt_format, [*messages, answer], special_tokens, add_generation_prompt=False, guarded=True
        )
        render_messages(prompt_format, messages, special_tokens, guarded=True)
    except DataError:  # reported row by row
        return None, ""
    prefix, answer_text, suffix = whole.rpartition(PROBE)
    return (prefix, suffix) if answer_text else (None, "")


def _end_of_text(info: TokenizerInfo, name: str) -> str:
    if info.eos is None:
        raise VocabularyError(f"{_tokenizer_title(name, info)}: no token ends an answer. Set eos_token in its folder.")
    return info.eos


def _missing_template_text(infos: Mapping[str, TokenizerInfo], has_messages: bool) -> str:
    lacking = [_tokenizer_title(name, info) for name, info in infos.items() if not info.templates]
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


def _tokenizer_title(name: str, info: TokenizerInfo) -> str:
    return f"{name} tokenizer '{info.name}'"
