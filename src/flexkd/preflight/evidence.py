"""What a recipe names, as it was found on this machine: the models and rows that every check looks at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.generation import GenerationData
from flexkd.data.examples.teacher_labels import ModelLabels
from flexkd.errors import FlexKDError
from flexkd.preflight.model_files import ModelFiles, check_tokenizer, find_model
from flexkd.preflight.rows import read_rows, remote_sources, teacher_labels
from flexkd.preflight.vocabulary_files import TokenizerFile
from flexkd.recipe import Recipe

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Evidence:
    """A recipe and what was found of it.

    Attributes:
        models: Those that can be read, by the recipe key that names them; one on the hub has no folder.
        data: All splits; None when a source is on the hub or cannot be used.
        teacher_labels: Classes of a teacher that is used as it is, which the rows were read for.
        tokenizers: Those with a tokenizer.json on this machine, by the recipe key that names them; the student's only
            where it is not the teacher's.
    """

    recipe: Recipe
    models: Mapping[str, ModelFiles]
    data: ClassificationData | GenerationData | None
    teacher_labels: ModelLabels | None = None
    tokenizers: Mapping[str, TokenizerFile] = field(default_factory=dict)

    @property
    def teacher(self) -> ModelFiles | None:
        """The teacher, where its files are on this machine."""
        model = self.models.get("teacher.model")
        return model if model is not None and model.folder is not None else None


def gather_evidence(recipe: Recipe, errors: list[FlexKDError]) -> Evidence:
    """Find the models and read the rows; what cannot be read is added to the errors."""
    models, tokenizers = _find_models(recipe, errors)
    teacher = models.get("teacher.model")
    config = teacher.config if teacher is not None and teacher.folder is not None else None
    labels = tried(errors, lambda: teacher_labels(recipe, config))
    data = tried(errors, lambda: read_rows(recipe, labels) if not remote_sources(recipe) else None)
    return Evidence(recipe, models, data, labels, tokenizers)


def tried(errors: list[FlexKDError], check: Callable[[], _Value]) -> _Value | None:
    """The value of a check, or None with its error kept: one run reports all of them."""
    try:
        return check()
    except FlexKDError as error:
        errors.append(error)
        return None


def _find_models(recipe: Recipe, errors: list[FlexKDError]) -> tuple[dict[str, ModelFiles], dict[str, TokenizerFile]]:
    """The models and tokenizers that can be read, by the recipe key that names them."""
    asked = {"teacher.model": (recipe.teacher.model, True)}
    asked_tokenizers = {"teacher.tokenizer": recipe.teacher.tokenizer or recipe.teacher.model}
    student = recipe.student
    if student.model is not None:
        asked["student.model"] = (student.model, student.start == "pretrained")
        # A fresh student has no words of its own yet: it reads the teacher's unless told otherwise.
        own = student.tokenizer or (student.model if student.start == "pretrained" else None)
        if own is not None:
            asked_tokenizers["student.tokenizer"] = own
    models: dict[str, ModelFiles] = {}
    for where, (source, needs_weights) in asked.items():
        model = tried(errors, lambda: find_model(where, source, weights=needs_weights))  # noqa: B023 (called at once)
        if model is not None:
            models[where] = model
    tokenizers: dict[str, TokenizerFile] = {}
    for where, source in asked_tokenizers.items():
        # A model that is not there needs no second message about its tokenizer.
        if source in {asked[key][0] for key in asked.keys() - models.keys()}:
            continue
        tokenizer = tried(errors, lambda: check_tokenizer(where, source))  # noqa: B023 (called at once)
        if tokenizer is not None:
            tokenizers[where] = tokenizer
    return models, tokenizers
