"""Whether two models speak of the same tokens, and how many columns of their outputs mean the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from flexkd.errors import DataError, VocabularyError

_SHOWN: Final = 5


class HasVocabulary(Protocol):
    """A tokenizer, loaded or read from its file alone."""

    def get_vocab(self) -> Mapping[str, int]:
        """Tokens to ids."""


@dataclass(frozen=True)
class SharedVocabulary:
    """The tokens that both models predict.

    Attributes:
        size: Both models' logits are cut to so many columns.
        note: What is cut and why; None where nothing is.
    """

    size: int
    note: str | None = None


def one_tokenizer_error() -> VocabularyError:
    """The error of states at all tokens of two encodings, which do not pair up."""
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
    """Finds the ids that mean the same token to both models.

    Models of one family round the width of their output up differently, and one may have more special tokens at the
    end. What only one of them has is cut. An id below that cut that means two tokens is another language.

    Args:
        teacher_outputs: Columns of its logits.
        student_outputs: Columns of its logits.

    Raises:
        VocabularyError: An id means two tokens, or a token has two ids.
    """
    teacher, student = (
        {i: token for token, i in t.get_vocab().items()} for t in (teacher_tokenizer, student_tokenizer)
    )
    size = min(max(teacher) + 1, max(student) + 1, teacher_outputs, student_outputs)
    conflicts = [i for i in range(size) if teacher.get(i) != student.get(i)]
    if conflicts:
        shown = [f"id {i}, {_quoted(teacher.get(i))} vs {_quoted(student.get(i))}" for i in conflicts[:_SHOWN]]
        more = "; ..." if len(conflicts) > _SHOWN else ""
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


def check_labels(features: Sequence[Mapping[str, Any]], shared: SharedVocabulary) -> None:
    """Refuses rows that teach a token which only one of the models knows.

    Raises:
        VocabularyError: Names the first row and its token.
    """
    for row in features:
        highest = max(row["labels"], default=0)
        if highest >= shared.size:
            raise VocabularyError(
                f"{row['id']}: the answer holds token {highest}, but teacher and student share only {shared.size:,}"
                " tokens. Remove the row, or take models with one vocabulary."
            )


def check_largest_id(largest: int, size: int | None, *, where: str) -> None:
    """Refuse rows with an id that a model has no embedding for.

    Args:
        largest: Of all rows.
        size: Of the embeddings; None: the model has no table of tokens.
        where: The recipe key that names the model.

    Raises:
        VocabularyError: The tokenizer is another model's.
    """
    if size is not None and largest >= size:
        raise VocabularyError(
            f"{where}: its tokenizer gives the id {largest}, but it embeds {size} tokens. Name the tokenizer that it "
            "was made with."
        )


def check_room(max_length: int, num_special: int) -> None:
    """Refuse a length that special tokens fill alone.

    Raises:
        DataError: No text fits.
    """
    if max_length <= num_special:
        raise DataError(f"data.max_length: {max_length} leaves no room beside {num_special} special tokens. Raise it.")


def _quoted(token: str | None) -> str:
    return "none" if token is None else ascii(token)
