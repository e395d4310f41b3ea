"""Examples to token ids for each of the two models, with lengths checked, cuts counted and a pad token chosen."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.data.encoding.vocabulary import check_room
from flexkd.data.examples.classification import Example
from flexkd.data.examples.labels import LabelSpace
from flexkd.errors import DataError, VocabularyError

logger = logging.getLogger(__name__)

TEACHER_PREFIX: Final = "teacher_"
"""Begins the keys of the teacher's own encoding."""

_PAD_NAMES: Final = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|PAD_TOKEN|>", "<|vision_pad|>")


@dataclass(frozen=True)
class Cut:
    """Rows that were longer than the maximum, and the mean number of tokens that each of them lost."""

    rows: int
    mean_lost_tokens: float


@dataclass(frozen=True)
class Encoded:
    """Rows as features for the collator.

    Attributes:
        features: `id`, `labels`, `input_ids`, `attention_mask`, perhaps `token_type_ids`, and the same three with
            `teacher_` before them where the teacher has an encoding of its own.
        teacher_cut: None where the teacher reads the student's encoding.
    """

    features: list[dict[str, Any]]
    cut: Cut
    teacher_cut: Cut | None = None


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    labels: LabelSpace,
    max_length: int,
    prefix: str = "",
    token_type_ids: bool | None = None,
) -> Encoded:
    """Encodes all examples for one model.

    A text over `max_length` loses its end, in a pair the longer text first. A row without a label gets -100, or NaN
    where labels are floats.

    Args:
        prefix: Begins the keys of the token lists.
        token_type_ids: None: as the tokenizer's own model takes them.

    Raises:
        DataError: `max_length` leaves no room for text, or a row has no token.
    """
    tokens, cut = _tokens(examples, tokenizer, max_length, token_type_ids)
    features: list[dict[str, Any]] = [
        {"id": example.id, "labels": _target(example, labels)} | {f"{prefix}{key}": row[key] for key in row}
        for example, row in zip(examples, tokens, strict=True)
    ]
    return Encoded(features, cut)


def encode_for_both(
    examples: Sequence[Example],
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    labels: LabelSpace,
    max_length: int,
    token_type_ids: bool | None = None,
) -> Encoded:
    """Encodes all examples for student and teacher: once where the tokenizers agree, else each with its own.

    Args:
        token_type_ids: Of a shared encoding: whether either model takes them. None: as either tokenizer says.

    Raises:
        DataError: As `encode`.
    """
    if same_tokenizer(student_tokenizer, teacher_tokenizer):
        if token_type_ids is None:
            token_type_ids = _takes_types(student_tokenizer) or _takes_types(teacher_tokenizer)
        return encode(examples, student_tokenizer, labels=labels, max_length=max_length, token_type_ids=token_type_ids)
    student = encode(examples, student_tokenizer, labels=labels, max_length=max_length)
    teacher = encode(examples, teacher_tokenizer, labels=labels, max_length=max_length, prefix=TEACHER_PREFIX)
    both = [own | other for own, other in zip(student.features, teacher.features, strict=True)]
    return Encoded(both, student.cut, teacher.cut)


def same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every text the same ids and pad with the same id on the same side."""
    if first is second:
        return True
    if first.pad_token_id != second.pad_token_id or first.padding_side != second.padding_side:
        return False
    if first.is_fast and second.is_fast:
        return _definition(first) == _definition(second)
    # Slow tokenizers keep their rules in code, so that only class, vocabulary and settings can be compared.
    settings = [(type(t), t.get_vocab(), t.special_tokens_map, _plain_settings(t)) for t in (first, second)]
    return settings[0] == settings[1]


def check_lengths(
    max_length: int, limits: Mapping[str, int | None], *, soft_limits: Mapping[str, int | None] | None = None
) -> None:
    """Compares `max_length` with what each model can read.

    Args:
        max_length: In tokens.
        limits: Model name -> positions it has; a longer row would fail deep inside training. None: no limit.
        soft_limits: Model name -> positions it was trained on; a longer row runs, and is read badly (rotary models).

    Raises:
        DataError: Names every model whose limit is below `max_length`.
    """
    over = {name: limit for name, limit in limits.items() if limit is not None and max_length > limit}
    if over:
        models = ", ".join(f"{name} reads {limit}" for name, limit in over.items())
        least = min(over.values())
        raise DataError(f"data.max_length: {max_length} tokens are too many: {models}. Set it to {least} or less.")
    for name, limit in (soft_limits or {}).items():
        if limit is not None and max_length > limit:
            logger.warning(
                "data.max_length: %d tokens, but %s was trained on %d: longer rows are read badly, without an error."
                " Set it to %d or less.",
                max_length, name, limit, limit,
            )  # fmt: skip


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Gives a tokenizer without a pad token one out of its own vocabulary; the vocabulary never grows.

    Padding is masked by length, so that any token would do for attention. A decoder with a classification head finds
    the last token of a row by the pad id, though: a token that no text holds is the best choice, the end of text the
    next. Write `tokenizer.pad_token_id` to the configuration of each model that reads the padded batch.

    Returns:
        What was chosen and why, as it was logged; None when the tokenizer has a pad token.

    Raises:
        VocabularyError: The vocabulary has no token to pad with.
    """
    if tokenizer.pad_token_id is not None:
        return None
    vocabulary = tokenizer.get_vocab()
    reserved = next((name for name in _PAD_NAMES if name in vocabulary), None)
    choices = (
        (reserved, "the vocabulary reserves it for padding"),
        (tokenizer.eos_token, "the vocabulary reserves none for padding, and texts do not hold the end of text"),
        (tokenizer.unk_token, "the vocabulary has neither a token for padding nor one for the end of text"),
    )
    token, reason = next(((token, why) for token, why in choices if token in vocabulary), (None, ""))
    if token is None:
        raise VocabularyError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}: no pad, end-of-text or unknown token."
            " Set pad_token in its folder to a token of its vocabulary."
        )
    size = len(tokenizer)
    tokenizer.pad_token = str(token)
    assert len(tokenizer) == size
    message = f"pad token set to '{token}' (id {tokenizer.pad_token_id}): {reason}"
    logger.warning("tokenizer %s: %s.", tokenizer.name_or_path or type(tokenizer).__name__, message)
    return message


