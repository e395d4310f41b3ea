"""Whether the teacher brings the head that the task needs, and which label of the rows is which class."""

from collections.abc import Iterator

from flexkd.data.tasks import ClassificationData
from flexkd.errors import FlexKDError, UnsupportedModelError
from flexkd.preflight.evidence import Evidence


def head_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """A teacher brings its own head where it is not fine-tuned, and a language model always does."""
    recipe, teacher = evidence.recipe, evidence.teacher
    if teacher is None:
        return
    built_as = ", ".join(map(str, teacher.config.get("architectures") or ["no architectures"]))
    if recipe.generation is not None:
        if not teacher.has_language_head:
            yield UnsupportedModelError(
                f"teacher.model: '{teacher.source}' has no language model head ({built_as}) and writes no text. "
                "Give a decoder or an encoder-decoder, or use task.type: classification."
            )
        return
    if recipe.teacher.fine_tune is not None:
        return
    # An adapter may bring the head.
    if not teacher.has_classifier and recipe.teacher.adapter is None:
        yield UnsupportedModelError(
            f"teacher.model: '{teacher.source}' has no classification head ({built_as}). "
            "Add teacher.fine_tune: {} to train one first."
        )


def label_notes(evidence: Evidence) -> Iterator[str]:
    """Which label is which class, where that was concluded."""
    if isinstance(evidence.data, ClassificationData):
        yield from evidence.data.label_notes
