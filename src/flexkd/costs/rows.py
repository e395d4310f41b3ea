"""How many rows a run has and how long they are, in tokens: measured, or assumed to be the longest allowed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from transformers import PreTrainedConfig

from flexkd.core.tensors import IGNORE_INDEX, Number
from flexkd.data.encoding.cut_tokenizers import cut_tokenizer, token_counts
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.data.encoding.tokenizers import ensure_pad_token
from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.generation import GenerationData
from flexkd.data.examples.teacher_answers import with_teacher_answers
from flexkd.errors import UnsupportedModelError
from flexkd.facts.names import SPLITS
from flexkd.pipeline.job import load_tokenizers
from flexkd.recipe import Recipe
from flexkd.tasks.opening import open_task

ENCODED_ROWS: Final = 2000
"""Largest number of rows of a split that are tokenized; of a larger split, evenly spaced rows stand for all."""


@dataclass(frozen=True)
class RowLength:
    """Length of one row.

    Attributes:
        source: Tokens of the input; for a decoder those of the answer are among them.
        target: Tokens that the decoder of an encoder-decoder reads; 0 for other models.
        predictions: Number of labels.
    """

    source: int
    target: int
    predictions: int


@dataclass(frozen=True)
class Batch:
    """Shape of one batch, padded to its longest row; `predictions` is the sum over its rows."""

    num_rows: int
    source: int
    target: int
    predictions: int


@dataclass(frozen=True)
class Load:
    """Sums over rows that the cost of a forward pass over them depends on, without padding."""

    num_rows: Number = 0
    source: Number = 0
    target: Number = 0
    predictions: Number = 0
    source_squared: Number = 0
    target_squared: Number = 0
    target_source: Number = 0

    @classmethod
    def of(cls, lengths: Iterable[RowLength]) -> "Load":
        """The sums over some rows."""
        sums = [
            (1, row.source, row.target, row.predictions, row.source**2, row.target**2, row.target * row.source)
            for row in lengths
        ]
        return cls(*(sum(column) for column in zip(*sums, strict=True))) if sums else cls()

    def plus(self, other: "Load") -> "Load":
        """The load of these rows and of others together."""
        return Load(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def times(self, factor: Number) -> "Load":
        """The load of `factor` times as many such rows."""
        return Load(**{name: factor * value for name, value in vars(self).items()})


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Attributes:
        num_rows: Number of rows; None: not known.
        sample: Lengths of some rows, which stand for all.
    """

    num_rows: int | None
    sample: tuple[RowLength, ...]

    def whole(self) -> Load:
        """The load of all rows; an empty one where their number is not known."""
        return self.load(self.num_rows or 0)

    def load(self, num_rows: Number) -> Load:
        """The load of `num_rows` rows that are as long as those of the sample."""
        return Load.of(self.sample).times(num_rows / len(self.sample)) if self.sample else Load()

    def heaviest(self, num_rows: int) -> Batch:
        """A batch of the longest rows: training groups rows of similar length, so that they do meet in one batch."""
        longest = sorted(self.sample, key=lambda row: (row.source + row.target, row.predictions))[-num_rows:]
        source, target = max(row.source for row in longest), max(row.target for row in longest)
        predictions = sum(row.predictions for row in longest) * num_rows / len(longest)
        return Batch(num_rows, source, target, math.ceil(predictions))


@dataclass(frozen=True)
class RowLengths:
    """Row lengths of all splits.

    Attributes:
        splits: By name.
        labels: Number of classes; None: not known.
        vocabulary: Tokens of the student's tokenizer; None: not known.
        num_tokens: Tokens of the teacher that the student knows, where the recipe cuts them; None: all.
        notes: What was assumed.
    """

    splits: Mapping[str, Split]
    labels: int | None
    vocabulary: int | None
    notes: tuple[str, ...]
    num_tokens: int | None = None


