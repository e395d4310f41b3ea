"""Whether the models fit the task: a known architecture, the head that it needs, one kind, a precision that holds."""

from collections.abc import Iterable, Iterator

from flexkd.errors import FlexKDError, RecipeError, UnsupportedModelError
from flexkd.facts.families.table import TRAITS
from flexkd.models.forward.kinds import (
    check_kinds,
    encoder_error,
    is_encoder,
    is_encoder_decoder,
    packing_error,
)
from flexkd.models.forward.precision import check_half_precision
from flexkd.preflight.inputs import RecipeInputs, collect_errors
from flexkd.preflight.model_files import ModelFiles


def head_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """The teacher was saved with a head for the task; a classifier that is fine-tuned first gets one."""
    recipe, teacher = inputs.recipe, inputs.teacher
    if teacher is None:
        return
    if recipe.generation is not None:
        # `kind_errors` says more of an encoder.
        if not teacher.has_language_head and not is_encoder(teacher.config):
            yield UnsupportedModelError(
                f"teacher.model: '{teacher.source}' has no language model head ({_class_names(teacher)}) and writes no "
                "text. Give a decoder or an encoder-decoder, or use task.type: classification."
            )
        return
    if recipe.teacher.fine_tune is not None:
        return
    # An adapter may bring the head.
    if not teacher.has_classifier and recipe.teacher.adapter is None:
        yield UnsupportedModelError(
            f"teacher.model: '{teacher.source}' has no classification head ({_class_names(teacher)}). "
            "Add teacher.fine_tune: {} to train one first."
        )


def kind_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """Models that write text are no encoders, and are all decoders or all encoder-decoders.

    Raises:
        RecipeError: As `check_kinds`.
    """
    recipe = inputs.recipe
    if recipe.generation is None:
        return
    local_models = {where: model for where, model in inputs.models.items() if model.folder is not None}
    for where, model in local_models.items():
        if is_encoder(model.config):
            yield encoder_error(where, model.source, model.model_type)
        elif not model.has_language_head and (_is_rival(model) or _is_pretrained_student(inputs, model)):
            yield UnsupportedModelError(
                f"{where}: '{model.source}' has no language model head ({_class_names(model)}) and writes no text. "
                "Give a decoder or an encoder-decoder, or use task.type: classification."
            )
        elif _is_rival(model):
            yield from _rival_kind_errors(model, inputs.teacher)
        elif recipe.training.packing and is_encoder_decoder(model.config):
            yield packing_error(where.partition(".")[0], _class_names(model))
    compared = {where: model for where, model in local_models.items() if not _is_rival(model)}
    check_kinds({where.partition(".")[0]: is_encoder_decoder(model.config) for where, model in compared.items()})


def _is_rival(model: ModelFiles) -> bool:
    return model.where.startswith("rivals.")


def _is_pretrained_student(inputs: RecipeInputs, model: ModelFiles) -> bool:
    return model.where == "student.model" and inputs.recipe.student.start == "pretrained"


def _rival_kind_errors(rival: ModelFiles, teacher: ModelFiles | None) -> Iterator[FlexKDError]:
    """A rival answers the prompts as the teacher does."""
    if teacher is not None and is_encoder_decoder(rival.config) != is_encoder_decoder(teacher.config):
        yield RecipeError(
            f"{rival.where}: '{rival.source}' and the teacher are not both decoders, or both encoder-decoders, and are "
            "asked in different ways. Give a rival of the teacher's kind."
        )


def type_errors(inputs: RecipeInputs) -> Iterable[FlexKDError]:
    """The installed transformers knows each architecture; `slice_errors` checks a teacher that is cut."""
    for where, model in inputs.models.items():
        is_cut = where == "teacher.model" and inputs.recipe.student.start == "slice"
        if model.folder is None or is_cut or model.model_type in TRAITS:
            continue
        # Its table of 800 names is loaded only for an architecture that flexkd does not know by itself.
        from transformers import CONFIG_MAPPING

        if model.model_type not in CONFIG_MAPPING:
            yield UnsupportedModelError(
                f"{where}: '{model.source}' is a '{model.model_type}' model, which the installed transformers does not "
                "know. Update it, or give another model."
            )


def precision_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """No model overflows in the half precision that it is to run in."""
    recipe, models, errors = inputs.recipe, inputs.models, list[FlexKDError]()
    precisions = {
        "teacher.model": ("teacher.precision", recipe.teacher.precision),
        "student.model": ("training.precision", recipe.training.precision),
    }
    for name, (where, precision) in precisions.items():
        model = models.get(name) or models.get("teacher.model")
        if model is not None:
            with collect_errors(errors):
                check_half_precision(model.config, precision, where)
    yield from errors


def _class_names(model: ModelFiles) -> str:
    """The model classes that a config names."""
    return ", ".join(map(str, model.config.get("architectures") or ["no architectures"]))
