"""Rows that a chat template can render, and notes on how it renders them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from flexkd.data.encoding.prompts import (
    PROBE,
    PromptFormat,
    around_answer,
    messages_of,
    render_messages,
    render_prompts,
)
from flexkd.data.encoding.tokenizers import template_tokens, tokenizer_info
from flexkd.data.examples.generation import GenerationData, GenerationExample
from flexkd.data.examples.row_checks import BadRow, BadRowsPolicy, report_bad_rows
from flexkd.errors import DataError
from flexkd.facts.names import SPLITS

SAMPLE: Final = 200
"""Rows of each kind of conversation that `check` renders; if all of them fail, so does every other of the kind."""

_LONGEST_MARK: Final = 40
_THINKS: Final = "enable_thinking"
_REASON: Final = "chat template"


def with_renderable_rows(
    data: GenerationData,
    tokenizer: Any,
    prompt_format: PromptFormat,
    bad_rows: BadRowsPolicy,
    *,
    sample: int | None = None,
) -> GenerationData:
    """The data without rows that the chat template cannot render; these are bad rows like any other.

    Args:
        tokenizer: Loaded, or its `TokenizerInfo`; the template writes its special tokens.
        bad_rows: As in `load_generation`.
        sample: Number of rows of each kind that are rendered; None renders all.

    Raises:
        DataError: No row can be rendered, a split is left empty, or more rows fail than `bad_rows` allows.
    """
    if prompt_format.kind == "text":
        return data
    examples = {split: getattr(data, split) for split in SPLITS}
    faults = _faults(_all_examples(data), tokenizer, prompt_format, sample)
    if not faults:
        return data
    number = sum(map(len, examples.values()))
    if len(faults) == number:
        where, reason = next(iter(faults.items()))
        raise DataError(
            f"data: the chat template of {prompt_format.owner} writes none of {number:,} rows. The first,"
            f" {_place(where)}: it {reason}. {_advice(data)}"
        )
    bad = [BadRow(_place(where), f"{_REASON}: it {reason}") for where, reason in faults.items()]
    report_bad_rows({"": bad}, {"": number}, bad_rows)
    good = {split: tuple(row for row in rows if row.id not in faults) for split, rows in examples.items()}
    for split, rows in good.items():
        if not rows:
            raise DataError(
                f"data.{split}: the chat template of {prompt_format.owner} writes none of its {len(examples[split]):,}"
                f" rows. {_advice(data)}"
            )
    return replace(
        data,
        train=good["train"],
        validation=good["validation"],
        test=good["test"],
        bad_rows=(*data.bad_rows, *bad),
    )


def rendering_notes(data: GenerationData, tokenizer: Any, prompt_format: PromptFormat) -> list[str]:
    """Notes on a chat template: where prompts differ from conversations, which date it writes, which texts it omits."""
    if prompt_format.kind == "text":
        return []
    rows, owner = data.train[:SAMPLE], prompt_format.owner
    rows = tuple(row for row in rows if _row_fault(row, tokenizer, prompt_format) is None)
    if not rows:
        return []
    example = rows[0]
    special_tokens = template_tokens(tokenizer)
    (prompt,) = render_prompts([example], tokenizer, prompt_format)
    prefix, _ = around_answer(prompt_format, messages_of(example, prompt_format), special_tokens)
    notes = []
    if prefix is None:
        notes.append(
            f"the chat template of {owner} writes no answer of a conversation, so that {prompt_format.stop_token!r}"
            " ends answers."
        )
    elif prefix != prompt + prompt_format.begin:
        length = _shared_length(prefix, prompt)
        notes.append(
            f"the chat template of {owner} writes {prefix[length:]!r} before an answer in a conversation and"
            f" {prompt[length:]!r} as the generation prompt. Models are evaluated and students trained with the latter,"
            f" as plain generate uses it.{_without_thought(prompt_format)}"
        )
    if prompt_format.date is not None:
        notes.append(
            f"the chat template of {owner} writes today's date: it always writes {prompt_format.date.isoformat()}, in"
            " the student as well. data.date sets another."
        )
    marks = _plain_marks(prompt_format, tokenizer)
    forged = [(row.id, mark) for row in _all_examples(data) if (mark := _first_mark(row, marks)) is not None]
    if forged:
        where, mark = forged[0]
        notes.append(
            f"the chat template of {owner} writes {mark!r} around turns as plain text, and {len(forged):,} rows hold it"
            f" or the like (first {_place(where)}): a model may read a turn there."
        )
    left_out = [(row.id, role) for row in rows if (role := _left_out(row, tokenizer, prompt_format))]
    if left_out:
        where, role = left_out[0]
        notes.append(
            f"the chat template of {owner} leaves out or changes a turn in {len(left_out):,} of the first {len(rows):,}"
            f" training rows (first {_place(where)}: {role})."
        )
    return notes


def _faults(
    examples: Sequence[GenerationExample], tokenizer: Any, prompt_format: PromptFormat, sample: int | None
) -> dict[str, str]:
    """Rows that cannot be rendered: id -> reason."""
    faults: dict[str, str] = {}
    for rows in _by_roles(examples).values():
        reason = _kind_fault(rows[0], tokenizer, prompt_format)
        if reason is not None:
            faults |= {row.id: reason for row in rows}
            continue
        rendered = rows[:sample]
        reasons = {row.id: reason for row in rendered if (reason := _row_fault(row, tokenizer, prompt_format))}
        if len(reasons) == len(rendered):
            reasons = {row.id: reasons.get(row.id, reasons[rendered[0].id]) for row in rows}
        faults |= reasons
    return faults


def _by_roles(examples: Sequence[GenerationExample]) -> dict[tuple[str, ...], list[GenerationExample]]:
    kinds: dict[tuple[str, ...], list[GenerationExample]] = {}
    for example in examples:
        kinds.setdefault(tuple(turn.role for turn in example.turns), []).append(example)
    return kinds


def _kind_fault(example: GenerationExample, tokenizer: Any, prompt_format: PromptFormat) -> str | None:
    """Why no row with these roles can be rendered, tried with a text that no template changes."""
    special_tokens = template_tokens(tokenizer)
    messages = messages_of(example, prompt_format)
    turns = [{**turn, "content": f"{PROBE}{index:02}"} for index, turn in enumerate(messages)]
    try:
        text = render_messages(prompt_format, turns, special_tokens, guarded=True)
        second_text = render_messages(prompt_format, turns, special_tokens, guarded=True)
    except DataError:
        # The template may accept only some texts; the row itself then gives the reason.
        return _row_fault(example, tokenizer, prompt_format, guarded=True)
    if text != second_text:
        return "writes something else each time"
    if turns[-1]["content"] not in text:
        return "leaves out the question, as templates do whose turns are lists of text and pictures"
    return None


def _row_fault(
    example: GenerationExample, tokenizer: Any, prompt_format: PromptFormat, *, guarded: bool = False
) -> str | None:
    messages = messages_of(example, prompt_format)
    try:
        text = render_messages(prompt_format, messages, template_tokens(tokenizer), guarded=guarded)
    except DataError as error:
        return str(error)
    return None if text else "writes nothing"


def _all_examples(data: GenerationData) -> list[GenerationExample]:
    return [example for split in SPLITS for example in getattr(data, split)]


def _plain_marks(prompt_format: PromptFormat, tokenizer: Any) -> list[str]:
    """What a template writes around a question as plain characters, so that a text can forge it."""
    info = tokenizer_info(tokenizer)
    try:
        text = render_messages(prompt_format, [{"role": "user", "content": PROBE}], info.special_tokens, guarded=True)
    except DataError:  # the template needs other turns first
        return []
    tokens = sorted(info.markup | {PROBE}, key=len, reverse=True)
    pieces = re.split("|".join(map(re.escape, tokens)) + "|\n", text)
    marks = {piece.strip() for piece in pieces}
    return sorted(mark for mark in marks if _LONGEST_MARK >= len(mark) > 2 and set(mark) & set("<>[]|#{}"))


def _first_mark(example: GenerationExample, marks: Sequence[str]) -> str | None:
    texts = [*(turn.content for turn in example.turns), example.document or ""]
    return next((mark for mark in marks if any(mark in text for text in texts)), None)


def _left_out(example: GenerationExample, tokenizer: Any, prompt_format: PromptFormat) -> str | None:
    """The role of the first turn whose text is missing from the prompt, or changed in it."""
    messages = messages_of(example, prompt_format)
    text = render_messages(prompt_format, messages, template_tokens(tokenizer))
    return next((turn["role"] for turn in messages if turn["content"] not in text), None)


def _shared_length(first: str, second: str) -> int:
    """Number of characters that two texts share at their start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(first), len(second)))


def _without_thought(prompt_format: PromptFormat) -> str:
    source = str(prompt_format.chat_template)
    if _THINKS not in source or f"set {_THINKS} =" in source:
        return ""
    return f" data.chat_variables: {{{_THINKS}: false}} asks for answers without a thought."


def _place(id_: str) -> str:
    return id_.partition("#")[0]


def _advice(data: GenerationData) -> str:
    if data.has_messages:
        return "Use a model whose template takes these turns, or give the rows as prompt and response."
    return "Set data.chat: never for a plain layout, or use a model whose template takes plain text."


def owner_tokenizer(tokenizers: Mapping[str, Any], prompt_format: PromptFormat) -> Any:
    """The tokenizer of the model whose chat template the format uses."""
    return tokenizers.get(prompt_format.owner, next(iter(tokenizers.values())))
