"""Prompts and answers to token ids: one BOS, documents shortened to fit, whole answers with their end token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.data.encoding.encoded import Cut, EncodedRow, EncodedSplit
from flexkd.data.encoding.markup import Markup, markup_note
from flexkd.data.encoding.prompts import PromptFormat, has_slot_for_document, render_prompts
from flexkd.data.encoding.tokenizers import tokenizer_info, truncating_right
from flexkd.data.examples.generation import GenerationExample
from flexkd.data.examples.row_checks import BadRow, count_reasons
from flexkd.data.examples.turns import EMPTY_ANSWER
from flexkd.errors import DataError, UnsupportedModelError


@dataclass(frozen=True)
class _Prompts:
    """Encoded prompts.

    Attributes:
        ids: Token ids of each prompt; None where it does not fit.
        cut: Prompts whose document was shortened.
        num_doubled: Prompts that began with more than one BOS.
    """

    ids: list[list[int] | None]
    cut: Cut
    num_doubled: int


def encode_generation(
    examples: Sequence[GenerationExample],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    *,
    max_length: int,
    max_answer_length: int,
    seq2seq: bool = False,
) -> EncodedSplit:
    """Encode rows to train on.

    A decoder reads the prompt, the answer and its end token, with labels on the last two; an encoder-decoder reads the
    prompt and has the answer as labels. A prompt that is too long loses the end of its document and nothing else.
    Answers are never cut.

    Args:
        max_length: Longest row in tokens; for an encoder-decoder, longest source. A decoder's prompt may have
            `max_length - max_answer_length` tokens, however short its answer, so that training and generation read the
            same prompt.
        max_answer_length: Longest answer in tokens, its end token included; rows with longer answers are dropped.
        seq2seq: The model is an encoder-decoder.

    Raises:
        DataError: No row is left, or the layout has no slot for a text of the rows.
    """
    with truncating_right(tokenizer):
        room = _room(max_length, max_answer_length, seq2seq)
        prompts = _prompts(examples, tokenizer, prompt_format, room, seq2seq)
        answers = _answers(examples, tokenizer, prompt_format, seq2seq)
    rows: list[EncodedRow] = []
    dropped = []
    for example, prompt, answer in zip(examples, prompts.ids, answers, strict=True):
        if prompt is None or answer is None or len(answer) > max_answer_length:
            reason = EMPTY_ANSWER if answer is None else "long prompt" if prompt is None else "long answer"
            dropped.append(BadRow(example.id, reason))
            continue
        ids = prompt if seq2seq else [*prompt, *answer]
        labels = answer if seq2seq else [IGNORE_INDEX] * len(prompt) + answer
        rows.append({"id": example.id, "input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    notes = _markup_notes(examples, tokenizer, prompt_format)
    return _encoded(examples, rows, dropped, prompts, tokenizer, notes, (max_length, max_answer_length))


def encode_prompts(
    examples: Sequence[GenerationExample],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    *,
    max_length: int,
    max_answer_length: int,
    seq2seq: bool = False,
) -> EncodedSplit:
    """Encode prompts alone, token for token as in `encode_generation`; a decoder needs them padded on the left.

    Raises:
        DataError: As `encode_generation`.
    """
    with truncating_right(tokenizer):
        room = _room(max_length, max_answer_length, seq2seq)
        prompts = _prompts(examples, tokenizer, prompt_format, room, seq2seq)
    rows: list[EncodedRow] = [
        {"id": example.id, "input_ids": ids, "attention_mask": [1] * len(ids)}
        for example, ids in zip(examples, prompts.ids, strict=True)
        if ids is not None
    ]
    dropped = [
        BadRow(example.id, "long prompt") for example, ids in zip(examples, prompts.ids, strict=True) if ids is None
    ]
    notes = _markup_notes(examples, tokenizer, prompt_format)
    return _encoded(examples, rows, dropped, prompts, tokenizer, notes, (max_length, max_answer_length))


def _room(max_length: int, max_answer_length: int, seq2seq: bool) -> int:
    room = max_length if seq2seq else max_length - max_answer_length
    if room < 1:
        raise DataError(
            f"data.max_answer_length: {max_answer_length} leaves no room for a prompt in max_length = {max_length}."
            " Lower it."
        )
    return room


def _encoded(
    examples: Sequence[GenerationExample],
    rows: list[EncodedRow],
    dropped: list[BadRow],
    prompts: _Prompts,
    tokenizer: PreTrainedTokenizerBase,
    notes: list[str],
    limits: tuple[int, int],
) -> EncodedSplit:
    if examples and not rows:
        reasons = ", ".join(f"{reason}: {number:,}" for reason, number in count_reasons(dropped).items())
        raise DataError(
            f"data.max_length: no row is left of {len(examples):,} ({reasons}) with max_length = {limits[0]} and"
            f" max_answer_length = {limits[1]}. Raise them, or give shorter rows."
        )
    if prompts.num_doubled:
        notes = [*notes, f"{prompts.num_doubled:,} prompts began with more than one BOS; one is kept."]
    notes = [*notes, *_doubled_specials(rows, tokenizer)]
    return EncodedSplit(rows, prompts.cut, dropped=tuple(dropped), notes=tuple(notes))


def _markup_notes(
    examples: Sequence[GenerationExample], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> list[str]:
    markup = Markup(tokenizer, tokenizer_info(tokenizer).markup)
    first_tokens = [(example.id, markup.first_of(example)) for example in examples]
    occurrences = [(row_id, token) for row_id, token in first_tokens if token is not None]
    return markup_note(occurrences, prompt_format.markup)


def _prompts(
    examples: Sequence[GenerationExample],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    room: int,
    seq2seq: bool,
) -> _Prompts:
    """Ids of all prompts; those that are too long are encoded again with less of their document until they fit.

    Args:
        room: Longest prompt in tokens.
    """
    without_slot = [example.id for example in examples if example.document is not None]
    if without_slot and not has_slot_for_document(prompt_format):
        raise DataError(
            f"data.template: no place for {{context}} or {{document}}, which {len(without_slot):,} rows hold (first"
            f" {without_slot[0]}). Add it, or name no such column."
        )
    written, num_doubled = _prompt_ids(examples, tokenizer, prompt_format, seq2seq)
    ids: list[list[int] | None] = [row if len(row) <= room else None for row in written]
    long = [i for i, row in enumerate(ids) if row is None and examples[i].document]
    ends = dict(zip(long, _token_ends([examples[i].document or "" for i in long], tokenizer), strict=True))
    # How many tokens of each document may stay.
    keep = {i: len(ends[i]) - (len(written[i]) - room) for i in long}
    while pending := [i for i in long if ids[i] is None and keep[i] > 0]:
        shorter = [_shorten(examples[i], ends[i][keep[i] - 1]) for i in pending]
        for i, cut in zip(pending, _prompt_ids(shorter, tokenizer, prompt_format, seq2seq)[0], strict=True):
            # A text that ends elsewhere may split into more tokens at its end.
            keep[i] -= max(len(cut) - room, 0)
            ids[i] = cut if len(cut) <= room else None
    lost = [len(written[i]) - len(shortened) for i in long if (shortened := ids[i]) is not None]
    return _Prompts(ids, Cut(len(lost), sum(lost) / len(lost) if lost else 0.0), num_doubled)


def _shorten(example: GenerationExample, end: int) -> GenerationExample:
    return replace(example, document=(example.document or "")[:end].rstrip())


def _token_ends(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """For each text, the character at which each of its tokens ends."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}: it does not say where tokens end, so that"
            f" {len(texts):,} rows over data.max_length cannot be cut. Raise data.max_length, or give a fast tokenizer."
        )
    encoded = _tokenized(texts, tokenizer, return_offsets_mapping=True)
    return [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]


