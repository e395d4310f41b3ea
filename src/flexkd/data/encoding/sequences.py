"""Prompts and answers to token ids: one BOS, documents cut to fit, answers whole with the token that ends them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.data.encoding.markup import Markup, markup_note
from flexkd.data.encoding.prompts import PromptFormat, has_slot_for_document, render_prompts
from flexkd.data.encoding.tokens import Cut, unchanged
from flexkd.data.encoding.words import words_of
from flexkd.data.examples.generation import GenerationExample
from flexkd.data.examples.turns import EMPTY_ANSWER
from flexkd.data.examples.validation import BadRow, count_reasons
from flexkd.errors import DataError, UnsupportedModelError


@dataclass(frozen=True)
class EncodedAnswers:
    """Rows as features for the collator.

    Attributes:
        features: `id`, `input_ids`, `attention_mask` and, for training, `labels`.
        cut: Documents that were shortened.
        dropped: Rows that do not fit, by id and reason.
        notes: What a reader has to know, such as doubled special tokens.
    """

    features: list[dict[str, Any]]
    cut: Cut
    dropped: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Prompts:
    """Ids of each prompt, None where it does not fit."""

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
) -> EncodedAnswers:
    """Encodes rows to train on.

    A decoder reads prompt, answer and the token that ends it, with labels on the last two; an encoder-decoder reads the
    prompt and has the answer as labels. A prompt that is too long loses the end of its document and nothing else.
    Answers are never cut.

    Args:
        max_length: Longest row in tokens; of an encoder-decoder, longest source. A decoder's prompt has
            `max_length - max_answer_length` of them, whatever the length of its own answer, so that training and
            generation read the same prompt.
        max_answer_length: With the token that ends the answer; a row with a longer one is dropped.

    Raises:
        DataError: Nothing is left, or the layout has no place for a text of the rows.
    """
    with unchanged(tokenizer):
        room = _room(max_length, max_answer_length, seq2seq)
        prompts = _prompts(examples, tokenizer, prompt_format, room, seq2seq)
        answers = _answers(examples, tokenizer, prompt_format, seq2seq)
    features: list[dict[str, Any]] = []
    dropped = []
    for example, prompt, answer in zip(examples, prompts.ids, answers, strict=True):
        if prompt is None or answer is None or len(answer) > max_answer_length:
            reason = EMPTY_ANSWER if answer is None else "long prompt" if prompt is None else "long answer"
            dropped.append(BadRow(example.id, reason))
            continue
        ids = prompt if seq2seq else [*prompt, *answer]
        labels = answer if seq2seq else [IGNORE_INDEX] * len(prompt) + answer
        features.append({"id": example.id, "input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    notes = _markup_notes(examples, tokenizer, prompt_format)
    return _encoded(examples, features, dropped, prompts, tokenizer, notes, (max_length, max_answer_length))


def encode_prompts(
    examples: Sequence[GenerationExample],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    *,
    max_length: int,
    max_answer_length: int,
    seq2seq: bool = False,
) -> EncodedAnswers:
    """Encodes prompts alone, token for token as `encode_generation` writes them; a decoder's batches are padded left.

    Raises:
        DataError: As `encode_generation`.
    """
    with unchanged(tokenizer):
        room = _room(max_length, max_answer_length, seq2seq)
        prompts = _prompts(examples, tokenizer, prompt_format, room, seq2seq)
    features: list[dict[str, Any]] = [
        {"id": example.id, "input_ids": ids, "attention_mask": [1] * len(ids)}
        for example, ids in zip(examples, prompts.ids, strict=True)
        if ids is not None
    ]
    dropped = [BadRow(one.id, "long prompt") for one, ids in zip(examples, prompts.ids, strict=True) if ids is None]
    notes = _markup_notes(examples, tokenizer, prompt_format)
    return _encoded(examples, features, dropped, prompts, tokenizer, notes, (max_length, max_answer_length))


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
    features: list[dict[str, Any]],
    dropped: list[BadRow],
    prompts: _Prompts,
    tokenizer: PreTrainedTokenizerBase,
    notes: list[str],
    limits: tuple[int, int],
) -> EncodedAnswers:
    if examples and not features:
        reasons = ", ".join(f"{reason}: {number:,}" for reason, number in count_reasons(dropped).items())
        raise DataError(
            f"data.max_length: no row is left of {len(examples):,} ({reasons}) with max_length = {limits[0]} and"
            f" max_answer_length = {limits[1]}. Raise them, or give shorter rows."
        )
    if prompts.num_doubled:
        notes = [*notes, f"{prompts.num_doubled:,} prompts began with more than one BOS; one is kept."]
    return EncodedAnswers(features, prompts.cut, tuple(dropped), (*notes, *_doubled_specials(features, tokenizer)))


def _markup_notes(
    examples: Sequence[GenerationExample], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> list[str]:
    markup = Markup(tokenizer, words_of(tokenizer).markup)
    rows = [(one.id, token) for one in examples if (token := markup.first_of(one)) is not None]
    return markup_note(rows, prompt_format.markup)


def _prompts(
    examples: Sequence[GenerationExample],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    room: int,
    seq2seq: bool,
) -> _Prompts:
    """Ids of all prompts; those that are too long are written again with less of their document until they fit."""
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
        shorter = [_shortened(examples[i], ends[i][keep[i] - 1]) for i in pending]
        for i, cut in zip(pending, _prompt_ids(shorter, tokenizer, prompt_format, seq2seq)[0], strict=True):
            # A text that ends elsewhere may split into more tokens at its end.
            keep[i] -= max(len(cut) - room, 0)
            ids[i] = cut if len(cut) <= room else None
    lost = [len(written[i]) - len(kept) for i in long if (kept := ids[i]) is not None]
    return _Prompts(ids, Cut(len(lost), sum(lost) / len(lost) if lost else 0.0), num_doubled)


def _shortened(example: GenerationExample, end: int) -> GenerationExample:
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
    rows = _prompts_as_served(examples, tokenizer, prompt_format, seq2seq)
    bos = tokenizer.bos_token_id
    if bos is None or (prompt_format.kind == "chat" and not seq2seq):
        # A chat template writes its BOS itself; where it writes several, so does the call that serves it.
        return rows, 0
    begins = words_of(tokenizer).begins
    ids, num_doubled = [], 0
    for row in rows:
        given = next((index for index, token in enumerate(row) if token != bos), len(row))
        num_doubled += given > 1
        ids.append(([bos] if given or begins else []) + row[given:])
    return ids, num_doubled


def _prompts_as_served(
    examples: Sequence[GenerationExample],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    seq2seq: bool,
) -> list[list[int]]:
    """Ids of prompts; special tokens that stand in a row's own texts are read as text."""
    texts = render_prompts(examples, tokenizer, prompt_format)
    rows: list[list[int]] = _tokenized(texts, tokenizer, add_special_tokens=seq2seq)["input_ids"]
    markup = _markup(tokenizer, prompt_format)
    before, after = _frame(tokenizer) if seq2seq else ([], [])
    for index, example in enumerate(examples):
        if (marked := markup.marked(example)) is not None:
            (text,) = render_prompts([marked], tokenizer, prompt_format)
            rows[index] = [*before, *markup.ids(text), *after]
    return rows


