"""Which rows a chat template can write, and what a reader has to know of how it writes them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from flexkd.data.encoding.prompts import PROBE, PromptFormat, around_answer, messages_of, render_prompts, written
from flexkd.data.encoding.tokenizers import template_tokens, tokenizer_info
from flexkd.data.examples.generation import GenerationData, GenerationExample
from flexkd.data.examples.row_checks import BadRow, BadRowsPolicy, report_bad_rows
from flexkd.errors import DataError
from flexkd.facts.names import SPLITS

SAMPLE: Final = 200
"""Rows of each kind of conversation that a check renders; where all of them fail, so do the others of their kind."""

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
    """The rows without those that the chat template cannot write, which are bad rows like any other.

    Args:
        data: Rows of the task.
        tokenizer: Whose special tokens the template writes, loaded or as its `TokenizerInfo`.
        prompt_format: How prompts are written.
        bad_rows: As in `load_generation`.
        sample: Most rows of each kind that are rendered; None: all.

    Raises:
        DataError: No row can be written, a split is left empty, or more rows cannot than `bad_rows` allows.
    """
    if prompt_format.kind == "text":
        return data
    examples = {split: getattr(data, split) for split in SPLITS}
    faults = _faults(_rows(data), tokenizer, prompt_format, sample)
    if not faults:
        return data
    number = sum(map(len, examples.values()))
    if len(faults) == number:
        where, reason = next(iter(faults.items()))
        raise DataError(
            f"data: the chat template of {prompt_format.owner} writes none of {number:,} rows. The first,"
            f" {_place(where)}: it {reason}. {_cure(data)}"
        )
    bad = [BadRow(_place(where), f"{_REASON}: it {reason}") for where, reason in faults.items()]
    report_bad_rows({"": bad}, {"": number}, bad_rows)
    left = {split: tuple(row for row in rows if row.id not in faults) for split, rows in examples.items()}
    for split, rows in left.items():
        if not rows:
            raise DataError(
                f"data.{split}: the chat template of {prompt_format.owner} writes none of its {len(examples[split]):,}"
                f" rows. {_cure(data)}"
            )
    return replace(
        data,
        train=left["train"],
        validation=left["validation"],
        test=left["test"],
        bad_rows=(*data.bad_rows, *bad),
    )


def rendering_notes(data: GenerationData, tokenizer: Any, prompt_format: PromptFormat) -> list[str]:
    """How served prompts differ from what stands in a conversation, which day is told, and what is not written."""
    if prompt_format.kind == "text":
        return []
    rows, owner = data.train[:SAMPLE], prompt_format.owner
    rows = tuple(row for row in rows if _row_fault(row, tokenizer, prompt_format) is None)
    if not rows:
        return []
    example = rows[0]
    special_tokens = template_tokens(tokenizer)
    (asked,) = render_prompts([example], tokenizer, prompt_format)
    before, _ = around_answer(prompt_format, messages_of(example, prompt_format), special_tokens)
    notes = []
    if before is None:
        notes.append(
            f"the chat template of {owner} writes no answer of a conversation, so that {prompt_format.stop_token!r}"
            " ends answers."
        )
    elif before != asked + prompt_format.begin:
        same = _shared_start(before, asked)
        notes.append(
            f"the chat template of {owner} writes {before[same:]!r} before an answer of a conversation and"
            f" {asked[same:]!r} where one is asked for. Models are asked, and students taught, by the latter: what"
            f" plain generate does with the student.{_without_thought(prompt_format)}"
        )
    if prompt_format.date is not None:
        notes.append(
            f"the chat template of {owner} writes today's date: it is told {prompt_format.date.isoformat()}, and so is"
            " the student. data.date sets another."
        )
    marks = _plain_marks(prompt_format, tokenizer)
    forged = [(row.id, mark) for row in _rows(data) if (mark := _first_mark(row, marks)) is not None]
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
    """Id and reason of the rows that cannot be written."""
    faults: dict[str, str] = {}
    for rows in _by_roles(examples).values():
        reason = _kind_fault(rows[0], tokenizer, prompt_format)
        if reason is not None:
            faults |= {row.id: reason for row in rows}
            continue
        some = rows[:sample]
        reasons = {row.id: reason for row in some if (reason := _row_fault(row, tokenizer, prompt_format))}
        if len(reasons) == len(some):
            reasons = {row.id: reasons.get(row.id, reasons[some[0].id]) for row in rows}
        faults |= reasons
    return faults


def _by_roles(examples: Sequence[GenerationExample]) -> dict[tuple[str, ...], list[GenerationExample]]:
    kinds: dict[tuple[str, ...], list[GenerationExample]] = {}
    for example in examples:
        kinds.setdefault(tuple(turn.role for turn in example.turns), []).append(example)
    return kinds


def _kind_fault(example: GenerationExample, tokenizer: Any, prompt_format: PromptFormat) -> str | None:
    """Why no row with these roles can be written, looked at with a text that no template changes."""
    special_tokens = template_tokens(tokenizer)
    messages = messages_of(example, prompt_format)
    turns = [{**turn, "content": f"{PROBE}{index:02}"} for index, turn in enumerate(messages)]
    try:
        text = written(prompt_format, turns, special_tokens, guarded=True)
        again = written(prompt_format, turns, special_tokens, guarded=True)
    except DataError:
        # It may take only some texts; then the row says what is wrong.
        return _row_fault(example, tokenizer, prompt_format, guarded=True)
    if text != again:
        return "writes something else each time"
    if turns[-1]["content"] not in text:
        return "leaves out the question, as templates do whose turns are lists of text and pictures"
    return None


def _row_fault(
    example: GenerationExample, tokenizer: Any, prompt_format: PromptFormat, *, guarded: bool = False
) -> str | None:
    messages = messages_of(example, prompt_format)
    try:
        text = written(prompt_format, messages, template_tokens(tokenizer), guarded=guarded)
    except DataError as error:
        return str(error)
    return None if text else "writes nothing"


def _rows(data: GenerationData) -> list[GenerationExample]:
    return [row for split in SPLITS for row in getattr(data, split)]


def _plain_marks(prompt_format: PromptFormat, tokenizer: Any) -> list[str]:
    """What a template writes around a question that is no token of its own, so that a text can forge it."""
    words = tokenizer_info(tokenizer)
    try:
        text = written(prompt_format, [{"role": "user", "content": PROBE}], words.special_tokens, guarded=True)
    except DataError:  # it asks for other turns first
        return []
    tokens = sorted(words.markup | {PROBE}, key=len, reverse=True)
    pieces = re.split("|".join(map(re.escape, tokens)) + "|\n", text)
    marks = {piece.strip() for piece in pieces}
    return sorted(mark for mark in marks if _LONGEST_MARK >= len(mark) > 2 and set(mark) & set("<>[]|#{}"))


def _first_mark(example: GenerationExample, marks: Sequence[str]) -> str | None:
    texts = [*(turn.content for turn in example.turns), example.document or ""]
    return next((mark for mark in marks if any(mark in text for text in texts)), None)


def _left_out(example: GenerationExample, tokenizer: Any, prompt_format: PromptFormat) -> str | None:
    """The role of the first turn whose text does not stand in the prompt as it is."""
    messages = messages_of(example, prompt_format)
    text = written(prompt_format, messages, template_tokens(tokenizer))
    return next((turn["role"] for turn in messages if turn["content"] not in text), None)


def _shared_start(first: str, second: str) -> int:
    pairs: Iterator[tuple[str, str]] = zip(first, second, strict=False)
    return next((index for index, (row, other) in enumerate(pairs) if row != other), min(len(first), len(second)))


def _without_thought(prompt_format: PromptFormat) -> str:
    source = str(prompt_format.chat_template)
    if _THINKS not in source or f"set {_THINKS} =" in source:
        return ""
    return f" data.chat_variables: {{{_THINKS}: false}} asks for answers without a thought."


def _place(id_: str) -> str:
    return id_.partition("#")[0]


def _cure(data: GenerationData) -> str:
    if data.has_messages:
        return "Use a model whose template takes these turns, or give the rows as prompt and response."
    return "Set data.chat: never for a plain layout, or use a model whose template takes plain text."


def owner_tokenizer(tokenizers: Mapping[str, Any], prompt_format: PromptFormat) -> Any:
    """The tokenizer whose special tokens a chat template was written for."""
    return tokenizers.get(prompt_format.owner, next(iter(tokenizers.values())))