def _prompt_ids(
    examples: Sequence[GenerationExample],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    seq2seq: bool,
) -> tuple[list[list[int]], int]:
    """Ids of prompts, each with one BOS where the tokenizer uses one, and how many prompts held several."""
    if not examples:
        return [], 0
    prompts = _served_prompts(examples, tokenizer, prompt_format, seq2seq)
    bos = tokenizer.bos_token_id
    if bos is None or (prompt_format.kind == "chat" and not seq2seq):
        # A chat template writes its BOS itself; where it writes several, so does the call that serves it.
        return prompts, 0
    adds_bos = tokenizer_info(tokenizer).adds_bos
    ids, num_doubled = [], 0
    for prompt in prompts:
        num_bos = next((index for index, token in enumerate(prompt) if token != bos), len(prompt))
        num_doubled += num_bos > 1
        ids.append(([bos] if num_bos or adds_bos else []) + prompt[num_bos:])
    return ids, num_doubled


def _served_prompts(
    examples: Sequence[GenerationExample],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    seq2seq: bool,
) -> list[list[int]]:
    """Token ids of prompts as a server reads them; special tokens in the texts of a row are read as text."""
    texts = render_prompts(examples, tokenizer, prompt_format)
    ids: list[list[int]] = _tokenized(texts, tokenizer, add_special_tokens=seq2seq)["input_ids"]
    markup = _markup(tokenizer, prompt_format)
    prefix, suffix = _added_tokens(tokenizer) if seq2seq else ([], [])
    for index, example in enumerate(examples):
        if (marked := markup.marked(example)) is not None:
            (text,) = render_prompts([marked], tokenizer, prompt_format)
            ids[index] = [*prefix, *markup.ids(text), *suffix]
    return ids


