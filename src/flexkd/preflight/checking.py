"""The checks of one recipe against the files and rows it names, in one list."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.generation import GenerationData
from flexkd.data.examples.teacher_labels import ModelLabels
from flexkd.data.sources.rows import is_hub_id, joined_sources
from flexkd.errors import FlexKDError, MissingDependencyError, RecipeError
from flexkd.packages import joined_errors
from flexkd.preflight.architecture import head_errors, kind_errors, precision_errors, type_errors
from flexkd.preflight.comparison import cell_errors, compared_recipes, comparison_errors, method_places
from flexkd.preflight.contrasts import contrast_notes
from flexkd.preflight.generation import answer_errors, end_errors, template_errors, template_notes
from flexkd.preflight.inputs import RecipeInputs, collect_errors, read_inputs
from flexkd.preflight.machine import (
    code_notes,
    compiler_errors,
    int8_errors,
    metric_errors,
    package_errors,
    process_errors,
    upload_errors,
)
from flexkd.preflight.objective import (
    batch_errors,
    geometry_errors,
    head_start_errors,
    layer_errors,
    lens_errors,
    mapping_errors,
    scored_layer_errors,
)
from flexkd.preflight.projection import projection_errors
from flexkd.preflight.rows import remote_sources
from flexkd.preflight.run_folder import busy_errors, continued, output_errors, output_notes, run_errors
from flexkd.preflight.sharding import sharding_errors
from flexkd.preflight.sizes import shape_notes, size_cell_errors, size_errors, sized_variants
from flexkd.preflight.starts import compared_start_notes, start_seed_notes
from flexkd.preflight.student_shape import basis_errors, lora_errors, shape_errors, size_notes, slice_errors
from flexkd.preflight.tokenization import (
    cut_vocabulary_errors,
    length_errors,
    length_notes,
    position_errors,
    row_end_errors,
    row_errors,
    vocabulary_errors,
)
from flexkd.preflight.weights import teacher_head_errors, weight_errors
from flexkd.processes import join
from flexkd.recipe import Recipe

Resumes = Literal["nothing", "scores", "run", "comparison", "sizes", "anything"]

_NOT_CHECKED: Final = "so it is taken as a hub id and not checked (a check works offline)"


@dataclass(frozen=True)
class Preflight:
    """Problems of a recipe, and the rows that were read to find them.

    Attributes:
        errors: What must be fixed before anything can run.
        notes: What could not be checked, and what is worth knowing.
        data: All splits; None when a source is on the hub or cannot be used.
        teacher_labels: Classes of a teacher that is used as it is, which the rows were read for.
        teacher: Its folder; None where it is not on this machine.
    """

    errors: tuple[FlexKDError, ...]
    notes: tuple[str, ...]
    data: ClassificationData | GenerationData | None
    teacher_labels: ModelLabels | None = None
    teacher: Path | None = None

    @property
    def problems(self) -> list[str]:
        """The messages of the errors."""
        return [str(error) for error in self.errors]

    def raise_errors(self) -> None:
        """Raise the errors, if there are any: one as it is, several as one message.

        Raises:
            FlexKDError: Something must be fixed.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise RecipeError("\n".join(self.problems))


def check(recipe: Recipe) -> Preflight:
    """Find every problem in a recipe, its models' folders and its rows, without loading anything heavy.

    Nothing is raised: `problems` of the result lists them, `notes` what is worth knowing, `raise_errors()` stops.
    A run makes the same checks before it begins.
    """
    return preflight(recipe)


def preflight(
    recipe: Recipe, *, resumes: Resumes = "anything", variants: Mapping[str, Recipe] | None = None
) -> Preflight:
    """Check a recipe against the models and rows it names, without torch, transformers or a network.

    A model or data set on the hub that is not on this machine is a note, not an error.

    Args:
        recipe: The recipe to check.
        resumes: What the command continues in the run folder, and what therefore has to belong to the recipe: a run,
            its scores, a comparison, the students of several sizes, nothing, or whatever is there.
        variants: The recipe of each method or size that is trained, by its place in messages; None: of those that the
            recipe names.
    """
    errors: list[FlexKDError] = []
    with collect_errors(errors):
        join()
    errors.extend(busy_errors(recipe) if resumes == "anything" and not errors else [])
    if errors:  # each process would read everything
        return Preflight(tuple(errors), (), None)
    continuation_notes: list[str] = []
    with collect_errors([]):  # a folder that cannot be named is an error of the checks below
        recipe, continuation_notes = continued(recipe)
    inputs = read_inputs(recipe, errors)
    for check in (*CHECKS, *FOLDER_CHECKS[resumes]):
        with collect_errors(errors):
            errors.extend(check(inputs))
    if variants is None:
        variants = {**method_places(compared_recipes(inputs)), **sized_variants(inputs)}
    errors.extend(_variant_errors(inputs, variants, {str(error) for error in errors}))
    notes = [*continuation_notes, *(note for notes_of in NOTES for note in notes_of(inputs))]
    if resumes in ("comparison", "sizes") and recipe.push_to_hub is not None:
        notes.append("push_to_hub: only the student of flexkd distill is uploaded, and none of this command.")
    if resumes == "anything":  # a comparison says it itself, of the methods and seeds of its command line
        notes.extend([*contrast_notes(inputs), *compared_start_notes(inputs), *shape_notes(inputs)])
    if resumes in ("comparison", "sizes") and recipe.rivals is not None:
        notes.append("rivals: flexkd distill measures them, and this command leaves them out.")
    folder = None if inputs.teacher is None else inputs.teacher.folder
    # Two checks may report the same path.
    distinct = joined_errors({str(error): error for error in errors}.values())
    return Preflight(tuple(distinct), tuple(notes), inputs.data, inputs.teacher_labels, folder)