def read_lengths(
    recipe: Recipe,
    data: ClassificationData | GenerationData | None,
    configs: Mapping[str, PreTrainedConfig],
) -> RowLengths:
    """Measure how long the rows of a recipe are, in tokens.

    Args:
        data: The rows as the preflight read them; None where they are not on this machine.
        configs: Configs of `teacher` and, where the recipe names one, `student`.
    """
    if isinstance(data, GenerationData):
        data = with_teacher_answers(data, recipe.data.teacher_answers)
    is_encoder_decoder = bool(configs["teacher"].is_encoder_decoder)
    longest = _longest(recipe, is_encoder_decoder=is_encoder_decoder)
    counts = {split: len(getattr(data, split)) if data is not None else None for split in SPLITS}
    label_names = recipe.data.label_names
    # Several stored values may mean one class.
    named = tuple(label_names.values()) if isinstance(label_names, Mapping) else label_names
    names = data.labels.names if isinstance(data, ClassificationData) else named
    labels = None if names is None else len(set(names))
    assumed = RowLengths({split: Split(count, (longest,)) for split, count in counts.items()}, labels, None, ())
    if data is None:
        return replace(assumed, notes=(f"rows: not on this machine; assumed: {_assumed(longest, recipe)}",))
    try:
        teacher, student = load_tokenizers(recipe)
    except UnsupportedModelError:
        return replace(assumed, notes=(f"rows: no tokenizer on this machine; assumed: {_assumed(longest, recipe)}",))
    for tokenizer in (teacher, student):
        ensure_pad_token(tokenizer)
    sampled = _sampled(data)
    task, _ = open_task(recipe, sampled, student, teacher, configs)
    encoded = task.encode()
    notes, splits = [], {}
    for split, rows in encoded.splits.items():
        num_tokenized, count = len(getattr(sampled, split)), counts[split]
        if count is not None and num_tokenized < count:
            notes.append(f"rows: {num_tokenized:,} of {count:,} {split} rows were tokenized and stand for all")
        sample = tuple(_length(row, recipe, is_encoder_decoder=is_encoder_decoder) for row in rows)
        # Rows that do not fit are left out of a run, so that fewer may be encoded than were tokenized.
        splits[split] = Split(round((count or 0) * len(sample) / max(num_tokenized, 1)), sample)
    if encoded.has_own_encoding:
        notes.append("rows: measured with the student's tokenizer, and assumed to be as long for the teacher")
    num_tokens = _num_tokens(recipe, encoded.splits["train"], teacher, notes)
    return RowLengths(splits, labels, len(student), tuple(notes), num_tokens)


def _num_tokens(recipe: Recipe, rows: Sequence[EncodedRow], tokenizer: Any, notes: list[str]) -> int | None:
    """Number of tokens that the student keeps; None: all."""
    size = recipe.student.vocabulary
    if size is None or isinstance(size, int):
        return size if size is None else min(size, len(tokenizer))
    counts = token_counts(rows, with_labels=recipe.generation is not None)
    num_tokens = len(cut_tokenizer(tokenizer, counts, size=None).token_ids)
    notes.append(
        f"rows: the tokenized rows use {num_tokens:,} tokens of the teacher, which the student is assumed to know"
    )
    return num_tokens


def _longest(recipe: Recipe, *, is_encoder_decoder: bool) -> RowLength:
    """The longest row that the recipe allows."""
    section = recipe.data
    if recipe.generation is None:
        return RowLength(section.max_length, 0, 1)
    return RowLength(
        section.max_length, section.max_answer_length if is_encoder_decoder else 0, section.max_answer_length
    )


def _assumed(longest: RowLength, recipe: Recipe) -> str:
    answer = f", its answer {longest.predictions} (data.max_answer_length)" if recipe.generation is not None else ""
    return f"every row has {longest.source} tokens (data.max_length){answer}"


def _sampled(data: ClassificationData | GenerationData) -> ClassificationData | GenerationData:
    """The same data with at most `ENCODED_ROWS` rows in a split, evenly spaced."""
    changes: dict[str, Any] = {}
    for split in SPLITS:
        rows = getattr(data, split)
        changes[split] = rows[:: max(1, -(-len(rows) // ENCODED_ROWS))]
    return replace(data, **changes)


def _length(row: EncodedRow, recipe: Recipe, *, is_encoder_decoder: bool) -> RowLength:
    source, labels = len(row["input_ids"]), row["labels"]
    if recipe.generation is None:
        return RowLength(source, 0, 1)
    if is_encoder_decoder:
        return RowLength(source, len(labels), len(labels))
    return RowLength(source, 0, sum(label != IGNORE_INDEX for label in labels))
