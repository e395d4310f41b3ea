"""Checks between tokenizers and models: shared tokens, token ids within the embeddings, rows within the positions."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from flexkd.data.encoding.encoded import EncodedRow
from flexkd.errors import DataError, VocabularyError

logger = logging.getLogger(__name__)

_CONFLICTS_SHOWN: Final = 5


class HasVocabulary(Protocol):
    """A tokenizer, loaded or read from its file alone."""

    def get_vocab(self) -> Mapping[str, int]:
        """Tokens to ids."""


@dataclass(frozen=True)
class SharedVocabulary:
    """The tokens that both models predict.

    Attributes:
        size: Columns of the logits that both models keep.
        note: How many columns are cut and why; None where none are.
    """

    size: int
    note: str | None = None


def one_tokenizer_error() -> VocabularyError:
    """The error of `positions: tokens` where the two models read different tokens, so that states do not pair up."""
    return VocabularyError(
        "objective.features.positions: 'tokens' needs one tokenizer for teacher and student, which encode the "
        "same text differently here. Use positions 'supervised', or give both the same tokenizer."
    )


def compare_vocabularies(
    teacher_tokenizer: HasVocabulary,
    student_tokenizer: HasVocabulary,
    teacher_outputs: int,
    student_outputs: int,
) -> SharedVocabulary:
    """The ids that mean the same token to both models.

    Models of one family may pad their output to different widths, and one may have more special tokens at the end:
    columns that only one model has are cut. Below that, every id must mean the same token.

    Args:
        teacher_outputs: Columns of the teacher's logits.
        student_outputs: Columns of the student's logits.

    Raises:
        VocabularyError: An id means two tokens, or a token has two ids.
    """
    tokenizers = (teacher_tokenizer, student_tokenizer)
    teacher, student = ({i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in tokenizers)
    size = min(max(teacher) + 1, max(student) + 1, teacher_outputs, student_outputs)
    conflicts = [i for i in range(size) if teacher.get(i) != student.get(i)]
    if conflicts:
        shown = [
            f"id {i}, {_quoted(teacher.get(i))} vs {_quoted(student.get(i))}" for i in conflicts[:_CONFLICTS_SHOWN]
        ]
        more = "; ..." if len(conflicts) > _CONFLICTS_SHOWN else ""
        raise VocabularyError(
            f"teacher and student disagree on {len(conflicts):,} of {size:,} tokens ({'; '.join(shown)}{more})."
            " Losses on tokens need one tokenizer: take models of one family, or a student sliced from the teacher."
            " Across tokenizers, classification works, and so does training on the teacher's answers as text: flexkd"
            " generate with this teacher, then a recipe with data.teacher_answers, objective.baseline: true and the"
            " student's own model as teacher."
        )
    cuts = {"teacher": teacher_outputs - size, "student": student_outputs - size}
    if not any(cuts.values()):
        return SharedVocabulary(size)
    outputs = f"the teacher has {teacher_outputs:,} outputs, the student {student_outputs:,}"
    columns = f"{cuts['teacher']:,} columns of the teacher and {cuts['student']:,} of the student"
    note = f"{outputs}, and both know {size:,} tokens: {columns} are cut before probabilities are taken."
    return SharedVocabulary(size, note)


def check_labels(rows: Sequence[EncodedRow], shared: SharedVocabulary) -> None:
    """Refuse rows whose answer holds a token that only one of the models has.

    Raises:
        VocabularyError: Names the first row and its token.
    """
    for row in rows:
        highest = max(row["labels"], default=0)
        if highest >= shared.size:
            raise VocabularyError(
                f"{row['id']}: the answer holds token {highest}, but teacher and student share only {shared.size:,}"
                " tokens. Remove the row, or take models with one vocabulary."
            )


def check_largest_id(largest: int, size: int | None, *, where: str) -> None:
    """Refuse rows with a token id that the model has no embedding for.

    Args:
        largest: The largest token id in any row.
        size: Number of embeddings; None: the model has no embedding table.
        where: The recipe key that names the model.

    Raises:
        VocabularyError: The id is too large, so the tokenizer belongs to another model.
    """
    if size is not None and largest >= size:
        raise VocabularyError(
            f"{where}: its tokenizer gives the id {largest}, but it embeds {size} tokens. Name the tokenizer that it "
            "was made with."
        )


def check_lengths(
    max_length: int, limits: Mapping[str, int | None], *, soft_limits: Mapping[str, int | None] | None = None
) -> None:
    """Compare `max_length` with the number of tokens that each model can read.

    Args:
        max_length: In tokens.
        limits: Model name -> number of its positions, None for no limit; a longer row would fail inside training.
        soft_limits: Model name -> number of positions it was trained on; a longer row runs but is read badly, as by
            rotary models. Only a warning.

    Raises:
        DataError: `max_length` is above a limit; names every such model.
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


def check_room(max_length: int, num_special: int) -> None:
    """Refuse a `max_length` that special tokens alone would fill.

    Raises:
        DataError: No token of a text fits.
    """
    if max_length <= num_special:
        raise DataError(f"data.max_length: {max_length} leaves no room beside {num_special} special tokens. Raise it.")


def _quoted(token: str | None) -> str:
    return "none" if token is None else ascii(token)
