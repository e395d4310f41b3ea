"""Whether the heads of the models fit the task: what a teacher was trained to say, and how its classes are named."""

from collections.abc import Iterator, Sequence

from flexkd.data.tasks import ClassificationData
from flexkd.errors import FlexKDError, UnsupportedModelError, VocabularyError
from flexkd.preflight.evidence import Evidence


def head_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """A teacher brings its own head where it is not fine-tuned, and a language model always does."""
    recipe, teacher, data = evidence.recipe, evidence.teacher, evidence.data
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
    # An adapter may bring the head, and keeps no names of classes.
    is_adapted = recipe.teacher.adapter is not None
    if not teacher.has_classifier:
        if is_adapted:
            return
        yield UnsupportedModelError(
            f"teacher.model: '{teacher.source}' has no classification head ({built_as}). "
            "Add teacher.fine_tune: {} to train one first."
        )
        return
    if data is None:
        return
    assert isinstance(data, ClassificationData), "classifiers have labels"
    names, wanted = teacher.label_names, list(data.labels.names)
    if len(names) != len(wanted):
        if is_adapted:
            return
        yield VocabularyError(
            f"teacher.model: '{teacher.source}' has {len(names)} labels {_some(names)}, the data have {len(wanted)} "
            f"{_some(wanted)}. Set teacher.fine_tune, or use another teacher."
        )
    elif sorted(names) == sorted(wanted) and names != wanted:
        yield VocabularyError(
            f"teacher.model: its labels are {_some(names)}, those of the data {_some(wanted)}: the same in another "
            "order. Set data.label_names to the teacher's order."
        )


def label_notes(evidence: Evidence) -> Iterator[str]:
    """Classes that are taken for each other by their place alone."""
    teacher, data = evidence.teacher, evidence.data
    if teacher is None or evidence.recipe.teacher.fine_tune is not None or not isinstance(data, ClassificationData):
        return
    names, wanted = teacher.label_names, list(data.labels.names)
    if teacher.has_classifier and len(names) == len(wanted) > 1 and sorted(names) != sorted(wanted):
        yield (
            f"teacher.model: its labels {_some(names)} are taken for {_some(wanted)} of the data, in this order. "
            "Set data.label_names if they differ."
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"[{shown}, ...]" if len(names) > 5 else f"[{shown}]"
