"""Texts of classification examples to token ids, once for both models or for each with its own tokenizer."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.data.encoding.encoded import Cut, EncodedRow, EncodedSplit
from flexkd.data.encoding.tokenizers import same_tokenizer, truncating_right
from flexkd.data.encoding.vocabulary import check_room
from flexkd.data.examples.classification import Example
from flexkd.data.examples.labels import LabelSpace
from flexkd.errors import DataError
from flexkd.facts.names import TEACHER_PREFIX


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    labels: LabelSpace,
    max_length: int,
    prefix: str = "",
    token_type_ids: bool | None = None,
) -> EncodedSplit:
    """Encode all examples for one model.

    A text over `max_length` loses its end; of a pair, the longer text is shortened first. The label of a row without
    one is -100, or NaN where labels are floats.

    Args:
        max_length: In tokens, special tokens included.
        prefix: Begins the names of the token lists.
        token_type_ids: Whether rows get them; None: where the tokenizer's own model takes them.

    Raises:
        DataError: `max_length` leaves no room for text, or a row has no token.
    """
    tokens, cut = _tokens(examples, tokenizer, max_length, token_type_ids)
    rows: list[EncodedRow] = [
        {"id": example.id, "labels": _target(example, labels)} | {f"{prefix}{key}": row[key] for key in row}
        for example, row in zip(examples, tokens, strict=True)
    ]
    return EncodedSplit(rows, cut)


def encode_for_both(
    examples: Sequence[Example],
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    labels: LabelSpace,
    max_length: int,
    token_type_ids: bool | None = None,
) -> EncodedSplit:
    """Encode all examples for student and teacher: once where the tokenizers agree, else each with its own.

    Args:
        token_type_ids: Whether rows of a shared encoding get them; None: where either tokenizer's model takes them.

    Raises:
        DataError: As `encode`.
    """
    if same_tokenizer(student_tokenizer, teacher_tokenizer):
        if token_type_ids is None:
            token_type_ids = _takes_types(student_tokenizer) or _takes_types(teacher_tokenizer)
        return encode(examples, student_tokenizer, labels=labels, max_length=max_length, token_type_ids=token_type_ids)
    student = encode(examples, student_tokenizer, labels=labels, max_length=max_length)
    teacher = encode(examples, teacher_tokenizer, labels=labels, max_length=max_length, prefix=TEACHER_PREFIX)
    rows = [student_row | teacher_row for student_row, teacher_row in zip(student.rows, teacher.rows, strict=True)]
    return EncodedSplit(rows, student.cut, teacher.cut)


def _tokens(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, types: bool | None
) -> tuple[list[dict[str, list[int]]], Cut]:
    """Token lists of all rows; the few long rows are encoded twice, which is cheaper than truncation with overflow."""
    is_pair = bool(examples) and len(examples[0].texts) == 2
    num_special = tokenizer.num_special_tokens_to_add(pair=is_pair)
    check_room(max_length, num_special)
    types = _takes_types(tokenizer) if types is None else types
    with truncating_right(tokenizer):
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
        # The tokenizer would warn of its own limit; check_lengths has compared the models' limits.
        verbose=False,
    )
    keys = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    return [dict(zip(keys, row, strict=True)) for row in zip(*(encoded[key] for key in keys), strict=True)]


def _target(example: Example, labels: LabelSpace) -> int | float | list[float]:
    if labels.problem == "single_label":
        return IGNORE_INDEX if example.label is None else int(example.label)  # type: ignore[arg-type]
    if labels.problem == "regression":
        return float("nan") if example.label is None else float(example.label)  # type: ignore[arg-type]
    return [float("nan")] * len(labels.names) if example.label is None else list(example.label)  # type: ignore[arg-type]


def _takes_types(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "token_type_ids" in tokenizer.model_input_names
