"""How many rows a run has and how long they are, in tokens: from the rows themselves, or at their longest."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from transformers import PreTrainedConfig

from flexkd.core.tensors import IGNORE_INDEX, Number
from flexkd.data.encoding.tokenizers import ensure_pad_token
from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.generation import GenerationData
from flexkd.data.examples.teacher_answers import with_teacher_answers
from flexkd.errors import UnsupportedModelError
from flexkd.facts.names import SPLITS
from flexkd.pipeline.job import load_tokenizers, open_task
from flexkd.recipe import Recipe

ENCODED_ROWS: Final = 2000
"""Rows of a split that are written as tokens; of more, evenly spaced ones stand for all."""


@dataclass(frozen=True)
class Row:
    """One row in tokens.

    Attributes:
        source: Tokens that are read, of a decoder those of the answer among them.
        target: Tokens that the decoder of an encoder-decoder reads; 0 for others.
        predictions: Labels.
    """

    source: int
    target: int
    predictions: int


@dataclass(frozen=True)
class Batch:
    """Rows of one forward, padded to the longest; `predictions` are those of all of them together."""

    rows: int
    source: int
    target: int
    predictions: int


@dataclass(frozen=True)
class Load:
    """What the cost of passing some rows through a model depends on: sums over the rows, padding not among them."""

    rows: Number = 0
    source: Number = 0
    target: Number = 0
    predictions: Number = 0
    source_squared: Number = 0
    target_squared: Number = 0
    target_source: Number = 0

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Load":
        """The sums over rows."""
        sums = [
            (1, row.source, row.target, row.predictions, row.source**2, row.target**2, row.target * row.source)
            for row in rows
        ]
        return cls(*(sum(column) for column in zip(*sums, strict=True))) if sums else cls()

    def plus(self, other: "Load") -> "Load":
        """These rows and others."""
        return Load(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def times(self, factor: Number) -> "Load":
        """So many times these rows."""
        return Load(**{name: factor * value for name, value in vars(self).items()})


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Attributes:
        rows: How many; None: not known.
        sample: Some of them, which stand for all.
    """

    rows: int | None
    sample: tuple[Row, ...]

    def whole(self) -> Load:
        """Of all rows; of none where they are not counted."""
        return self.load(self.rows or 0)

    def load(self, rows: Number) -> Load:
        """Of so many rows as those of the sample are."""
        return Load.of(self.sample).times(rows / len(self.sample)) if self.sample else Load()

    def heaviest(self, rows: int) -> "Batch":
        """A batch of so many of the longest rows: training puts rows of one length together."""
        longest = sorted(self.sample, key=lambda row: (row.source + row.target, row.predictions))[-rows:]
        predictions = sum(row.predictions for row in longest) * rows / len(longest)
        return Batch(
            rows, max(row.source for row in longest), max(row.target for row in longest), math.ceil(predictions)
        )


@dataclass(frozen=True)
class Rows:
    """All splits, and what was assumed of them."""

    splits: Mapping[str, Split]
    labels: int | None
    vocabulary: int | None
    notes: tuple[str, ...]


def read_lengths(
    recipe: Recipe,
    data: ClassificationData | GenerationData | None,
    configs: Mapping[str, PreTrainedConfig],
) -> Rows:
    """Rows in tokens.

    Args:
        data: The rows as the preflight read them; None where they are not on this machine.
        configs: Of `teacher` and, where it is named, `student`.
    """
    if isinstance(data, GenerationData):
        data = with_teacher_answers(data, recipe.data.teacher_answers)
    is_encoder_decoder = bool(configs["teacher"].is_encoder_decoder)
    longest = _longest(recipe, is_encoder_decoder=is_encoder_decoder)
    counts = {split: len(getattr(data, split)) if data is not None else None for split in SPLITS}
    label_names = recipe.data.label_names
    # Several stored values may be one class.
    named = tuple(label_names.values()) if isinstance(label_names, Mapping) else label_names
    names = data.labels.names if isinstance(data, ClassificationData) else named
    labels = None if names is None else len(set(names))
    assumed = Rows({split: Split(count, (longest,)) for split, count in counts.items()}, labels, None, ())
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
    for split, features in encoded.splits.items():
        tried, count = len(getattr(sampled, split)), counts[split]
        if count is not None and tried < count:
            notes.append(f"rows: {tried:,} of {count:,} {split} rows were written as tokens; they stand for all")
        sample = tuple(_row(example, recipe, is_encoder_decoder=is_encoder_decoder) for example in features)
        # Rows that do not fit are left out of a run.
        splits[split] = Split(round((count or 0) * len(sample) / max(tried, 1)), sample)
    if encoded.has_own_encoding:
        notes.append("rows: as long for the teacher as for the student, whose tokenizer was asked")
    return Rows(splits, labels, len(student), tuple(notes))


def _longest(recipe: Recipe, *, is_encoder_decoder: bool) -> Row:
    section = recipe.data
    if recipe.generation is None:
        return Row(section.max_length, 0, 1)
    return Row(section.max_length, section.max_answer_length if is_encoder_decoder else 0, section.max_answer_length)


def _assumed(longest: Row, recipe: Recipe) -> str:
    answer = f", its answer {longest.predictions} (data.max_answer_length)" if recipe.generation is not None else ""
    return f"every row has {longest.source} tokens (data.max_length){answer}"


def _sampled(data: ClassificationData | GenerationData) -> ClassificationData | GenerationData:
    """The same data with at most `ENCODED_ROWS` rows in a split, evenly spaced."""
    changes: dict[str, Any] = {}
    for split in SPLITS:
        rows = getattr(data, split)
        changes[split] = rows[:: max(1, -(-len(rows) // ENCODED_ROWS))]
    return replace(data, **changes)


def _row(features: Mapping[str, Any], recipe: Recipe, *, is_encoder_decoder: bool) -> Row:
    source, labels = len(features["input_ids"]), features["labels"]
    if recipe.generation is None:
        return Row(source, 0, 1)
    if is_encoder_decoder:
        return Row(source, len(labels), len(labels))
    return Row(source, 0, sum(label != IGNORE_INDEX for label in labels))
