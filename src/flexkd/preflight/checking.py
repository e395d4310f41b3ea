"""The checks of one recipe against the files and rows it names, in one list."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.generation import GenerationData
from flexkd.data.examples.teacher_labels import ModelLabels
from flexkd.data.sources.rows import is_hub_id, parts_of
from flexkd.errors import FlexKDError, RecipeError
from flexkd.preflight.answers import answer_errors
from flexkd.preflight.chat import template_errors, template_notes
from flexkd.preflight.comparison import comparison_errors
from flexkd.preflight.ends import end_errors, row_end_errors
from flexkd.preflight.equipment import compiler_errors, package_errors
from flexkd.preflight.evidence import Evidence, gather_evidence, tried
from flexkd.preflight.heads import head_errors, kind_errors, label_notes
from flexkd.preflight.rows import remote_sources
from flexkd.preflight.run_folder import cell_errors, run_errors
from flexkd.preflight.shapes import lora_errors, shape_errors, type_errors
from flexkd.preflight.sizes import batch_errors, length_errors, precision_errors, size_notes, slice_errors
from flexkd.preflight.surroundings import check_processes, output_errors, output_notes
from flexkd.preflight.teaching import basis_errors, geometry_errors, layer_errors, mapping_errors
from flexkd.preflight.vocabularies import position_errors, row_errors, vocabulary_errors
from flexkd.preflight.weights import teacher_head_errors, weight_errors
from flexkd.recipe import Recipe

Resumes = Literal["nothing", "run", "comparison", "anything"]

_NOT_CHECKED: Final = "not checked: offline"


@dataclass(frozen=True)
class Preflight:
    """What was found, and the rows that were read on the way.

    Attributes:
        errors: What must be mended before anything can run.
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
        """Raise what was found, if anything: one error as it is, several as one message.

        Raises:
            FlexKDError: Something must be mended.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise RecipeError("\n".join(self.problems))


def preflight(recipe: Recipe, *, resumes: Resumes = "anything") -> Preflight:
    """Check a recipe against the models and rows it names, without torch, transformers or a network.

    A model or data set on the hub that is not on this machine is a note, not an error.

    Args:
        recipe: What is checked.
        resumes: What is gone on with in the run folder, and so has to belong to the recipe: a run, a comparison,
            nothing, or whatever is there.
    """
    errors: list[FlexKDError] = []
    tried(errors, check_processes)
    if errors:  # each of them would read everything
        return Preflight(tuple(errors), (), None)
    evidence = gather_evidence(recipe, errors)
    for check in (*CHECKS, *FOLDER_CHECKS[resumes]):
        tried(errors, lambda: errors.extend(check(evidence)))  # noqa: B023 (called at once)
    notes = [note for notes_of in NOTES for note in notes_of(evidence)]
    folder = None if evidence.teacher is None else evidence.teacher.folder
    # Two checks may stumble over one path.
    distinct = {str(error): error for error in errors}
    return Preflight(tuple(distinct.values()), tuple(notes), evidence.data, evidence.teacher_labels, folder)


def _location_notes(evidence: Evidence) -> Iterator[str]:
    for where, model in evidence.models.items():
        if model.folder is None:
            yield f"{where}: '{model.source}' is no folder here, so taken as a hub id: {_NOT_CHECKED}."
    for split, source in remote_sources(evidence.recipe).items():
        is_hub = any(map(is_hub_id, parts_of(source)))
        how = f"no file here, so taken as a hub id: {_NOT_CHECKED}" if is_hub else "fetched when a run first needs it"
        yield f"data.{split}: '{source}' is {how}."


CHECKS: Final[tuple[Callable[[Evidence], Iterable[FlexKDError]], ...]] = (
    comparison_errors,
    head_errors,
    weight_errors,
    teacher_head_errors,
    kind_errors,
    type_errors,
    slice_errors,
    shape_errors,
    lora_errors,
    basis_errors,
    layer_errors,
    mapping_errors,
    geometry_errors,
    precision_errors,
    template_errors,
    end_errors,
    row_end_errors,
    length_errors,
    batch_errors,
    vocabulary_errors,
    position_errors,
    row_errors,
    answer_errors,
    package_errors,
    compiler_errors,
    output_errors,
)
"""Each yields what must be mended, or raises the first of it."""

FOLDER_CHECKS: Final[Mapping[Resumes, tuple[Callable[[Evidence], Iterable[FlexKDError]], ...]]] = {
    "nothing": (),
    "run": (run_errors,),
    "comparison": (cell_errors,),
    "anything": (run_errors, cell_errors),
}
"""Of what an earlier command left in the run folder."""

NOTES: Final[tuple[Callable[[Evidence], Iterator[str]], ...]] = (
    _location_notes,
    size_notes,
    label_notes,
    output_notes,
    template_notes,
)
"""Each yields what is worth knowing."""