def plain_call(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, *, seq2seq: bool) -> tuple[bool, str]:
    """How a call of the tokenizer gives a plain prompt's ids: whether it adds its special tokens, and what goes before.

    Some tokenizers of decoders add an end to every text, behind which no answer begins.
    """
    if prompt_format.kind == "chat" or seq2seq:
        return True, ""
    with unchanged(tokenizer):
        before, after = _frame(tokenizer)
    begin = [tokenizer.bos_token_id] if words_of(tokenizer).begins else []
    return (True, "") if (before, after) == (begin, []) else (False, str(tokenizer.bos_token) if begin else "")


def _markup(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> Markup:
    """The special tokens that are text inside a text."""
    return Markup(tokenizer, words_of(tokenizer).markup if prompt_format.markup == "text" else ())


def _frame(tokenizer: PreTrainedTokenizerBase, *, as_target: bool = False) -> tuple[list[int], list[int]]:
    """What a tokenizer adds before and after a text by itself."""
    options = {"as_target": as_target}
    plain = list(_tokenized(["a"], tokenizer, **options)["input_ids"][0])
    framed = list(_tokenized(["a"], tokenizer, add_special_tokens=True, **options)["input_ids"][0])
    first = next(place for place in range(len(framed)) if framed[place : place + len(plain)] == plain)
    return framed[:first], framed[first + len(plain) :]


def _answers(
    examples: Sequence[GenerationExample],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    seq2seq: bool,
) -> list[list[int] | None]:
    """Ids of answers with the token that ends them; None where there is no answer."""
    texts = [example.answer + prompt_format.end for example in examples if example.answer is not None]
    if not texts:
        return [None] * len(examples)
    stop = tokenizer.convert_tokens_to_ids(prompt_format.stop_token)
    if seq2seq:
        rows = _tokenized(texts, tokenizer, as_target=True, add_special_tokens=True)["input_ids"]
    else:
        rows = _tokenized(_spaced(texts, tokenizer, prompt_format), tokenizer)["input_ids"]
    _read_markup_as_text(rows, examples, tokenizer, prompt_format, seq2seq)
    # Most tokenizers of encoder-decoders end a target by themselves, those of decoders never do.
    ended = iter([row if row[-1:] == [stop] else [*row, stop] for row in rows])
    return [None if example.answer is None else next(ended) for example in examples]


def _read_markup_as_text(
    rows: list[list[int]],
    examples: Sequence[GenerationExample],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    seq2seq: bool,
) -> None:
    """Writes those answers anew that hold special tokens: an end inside one would be learnt as an end."""
    markup = _markup(tokenizer, prompt_format)
    before, after = _frame(tokenizer, as_target=True) if seq2seq else ([], [])
    answers = [example.answer for example in examples if example.answer is not None]
    for index, answer in enumerate(answers):
        if markup.first_in(answer) is not None:
            text = markup.mark(answer) + prompt_format.end
            (text,) = [text] if seq2seq else _spaced([text], tokenizer, prompt_format)
            rows[index] = [*before, *markup.ids(text), *after]


def _spaced(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> list[str]:
    """Answers with the space before them that a prompt leaves to them, where the tokenizer writes none by itself."""
    is_chat = prompt_format.kind == "chat"
    begin = prompt_format.begin if is_chat else "" if prompt_format.layout[-1:].isspace() else " "
    if begin != " ":
        return [begin + text for text in texts]
    first = tokenizer.convert_ids_to_tokens(_tokenized(["a"], tokenizer)["input_ids"][0])[:1]
    own_space = bool(first) and str(first[0]).startswith("\N{LOWER ONE EIGHTH BLOCK}")
    return list(texts) if own_space else [f" {text}" for text in texts]


def _tokenized(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, as_target: bool = False, **options: Any
) -> Mapping[str, Any]:
    settings: dict[str, Any] = {
        "add_special_tokens": False,
        "padding": False,
        "truncation": False,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        # The tokenizer would warn of its own limit; check_lengths has judged the models' limits.
        "verbose": False,
    }
    given = {"text_target" if as_target else "text": list(texts)}
    encoded: Mapping[str, Any] = tokenizer(**given, **(settings | options))
    return encoded


def _doubled_specials(features: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    found = []
    for row in features:
        ids = row["input_ids"]
        token = next((one for one, after in pairwise(ids) if one == after and one in special), None)
        if token is not None:
            found.append((row["id"], tokenizer.convert_ids_to_tokens(token)))
    if not found:
        return []
    where, token = found[0]
    return [
        f"{len(found):,} rows hold a special token twice in a row (first {where}: {token}), written by the template."
    ]