def _tokens(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, types: bool | None
) -> tuple[list[dict[str, list[int]]], Cut]:
    """Token lists of all rows. The few long rows are encoded twice, which is cheaper than truncation with overflow."""
    is_pair = bool(examples) and len(examples[0].texts) == 2
    num_special = tokenizer.num_special_tokens_to_add(pair=is_pair)
    check_room(max_length, num_special)
    types = _takes_types(tokenizer) if types is None else types
    with unchanged(tokenizer):
        rows = _batch(examples, tokenizer, types, None)
        lengths = [len(row["input_ids"]) for row in rows]
        long = [index for index, length in enumerate(lengths) if length > max_length]
        for index, row in zip(long, _batch([examples[i] for i in long], tokenizer, types, max_length), strict=True):
            rows[index] = row
    empty = next((example.id for example, length in zip(examples, lengths, strict=True) if length == 0), None)
    if empty is not None:
        raise DataError(f"{empty}: the tokenizer finds no token in this row. Remove the row.")
    lost = sum(lengths[index] - len(rows[index]["input_ids"]) for index in long)
    return rows, Cut(len(long), lost / len(long) if long else 0.0)


def _batch(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, types: bool, max_length: int | None
) -> list[dict[str, list[int]]]:
    if not examples:
        return []
    first, *second = (list(texts) for texts in zip(*(example.texts for example in examples), strict=True))
    encoded = tokenizer(
        first,
        second[0] if second else None,
        padding=False,
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=True,
        return_token_type_ids=types,
        # The tokenizer would warn of its own limit; check_lengths has judged the models' limits.
        verbose=False,
    )
    keys = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    return [dict(zip(keys, row, strict=True)) for row in zip(*(encoded[key] for key in keys), strict=True)]


@contextmanager
def unchanged(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Cuts at the end, whatever the tokenizer's default, and leaves no trace: its state is saved with the student."""
    side = tokenizer.truncation_side
    fast: Any = tokenizer
    backend = fast.backend_tokenizer if tokenizer.is_fast else None
    truncation, padding = (backend.truncation, backend.padding) if backend else (None, None)
    tokenizer.truncation_side = "right"
    try:
        yield
    finally:
        tokenizer.truncation_side = side
        if backend:
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
            backend.no_padding() if padding is None else backend.enable_padding(**padding)


def _target(example: Example, labels: LabelSpace) -> int | float | list[float]:
    if labels.problem == "single_label":
        return IGNORE_INDEX if example.label is None else int(example.label)  # type: ignore[arg-type]
    if labels.problem == "regression":
        return float("nan") if example.label is None else float(example.label)  # type: ignore[arg-type]
    return [float("nan")] * len(labels.names) if example.label is None else list(example.label)  # type: ignore[arg-type]


def _takes_types(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "token_type_ids" in tokenizer.model_input_names


def _definition(tokenizer: Any) -> dict[str, Any]:
    """All rules and the vocabulary, without the state that the last call left."""
    stored: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in stored.items() if key not in ("truncation", "padding", "version")}


def _plain_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    return {
        key: value for key, value in tokenizer.init_kwargs.items() if isinstance(value, bool | int) or value is None
    }
