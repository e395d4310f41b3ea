"""The checks of one recipe against the files and rows it names."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from flexkd.data.generation import GenerationData
from flexkd.data.sources import is_hub_id, parts_of
from flexkd.data.tasks import ClassificationData
from flexkd.errors import (
    FlexKDError,
    RecipeError,
    ShapeError,
    UnsupportedModelError,
    VocabularyError,
)
from flexkd.models.positions import is_rotary, position_limit
from flexkd.models.precision import check_half_precision
from flexkd.preflight.model_files import FAMILY_KEYS, ModelFiles, check_tokenizer, find_model
from flexkd.preflight.rows import read_rows, remote_sources
from flexkd.recipe import Recipe

# core/losses/feature.py says so too; it imports torch, so a test compares the two.
MINIMUM_POSITIONS: Final = 8
"""Fewest positions of one forward pass that a feature loss can be taken over."""

_SIZES: Final = ("hidden_size", "num_layers", "num_heads", "num_key_value_heads", "intermediate_size")
_NOT_CHECKED: Final = "not checked: offline"

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Preflight:
    """What was found, and the rows that were read on the way.

    Attributes:
        errors: What must be mended before anything can run.
        notes: What could not be checked, and what is worth knowing.
        data: All splits; None when a source is on the hub or cannot be used.
    """

    errors: tuple[FlexKDError, ...]
    notes: tuple[str, ...]
    data: ClassificationData | GenerationData | None

    @property
    def problems(self) -> list[str]:
        """The messages of the errors."""
        return [str(error) for error in self.errors]

    def raise_errors(self) -> None:
        """Raise what was found, if anything: one error as it is, several as one message.

        Raises:
            FlexKDError: Something must be mended.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise RecipeError("\n".join(self.problems))


def preflight(recipe: Recipe) -> Preflight:
    """Check a recipe against the models and rows it names, without torch, transformers or a network.

    A model or data set on the hub that is not on this machine is a note, not an error.
    """
    errors: list[FlexKDError] = []
    models = _find_models(recipe, errors)
    data = _tried(errors, lambda: read_rows(recipe) if not remote_sources(recipe) else None)
    teacher = models.get("teacher.model")
    if teacher is not None and teacher.folder is not None:
        errors.extend(_head_errors(recipe, teacher, data))
        if recipe.student.start == "slice":
            errors.extend(_slice_errors(recipe, teacher))
    _check_precisions(recipe, models, errors)
    errors.extend(_tokenizer_errors(recipe, models))
    errors.extend(_length_errors(recipe, models))
    errors.extend(_batch_errors(recipe))
    if Path(recipe.output).is_file():
        errors.append(RecipeError(f"output: '{recipe.output}' is a file. Name a folder, which may be new."))
    notes = [*_location_notes(recipe, models), *_model_notes(recipe, models, data)]
    return Preflight(tuple(errors), tuple(notes), data)


def _tried(errors: list[FlexKDError], check: Callable[[], _Value]) -> _Value | None:
    """The value of a check, or None with its error kept: one run reports all of them."""
    try:
        return check()
    except FlexKDError as error:
        errors.append(error)
        return None


def _find_models(recipe: Recipe, errors: list[FlexKDError]) -> dict[str, ModelFiles]:
    """The models that can be read, by the recipe key that names them."""
    asked = {"teacher.model": (recipe.teacher.model, True)}
    tokenizers = {"teacher.tokenizer": recipe.teacher.tokenizer or recipe.teacher.model}
    student = recipe.student
    if student.model is not None:
        asked["student.model"] = (student.model, student.start == "pretrained")
        # A fresh student has no words of its own yet: it reads the teacher's unless told otherwise.
        own = student.tokenizer or (student.model if student.start == "pretrained" else None)
        if own is not None:
            tokenizers["student.tokenizer"] = own
    found: dict[str, ModelFiles] = {}
    for where, (source, needs_weights) in asked.items():
        model = _tried(errors, lambda: find_model(where, source, weights=needs_weights))  # noqa: B023 (called at once)
        if model is not None:
            found[where] = model
    for where, source in tokenizers.items():
        # A model that is not there needs no second message about its tokenizer.
        if source not in {asked[key][0] for key in asked.keys() - found.keys()}:
            _tried(errors, lambda: check_tokenizer(where, source))  # noqa: B023 (called at once)
    return found


def _head_errors(
    recipe: Recipe, teacher: ModelFiles, data: ClassificationData | GenerationData | None
) -> Iterator[FlexKDError]:
    """A teacher brings its own head where it is not fine-tuned, and a language model always does."""
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
    if not teacher.has_classifier:
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
        yield VocabularyError(
            f"teacher.model: '{teacher.source}' has {len(names)} labels {_some(names)}, the data have {len(wanted)} "
            f"{_some(wanted)}. Set teacher.fine_tune, or use another teacher."
        )
    elif sorted(names) == sorted(wanted) and names != wanted:
        yield VocabularyError(
            f"teacher.model: its labels are {_some(names)}, those of the data {_some(wanted)}: the same in another "
            "order. Set data.label_names to the teacher's order."
        )


def _check_precisions(recipe: Recipe, models: dict[str, ModelFiles], errors: list[FlexKDError]) -> None:
    asked = {"teacher.model": ("teacher.precision", recipe.teacher.precision)}
    asked["student.model"] = ("training.precision", recipe.training.precision)
    for name, (where, precision) in asked.items():
        model = models.get(name) or models.get("teacher.model")
        if model is not None:
            _tried(errors, lambda: check_half_precision(model.config, precision, where))  # noqa: B023 (called at once)