def _variant_errors(inputs: RecipeInputs, variants: Mapping[str, Recipe], reported: set[str]) -> Iterator[FlexKDError]:
    """Each method of a comparison and each size can be run: what it changes is checked as the recipe itself is.

    Args:
        variants: The recipe of each by its place in messages.
        reported: Messages about the recipe itself, which are not repeated for its variants.
    """
    for where, variant in variants.items():
        errors: list[FlexKDError] = []
        for check in VARIANT_CHECKS:
            with collect_errors(errors):
                errors.extend(check(replace(inputs, recipe=variant)))
        for error in errors:
            if str(error) not in reported:
                is_missing = isinstance(error, MissingDependencyError)
                yield error.at(where) if is_missing else RecipeError(f"{where}: {error}")


def _location_notes(inputs: RecipeInputs) -> Iterator[str]:
    """Models and rows that were not checked, since they are not on this machine."""
    for where, model in inputs.models.items():
        if model.folder is None:
            yield f"{where}: '{model.source}' is not a folder here, {_NOT_CHECKED}."
    for split, source in remote_sources(inputs.recipe).items():
        is_hub = any(map(is_hub_id, joined_sources(source)))
        how = f"not a file here, {_NOT_CHECKED}" if is_hub else "fetched when a run first needs it"
        yield f"data.{split}: '{source}' is {how}."


def _label_notes(inputs: RecipeInputs) -> Iterator[str]:
    """Which label is which class, where that was concluded from the rows."""
    if isinstance(inputs.data, ClassificationData):
        yield from inputs.data.label_notes


CHECKS: Final[tuple[Callable[[RecipeInputs], Iterable[FlexKDError]], ...]] = (
    # comparison and sizes
    comparison_errors,
    size_errors,
    # architecture and weights
    head_errors,
    weight_errors,
    teacher_head_errors,
    kind_errors,
    type_errors,
    # shape of the student
    slice_errors,
    shape_errors,
    lora_errors,
    basis_errors,
    # objective
    layer_errors,
    scored_layer_errors,
    mapping_errors,
    projection_errors,
    geometry_errors,
    lens_errors,
    head_start_errors,
    # precision
    precision_errors,
    # prompts, tokens and answers
    template_errors,
    end_errors,
    row_end_errors,
    length_errors,
    batch_errors,
    vocabulary_errors,
    cut_vocabulary_errors,
    position_errors,
    row_errors,
    answer_errors,
    metric_errors,
    # machine and run folder
    process_errors,
    sharding_errors,
    package_errors,
    compiler_errors,
    int8_errors,
    output_errors,
)
"""Checks in the order of their messages. The docstring of each says what must hold; where it does not, it yields an
error or raises the first one."""

VARIANT_CHECKS: Final[tuple[Callable[[RecipeInputs], Iterable[FlexKDError]], ...]] = (
    kind_errors,
    slice_errors,
    shape_errors,
    lora_errors,
    basis_errors,
    layer_errors,
    scored_layer_errors,
    mapping_errors,
    projection_errors,
    geometry_errors,
    lens_errors,
    head_start_errors,
    batch_errors,
    position_errors,
    package_errors,
    compiler_errors,
    process_errors,
    sharding_errors,
)
"""Those of them that read what a method of a comparison or a size may change: the student, the scores, the objective,
the training."""

FOLDER_CHECKS: Final[Mapping[Resumes, tuple[Callable[[RecipeInputs], Iterable[FlexKDError]], ...]]] = {
    "nothing": (),
    "scores": (run_errors,),
    "run": (run_errors, upload_errors),
    "comparison": (cell_errors,),
    "sizes": (size_cell_errors,),
    "anything": (run_errors, cell_errors, size_cell_errors, upload_errors),
}
"""Checks of what an earlier command left in the run folder, and of the upload at the end of a run."""

NOTES: Final[tuple[Callable[[RecipeInputs], Iterator[str]], ...]] = (
    _location_notes,
    length_notes,
    size_notes,
    _label_notes,
    output_notes,
    start_seed_notes,
    template_notes,
    code_notes,
)
"""Each yields what is worth knowing."""
