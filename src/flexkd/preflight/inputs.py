"""The models, tokenizers and rows that a recipe names, where they are on this machine: what every check reads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.generation import GenerationData
from flexkd.data.examples.teacher_labels import ModelLabels
from flexkd.errors import FlexKDError
from flexkd.preflight.model_files import ModelFiles, check_tokenizer, find_model
from flexkd.preflight.rows import read_rows, remote_sources, teacher_labels
from flexkd.preflight.tokenizer_files import TokenizerFile
from flexkd.recipe import Recipe


@dataclass(frozen=True)
class RecipeInputs:
    """A recipe with the models, tokenizers and rows that it names.

    Attributes:
        models: Those that can be read, by the recipe key that names them; one on the hub has no folder.
        data: All splits; None when a source is on the hub or cannot be used.
        teacher_labels: Classes of a teacher that is used as it is, which the rows were read for.
        tokenizers: Those with a tokenizer.json on this machine, by the recipe key that names them, or that of
            `tokenizer_key`; the student's only where it is not the teacher's.
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


def read_inputs(recipe: Recipe, errors: list[FlexKDError]) -> RecipeInputs:
    """Find the models and read the rows; what cannot be read is added to the errors."""
    models = _find_models(recipe, errors)
    tokenizers = _read_tokenizers(recipe, models, errors)
    teacher = models.get("teacher.model")
    config = teacher.config if teacher is not None and teacher.folder is not None else None
    labels: ModelLabels | None = None
    with collect_errors(errors):
        labels = teacher_labels(recipe, config)
    data: ClassificationData | GenerationData | None = None
    with collect_errors(errors):
        data = read_rows(recipe, labels) if not remote_sources(recipe) else None
    return RecipeInputs(recipe, models, data, labels, tokenizers)


@contextmanager
def collect_errors(errors: list[FlexKDError]) -> Iterator[None]:
    """Add an error that the block raises to a list, and continue after the block: a preflight reports all errors."""
    try:
        yield
    except FlexKDError as error:
        errors.append(error)


def student_tokenizer_source(recipe: Recipe) -> str | None:
    """The model whose tokenizer the student brings; None where it reads with the teacher's.

    A student made from a config has no tokenizer yet: it reads with the teacher's unless the recipe names another.
    """
    student = recipe.student
    return student.tokenizer or (student.model if student.start == "pretrained" else None)


def model_sources(recipe: Recipe) -> dict[str, str]:
    """The models that a recipe names, by their keys."""
    sources = {"teacher.model": recipe.teacher.model}
    if recipe.student.model is not None:
        sources["student.model"] = recipe.student.model
    return sources | rival_sources(recipe)


def rival_sources(recipe: Recipe) -> dict[str, str]:
    """The models off the shelf that a student is compared with, by their keys."""
    models = () if recipe.rivals is None else recipe.rivals.models
    return {f"rivals.models.{index}": source for index, source in enumerate(models)}


def tokenizer_key(where: str) -> str:
    """The key of a model's tokenizer in `RecipeInputs.tokenizers`, by the key of the model."""
    return where.replace("model", "tokenizer")


def _find_models(recipe: Recipe, errors: list[FlexKDError]) -> dict[str, ModelFiles]:
    """The models that can be read, by the recipe key that names them."""
    models: dict[str, ModelFiles] = {}
    for where, source in model_sources(recipe).items():
        needs_weights = where != "student.model" or recipe.student.start == "pretrained"
        with collect_errors(errors):
            models[where] = find_model(where, source, weights=needs_weights)
    return models


def _read_tokenizers(
    recipe: Recipe, models: Mapping[str, ModelFiles], errors: list[FlexKDError]
) -> dict[str, TokenizerFile]:
    """The tokenizers that can be read, by the recipe key that names them."""
    sources = {"teacher.tokenizer": recipe.teacher.tokenizer or recipe.teacher.model}
    student_source = student_tokenizer_source(recipe)
    if recipe.student.model is not None and student_source is not None:
        sources["student.tokenizer"] = student_source
    sources |= {tokenizer_key(where): source for where, source in rival_sources(recipe).items()}
    # A model that cannot be read needs no second message about its tokenizer.
    unreadable = {source for where, source in model_sources(recipe).items() if where not in models}
    tokenizers: dict[str, TokenizerFile] = {}
    for where, source in sources.items():
        if source in unreadable:
            continue
        with collect_errors(errors):
            tokenizer = check_tokenizer(where, source)
            if tokenizer is not None:
                tokenizers[where] = tokenizer
    return tokenizers
