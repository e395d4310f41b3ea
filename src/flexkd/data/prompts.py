"""How a question is written for a model: with a chat template or by a plain layout, decided once for a run."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from flexkd.data.generation import GenerationExample
from flexkd.data.turns import GenerationKind
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
# Stands for the answer while a template is rendered: one word that no template takes apart or trims.
_ANSWER: Final = "0answer0stands0here0"


@dataclass(frozen=True)
class PromptFormat:
    """One way to write prompts, the same for training and evaluation, for teacher and student.

    Attributes:
        kind: "chat" renders `chat_template` with the filled `layout` as the user's turn; "text" is the layout alone.
        layout: Text with the slots {prompt}, {context} and {document}. A paragraph whose slots are all empty in a row
            is left out there.
        chat_template: A Jinja template; None where the kind is "text".
        end: What follows an answer, up to the token that ends it; empty where the tokenizer ends a target by itself.
        stop_token: The token that ends an answer: generation stops at it.
        owner: Whose chat template it is.
    """

    kind: Literal["chat", "text"]
    layout: str
    chat_template: str | None
    end: str
    stop_token: str
    owner: str = ""


def choose_format(
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    *,
    kind: GenerationKind,
    chat: Literal["auto", "always", "never"] = "auto",
    template: str | None = None,
    has_messages: bool = False,
    seq2seq: bool = False,
) -> PromptFormat:
    """Decides how prompts are written.

    Args:
        tokenizers: By the name of their model, such as "teacher"; the first that has a chat template gives it.
        chat: "auto" takes a chat template where there is one.
        template: A layout of the whole prompt, in place of a chat template.
        has_messages: The rows are conversations.
        seq2seq: The prompt is the source of an encoder-decoder.

    Raises:
        VocabularyError: A chat template is needed and missing, or no token ends an answer.
        RecipeError: The layout has an unknown slot.
    """
    asks_for_text = template is not None or chat == "never"
    owner = next((name for name, one in tokenizers.items() if one.chat_template), None)
    if (chat == "always" and owner is None) or (has_messages and (asks_for_text or owner is None)):
        raise VocabularyError(_without_template(tokenizers, has_messages))
    if owner is not None and not asks_for_text:
        tokenizer = tokenizers[owner]
        chat_template = _own_template(tokenizer, owner)
        # The tokenizer of an encoder-decoder ends a target by itself, whatever ends a turn in its source.
        end, stop = ("", _end_of_text(tokenizer, owner)) if seq2seq else _end_of_turn(tokenizer, chat_template, owner)
        return PromptFormat("chat", CHAT_CONTENT[kind], chat_template, end, stop, owner)
    layout = template or (ENCODER_DECODER_LAYOUTS if seq2seq else DECODER_LAYOUTS)[kind]
    for slot in _SLOT.findall(layout):
        if slot not in SLOTS:
            raise RecipeError(unknown_name("data.template", "slot", slot, SLOTS))
    name, tokenizer = next(iter(tokenizers.items()))
    stop = _end_of_text(tokenizer, name)
    return PromptFormat("text", layout, None, "" if seq2seq else stop, stop)


def render_prompts(
    examples: Sequence[GenerationExample], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> list[str]:
    """The text before the answer of each example, with all special tokens that the format writes.

    Raises:
        DataError: The template refuses a row.
    """
    if prompt_format.kind == "text":
        return [_filled(prompt_format.layout, example) for example in examples]
    template = prompt_format.chat_template
    assert template is not None
    prompts = []
    for example in examples:
        try:
            text = _rendered(tokenizer, template, list(_messages(example, prompt_format.layout)))
        except TemplateError as error:
            roles = ", ".join(turn.role for turn in example.turns)
            raise DataError(
                f"{example.id}: the chat template of {prompt_format.owner} refuses the turns {roles} ({error})."
                " Remove the row, or set data.chat: never."
            ) from error
        prompts.append(text[: text.rindex(_ANSWER)])
    return prompts


def renderings_note(
    tokenizers: Mapping[str, PreTrainedTokenizerBase], prompt_format: PromptFormat, example: GenerationExample
) -> str | None:
    """Says how else another model's own template would write a row; None where all agree.

    Only the chosen rendering is used. A model that was trained on another one may answer worse under it.
    """
    if prompt_format.kind == "text":
        return None
    (chosen,) = render_prompts([example], tokenizers[prompt_format.owner], prompt_format)
    lines = []
    for name, tokenizer in tokenizers.items():
        if not tokenizer.chat_template or name == prompt_format.owner:
            continue
        template = _own_template(tokenizer, name)
        own = PromptFormat("chat", prompt_format.layout, template, "", prompt_format.stop_token, name)
        (other,) = render_prompts([example], tokenizer, own)
        if other != chosen:
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


def _messages(example: GenerationExample, layout: str) -> Iterator[dict[str, str]]:
    for turn in example.turns[:-1]:
        yield {"role": turn.role, "content": turn.content}
    yield {"role": "user", "content": _filled(layout, example)}
    yield {"role": "assistant", "content": _ANSWER}


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, str]]) -> str:
    # As text: what a tokenizing call returns (ids, or a dict of them) depends on the version of transformers.
    return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))


def _own_template(tokenizer: Any, owner: str) -> str:
    """The template, or the one called default where there are several."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise VocabularyError(f"{_titled(owner, tokenizer)}: {error}") from error


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str, owner: str) -> tuple[str, str]:
    """What a template writes after an answer, up to and with the first special token, and that token."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    after = _rendered(tokenizer, template, messages).rpartition(_ANSWER)[2]
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    found = [(after.index(token), -len(token), token) for token in special if token and token in after]
    if found:
        place, _, token = min(found)
        return after[: place + len(token)], token
    eos = _end_of_text(tokenizer, owner)
    return eos, eos


def _end_of_text(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    if tokenizer.eos_token is None:
        raise VocabularyError(f"{_titled(name, tokenizer)}: no token ends an answer. Set eos_token in its folder.")
    return str(tokenizer.eos_token)


def _without_template(tokenizers: Mapping[str, PreTrainedTokenizerBase], has_messages: bool) -> str:
    lacking = [_titled(name, one) for name, one in tokenizers.items() if not one.chat_template]
    why = "the rows are messages" if has_messages else "data.chat is always"
    missing = f"{' and '.join(lacking)}: no chat template" if lacking else "data.template: replaces the chat template"
    return (
        f"{missing}, but {why}. Use a model that was tuned on instructions, put a chat_template.jinja into the model's"
        " folder, or give the rows as prompt and response, which need none."
    )


def _titled(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{name} tokenizer '{tokenizer.name_or_path or type(tokenizer).__name__}'"
