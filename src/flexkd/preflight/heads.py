"""Whether the teacher brings the head that the task needs, and which label of the rows is which class."""

from collections.abc import Iterator

from flexkd.data.examples.classification import ClassificationData
from flexkd.errors import FlexKDError, UnsupportedModelError
from flexkd.models.forward.kinds import check_kinds, encoder_refused, is_encoder, is_encoder_decoder, packing_refused
from flexkd.preflight.evidence import Evidence


def head_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """A teacher brings its own head where it is not fine-tuned, and a language model always does."""
    recipe, teacher = evidence.recipe, evidence.teacher
    if teacher is None:
        return
    built_as = ", ".join(map(str, teacher.config.get("architectures") or ["no architectures"]))
    if recipe.generation is not None:
        # Of an encoder `kind_errors` says more.
        if not teacher.has_language_head and not is_encoder(teacher.config):
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


def kind_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """Where text is written, every model writes it, and all of them in one way."""
    recipe = evidence.recipe
    here = {where: model for where, model in evidence.models.items() if model.folder is not None}
    if recipe.generation is None:
        return
    for where, model in here.items():
        built_as = ", ".join(map(str, model.config.get("architectures") or ["no architectures"]))
        if is_encoder(model.config):
            yield encoder_refused(where, model.source, model.model_type)
        elif where == "student.model" and recipe.student.start == "pretrained" and not model.has_language_head:
            yield UnsupportedModelError(
                f"{where}: '{model.source}' has no language model head ({built_as}) and writes no text. Give a decoder "
                "or an encoder-decoder, or use task.type: classification."
            )
        elif recipe.training.packing and is_encoder_decoder(model.config):
            yield packing_refused(where.partition(".")[0], built_as)
    check_kinds({where.partition(".")[0]: is_encoder_decoder(model.config) for where, model in here.items()})


def label_notes(evidence: Evidence) -> Iterator[str]:
    """Which label is which class, where that was concluded."""
    if isinstance(evidence.data, ClassificationData):
        yield from evidence.data.label_notes
