"""Record of a vocabulary that was cut: how many tokens a student knows, and what that costs."""

from dataclasses import dataclass

from flexkd.strict_json import Number, Record


@dataclass(frozen=True)
class VocabularyRecord(Record):
    """The tokens that a student knows, where these are not all of its teacher's.

    Attributes:
        tokens: Number of them.
        teacher_tokens: Number of the teacher's.
        tokens_a_row: Mean number of tokens of a row, by split.
        teacher_tokens_a_row: The same in the teacher's tokens.
        teacher_nll: What validation labels cost the teacher, in nats a row, where it reads the student's tokens and
            predicts these alone; None where that is not defined.
        whole_teacher_nll: The same with all of its tokens.
    """

    tokens: int
    teacher_tokens: int
    tokens_a_row: dict[str, Number]
    teacher_tokens_a_row: dict[str, Number]
    teacher_nll: Number | None = None
    whole_teacher_nll: Number | None = None

    def describe(self) -> str:
        """In a sentence."""
        lengths = ", ".join(
            f"{split} {length:.1f} in place of {self.teacher_tokens_a_row[split]:.1f}"
            for split, length in self.tokens_a_row.items()
        )
        return (
            f"student.vocabulary: the student knows {self.tokens:,} of the teacher's {self.teacher_tokens:,} tokens; "
            f"tokens a row: {lengths}.{self._cost()}"
        )

    def _cost(self) -> str:
        if self.teacher_nll is None or self.whole_teacher_nll is None:
            return ""
        return (
            f" Reading them costs the teacher {self.teacher_nll:.3f} nats a validation row in place of "
            f"{self.whole_teacher_nll:.3f}."
        )
