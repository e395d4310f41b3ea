"""Rows as token ids: what the collator makes batches of."""

from dataclasses import dataclass
from typing import Any

from flexkd.data.examples.row_checks import BadRow

EncodedRow = dict[str, Any]
"""One row as token ids: `id`, `input_ids`, `attention_mask`, to train on also `labels`, and for some tokenizers
`token_type_ids`. The same token lists follow with `teacher_` before their names where the teacher has an encoding of
its own."""


@dataclass(frozen=True)
class Cut:
    """Rows that lost tokens because they were too long.

    Attributes:
        mean_lost_tokens: Mean number of tokens that each of these rows lost.
    """

    num_rows: int
    mean_lost_tokens: float


@dataclass(frozen=True)
class EncodedSplit:
    """The encoded rows of one split, and what happened to the others.

    Attributes:
        cut: Rows whose text, or document, was shortened to fit.
        teacher_cut: The same in the teacher's own encoding; None where the teacher reads the student's.
        dropped: Rows that do not fit, by id and reason.
        notes: What a reader of the results should know, such as doubled special tokens.
    """

    rows: list[EncodedRow]
    cut: Cut
    teacher_cut: Cut | None = None
    dropped: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()