def plain_call(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, *, seq2seq: bool) -> tuple[bool, str]:
    """How to call the tokenizer so that it gives the ids of a plain prompt.

    Some tokenizers of decoders add an end token to every text, after which no answer can begin.

    Returns:
        The argument `add_special_tokens`, and what to write before the prompt.
    """
    if prompt_format.kind == "chat" or seq2seq:
        return True, ""
    with truncating_right(tokenizer):
        prefix, suffix = _added_tokens(tokenizer)
    begin = [tokenizer.bos_token_id] if tokenizer_info(tokenizer).adds_bos else []
    return (True, "") if (prefix, suffix) == (begin, []) else (False, str(tokenizer.bos_token) if begin else "")


def _markup(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> Markup:
    """The special tokens that are read as text inside the texts of rows."""
    return Markup(tokenizer, tokenizer_info(tokenizer).markup if prompt_format.markup == "text" else ())


def _added_tokens(tokenizer: PreTrainedTokenizerBase, *, as_target: bool = False) -> tuple[list[int], list[int]]:
    """Token ids that a tokenizer adds before and after every text."""
    options = {"as_target": as_target}
    plain = list(_tokenized(["a"], tokenizer, **options)["input_ids"][0])
    framed = list(_tokenized(["a"], tokenizer, add_special_tokens=True, **options)["input_ids"][0])
    first = next(index for index in range(len(framed)) if framed[index : index + len(plain)] == plain)
    return framed[:first], framed[first + len(plain) :]


def _answers(
    examples: Sequence[GenerationExample],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    seq2seq: bool,
) -> list[list[int] | None]:
    """Token ids of each answer with its end token; None where a row has no answer."""
    texts = [example.answer + prompt_format.end for example in examples if example.answer is not None]
    if not texts:
        return [None] * len(examples)
    stop = tokenizer.convert_tokens_to_ids(prompt_format.stop_token)
    if seq2seq:
        ids = _tokenized(texts, tokenizer, as_target=True, add_special_tokens=True)["input_ids"]
    else:
        ids = _tokenized(_spaced(texts, tokenizer, prompt_format), tokenizer)["input_ids"]
    _read_markup_as_text(ids, examples, tokenizer, prompt_format, seq2seq)
    # Most tokenizers of encoder-decoders end a target by themselves, those of decoders never do.
    with_ends = iter([tokens if tokens[-1:] == [stop] else [*tokens, stop] for tokens in ids])
    return [None if example.answer is None else next(with_ends) for example in examples]


def _read_markup_as_text(
    ids: list[list[int]],
    examples: Sequence[GenerationExample],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    seq2seq: bool,
) -> None:
    """Encode answers that hold special tokens again, in place: an end token inside one would be learnt as its end."""
    markup = _markup(tokenizer, prompt_format)
    prefix, suffix = _added_tokens(tokenizer, as_target=True) if seq2seq else ([], [])
    answers = [example.answer for example in examples if example.answer is not None]
    for index, answer in enumerate(answers):
        if markup.first_in(answer) is not None:
            text = markup.mark(answer) + prompt_format.end
            (text,) = [text] if seq2seq else _spaced([text], tokenizer, prompt_format)
            ids[index] = [*prefix, *markup.ids(text), *suffix]


def _spaced(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> list[str]:
    """Answers with the white space that the prompt leaves to them, unless the tokenizer adds a space by itself."""
    is_chat = prompt_format.kind == "chat"
    begin = prompt_format.begin if is_chat else "" if prompt_format.layout[-1:].isspace() else " "
    if begin != " ":
        return [begin + text for text in texts]
    first = tokenizer.convert_ids_to_tokens(_tokenized(["a"], tokenizer)["input_ids"][0])[:1]
    adds_space = bool(first) and str(first[0]).startswith("\N{LOWER ONE EIGHTH BLOCK}")
    return list(texts) if adds_space else [f" {text}" for text in texts]


def _tokenized(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, as_target: bool = False, **options: Any
) -> Mapping[str, Any]:
    settings: dict[str, Any] = {
        "add_special_tokens": False,
        "padding": False,
        "truncation": False,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        # The tokenizer would warn of its own limit; check_lengths has compared the models' limits.
        "verbose": False,
    }
    inputs = {"text_target" if as_target else "text": list(texts)}
    encoded: Mapping[str, Any] = tokenizer(**inputs, **(settings | options))
    return encoded


def _doubled_specials(rows: Sequence[EncodedRow], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    doubled = []
    for row in rows:
        pairs = pairwise(row["input_ids"])
        token = next((token for token, following in pairs if token == following and token in special), None)
        if token is not None:
            doubled.append((row["id"], tokenizer.convert_ids_to_tokens(token)))
    if not doubled:
        return []
    where, token = doubled[0]
    return [
        f"{len(doubled):,} rows hold a special token twice in a row (first {where}: {token}), written by the template."
    ]