def _tokenizer_errors(recipe: Recipe, models: dict[str, ModelFiles]) -> Iterator[FlexKDError]:
    """Messages, and chat: always, need a chat template; where both tokenizers are here, one of them has it."""
    needs = recipe.data.messages is not None or recipe.data.chat == "always"
    if recipe.generation is None or not needs or recipe.teacher.tokenizer or recipe.student.tokenizer:
        return
    here = [model for model in models.values() if model.folder is not None]
    if len(here) < len(models) or any(model.has_chat_template is not False for model in here):
        return
    why = "data.messages" if recipe.data.messages is not None else "data.chat"
    names = " and ".join(f"{model.where} '{model.source}'" for model in here)
    yield VocabularyError(
        f"{why}: {names}: no chat template. Use a model that was tuned on instructions, put a chat_template.jinja into "
        "the model's folder, or give the rows as prompt and response, which need none."
    )


def _slice_errors(recipe: Recipe, teacher: ModelFiles) -> Iterator[FlexKDError]:
    """What can be cut out of this teacher; the slicing itself checks again."""
    if teacher.model_type not in FAMILY_KEYS:
        yield UnsupportedModelError(
            f"teacher.model: no student can be cut out of a '{teacher.model_type}' model. Known: "
            f"{', '.join(sorted(FAMILY_KEYS))}. Use student.start: pretrained or config."
        )
        return
    for name in _SIZES:
        asked, there = getattr(recipe.student, name), teacher.size(name)
        if asked is not None and there is not None and asked > there:
            yield ShapeError(
                f"student.{name}: {asked} is more than the teacher's {there}. Lower it, or start the student from a "
                "model or a config: a cut only makes smaller."
            )
    width, heads, asked = teacher.size("hidden_size"), teacher.size("num_heads"), recipe.student.hidden_size
    if not teacher.keys.fixed_head_dim or not width or not heads or asked is None or asked > width:
        return
    head_dim = width // heads
    if asked % head_dim:
        lower = asked // head_dim * head_dim
        near = [size for size in (lower, lower + head_dim) if 0 < size <= width]
        yield ShapeError(
            f"student.hidden_size: {asked} is not a multiple of the teacher's head width {head_dim} "
            f"({width} / {heads} heads). Nearest: {' or '.join(map(str, near))}."
        )


def _length_errors(recipe: Recipe, models: dict[str, ModelFiles]) -> Iterator[FlexKDError]:
    for where, model in models.items():
        limit = position_limit(model.config)
        if limit is not None and recipe.data.max_length > limit and not is_rotary(model.config):
            yield ShapeError(
                f"data.max_length: {recipe.data.max_length} tokens are more than the {limit} positions of "
                f"{where} '{model.source}'. Use {limit} or fewer."
            )


def _batch_errors(recipe: Recipe) -> Iterator[FlexKDError]:
    """Supervised positions are one a row, so that a small batch has too few for any feature loss."""
    features, training = recipe.objective.features, recipe.training
    # An answer has several tokens, a classified row one position.
    if recipe.generation is not None or features is None or features.weight == 0 or features.positions != "supervised":
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows = min((training.per_device_batch_size or training.batch_size) * processes, training.batch_size)
    if rows < MINIMUM_POSITIONS:
        key = "batch_size" if training.per_device_batch_size is None else "per_device_batch_size"
        yield RecipeError(
            f"training.{key}: {rows} rows of one pass have {rows} supervised positions, fewer than the "
            f"{MINIMUM_POSITIONS} that {features.loss} needs. Use more rows, or objective.features.positions: tokens."
        )


def _location_notes(recipe: Recipe, models: dict[str, ModelFiles]) -> Iterator[str]:
    for where, model in models.items():
        if model.folder is None:
            yield f"{where}: '{model.source}' is no folder here, so taken as a hub id: {_NOT_CHECKED}."
    for split, source in remote_sources(recipe).items():
        is_hub = any(map(is_hub_id, parts_of(source)))
        how = f"no file here, so taken as a hub id: {_NOT_CHECKED}" if is_hub else "fetched when a run first needs it"
        yield f"data.{split}: '{source}' is {how}."


def _model_notes(
    recipe: Recipe, models: dict[str, ModelFiles], data: ClassificationData | GenerationData | None
) -> Iterator[str]:
    for where, model in models.items():
        limit = position_limit(model.config)
        if limit is not None and recipe.data.max_length > limit and is_rotary(model.config):
            yield f"data.max_length: {recipe.data.max_length} is above the {limit} tokens that {where} was trained for."
    student, teacher = recipe.student, models.get("teacher.model")
    if student.start == "slice" and not any(getattr(student, name) for name in (*_SIZES, "size", "max_parameters")):
        yield "student: no size is given, so it is as large as its teacher."
    if teacher is None or teacher.folder is None or recipe.teacher.fine_tune is not None:
        return
    if not isinstance(data, ClassificationData):
        return
    names, wanted = teacher.label_names, list(data.labels.names)
    if teacher.has_classifier and len(names) == len(wanted) > 1 and sorted(names) != sorted(wanted):
        yield (
            f"teacher.model: its labels {_some(names)} are taken for {_some(wanted)} of the data, in this order. "
            "Set data.label_names if they differ."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"[{shown}, ...]" if len(names) > 5 else f"[{shown}]"
