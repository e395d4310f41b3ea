"""Whether the answers of a teacher that a recipe names are there, for every training row."""

from collections.abc import Iterable

from flexkd.data.examples.generation import GenerationData
from flexkd.data.examples.teacher_answers import with_teacher_answers
from flexkd.errors import FlexKDError
from flexkd.preflight.evidence import Evidence


def answer_errors(evidence: Evidence) -> Iterable[FlexKDError]:
    """Refuse a file that lacks a row, or holds nothing to learn from."""
    if isinstance(evidence.data, GenerationData):
        with_teacher_answers(evidence.data, evidence.recipe.data.teacher_answers)
    return ()
