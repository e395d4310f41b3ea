"""Whether the run folder can be written, and whether scores and checkpoints in it belong to the recipe."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from flexkd.data.examples.classification import ClassificationData
from flexkd.errors import ArtifactError, FlexKDError, RecipeError
from flexkd.facts.names import GGUF_ENDING, WEIGHT_ENDINGS
from flexkd.files import IS_FILE, why_not_writable
from flexkd.fingerprints import check_fingerprints, earlier_selection
from flexkd.guards.work import check_free
from flexkd.home import home_folder
from flexkd.preflight.inputs import RecipeInputs, collect_errors
from flexkd.preflight.model_files import adapter_folder
from flexkd.processes import is_first
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.fingerprints import (
    row_settings,
    selection_settings,
    teacher_settings,
    training_settings,
)
from flexkd.recipe.taught_features import may_rotate
from flexkd.run_files import (
    CACHE_FOLDER,
    CELL_FILE,
    CELLS_FOLDER,
    CHECKPOINTS_FOLDER,
    LOG_FILE,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    RECORD_FILE,
    REPORT_FILE,
    SEARCH_FOLDER,
    SELECTION_ADVICE,
    SELECTION_DIRECTIONS,
    SELECTION_FILE,
    SELECTION_HEADER,
    SELECTION_INPUTS,
    STATE_FILE,
    STUDENT_FOLDER,
    TRIAL_FILE,
    check_checkpoint,
    last_checkpoint,
)
from flexkd.strict_json import damage_named, read_object

_FOLDERS: Final = (CHECKPOINTS_FOLDER, STUDENT_FOLDER, CACHE_FOLDER, CELLS_FOLDER)
_FILES: Final = (SELECTION_FILE, RECIPE_FILE, RECORD_FILE, REPORT_FILE, PREDICTIONS_FILE, LOG_FILE)
"""What commands write into a run folder."""
_SECTIONS: Final = ("features", "objective", "scores", "student", "task", "training")
"""Sections of a recipe; fingerprints whose names begin with one depend on the recipe alone."""
_DIGESTED_BYTES: Final = 2**20


def output_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """The run folder and what is in it can be written, and so can the cache and the store of teachers."""
    recipe = inputs.recipe
    folder = recipe.folder
    yield from _folder_errors("output", recipe.output, folder)
    for name in _FOLDERS if folder.is_dir() else ():
        yield from _folder_errors("output", f"{recipe.output}/{name}", folder / name)
    for name in _FILES:
        if (folder / name).is_dir():
            yield RecipeError(f"output: '{recipe.output}/{name}' is a folder where a file is written. Move it away.")
    if recipe.cache_folder.parent != folder:
        yield from _folder_errors("teacher.cache", recipe.teacher.cache, recipe.cache_folder)
    if recipe.teacher.fine_tune is not None:
        store = home_folder("teachers")
        yield from _folder_errors("FLEXKD_HOME", str(store), store)


def busy_errors(recipe: Recipe) -> list[FlexKDError]:
    """Another process works in the run folder: what lies there may change while it is looked at."""
    errors: list[FlexKDError] = []
    if is_first():
        with collect_errors(errors):
            check_free(recipe.folder)
    return [error for error in errors if isinstance(error, ArtifactError)]


def output_notes(inputs: RecipeInputs) -> Iterator[str]:
    """A folder in the working folder that is called `~`, as earlier versions made it."""
    output = inputs.recipe.output
    if output.startswith("~") and Path(output).exists():
        yield f"output: '{output}' is below your home folder; a folder of that very name, here, is './{output}'."


def run_errors(inputs: RecipeInputs) -> Iterable[FlexKDError]:
    """Scores and checkpoints of an earlier run in the folder belong to this recipe.

    Raises:
        ArtifactError: They were made of something else.
    """
    recipe = inputs.recipe
    rows = {} if inputs.data is None else row_settings(recipe, inputs.data.fingerprint)
    if not isinstance(inputs.data, ClassificationData):
        rows.pop("data", None)  # a chat template may refuse rows, which only a run finds out for all of them
    _check_scores(inputs, {**rows, **selection_settings(recipe)})
    checkpoint = last_checkpoint(recipe.folder / CHECKPOINTS_FOLDER) if recipe.training.resume else None
    if checkpoint is not None:
        stored = _metadata(checkpoint / STATE_FILE, "Start in an empty output folder.")
        now = {**rows, **training_settings(recipe)}
        check_checkpoint(checkpoint / STATE_FILE, _comparable(stored, now), now)
    return ()


def continued(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe as it is continued in its folder, and a note where that differs.

    Earlier versions cut by the scores of PCA directions, and before that along those with the most variance, whatever
    the scores. A run or comparison that they have begun goes on so.
    """
    is_default = may_rotate(recipe) and recipe.student.chosen_by in ("auto", "scores")
    paths = [recipe.folder / SELECTION_FILE, *sorted((recipe.folder / CELLS_FOLDER).glob(f"*/{SELECTION_FILE}"))]
    if not is_default:
        return recipe, []
    if any(is_cut_along_earlier_directions(path) for path in paths if path.is_file()):
        earlier, words = "variance", "along the directions with the most variance"
    elif recipe.student.chosen_by == "auto" and _is_cut_by_scores(recipe.folder):
        earlier, words = "scores", "by the scores alone"
    else:
        return recipe, []
    note = (
        f"student.chosen_by: an earlier version began '{recipe.output}' and cut {words}: it goes on as '{earlier}'. "
        f"Choose another output folder to cut by '{recipe.student.chosen_by}'."
    )
    return override_recipe(recipe, [f"student.chosen_by={earlier}"]), [note]


def _is_cut_by_scores(folder: Path) -> bool:
    """Whether the run in a folder, or the students of a comparison in it, were begun when scores were the default."""
    path = folder / SELECTION_FILE
    if path.is_file():
        header = json.loads(_metadata(path, SELECTION_ADVICE).get(SELECTION_HEADER, "{}"))
        stored = earlier_selection(header.get("made_of", {}), is_cut_along_directions=False)
        return stored.get("student.chosen_by") == '"scores"'
    # A method of this version that cuts by scores writes no share, which scores do not read.
    return any(
        student.get("chosen_by", "scores") == "scores" and "function_share" in student
        for student in student_settings(folder)
    )


def student_settings(folder: Path) -> list[dict[str, Any]]:
    """Section `student` of every finished student in the folder of a comparison, those of its searches too."""
    places = (f"{CELLS_FOLDER}/*/{CELL_FILE}", f"{SEARCH_FOLDER}/*/*/{CELL_FILE}", f"{SEARCH_FOLDER}/*/*/{TRIAL_FILE}")
    files = [file for place in places for file in sorted(folder.glob(place))]
    return [_student_settings(file) for file in files]


def _student_settings(file: Path) -> dict[str, Any]:
    with damage_named(file):
        return dict(read_object(file, "made_of")["made_of"]["recipe"]["student"])


def is_cut_along_earlier_directions(path: Path) -> bool:
    """Whether an earlier version wrote this selection, and of a student that was cut along directions."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {}).get(SELECTION_HEADER, "{}"))
            is_cut = json.loads(header.get("made_of", {}).get("student.start", "null")) == "slice"
            return is_cut and not header.get(SELECTION_DIRECTIONS) and "start_units" not in file.keys()  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return False


def teacher_inputs(recipe: Recipe, folder: Path | None) -> dict[str, str]:
    """What decides the teacher and is known without loading it: settings, and fingerprints of weights.

    Args:
        recipe: Names the teacher.
        folder: The teacher's; None where it is not on this machine.
    """
    values = teacher_settings(recipe)
    if folder is not None:
        values["teacher.model"] = _weights_digest(folder)
    adapter = None if recipe.teacher.adapter is None else adapter_folder("teacher.adapter", recipe.teacher.adapter)
    if adapter is not None:
        values["teacher.adapter"] = _weights_digest(adapter)
    return values


def _check_scores(inputs: RecipeInputs, now: Mapping[str, str]) -> None:
    """Refuse stored scores that were not made of the recipe's settings, rows and teacher."""
    path = inputs.recipe.folder / SELECTION_FILE
    if not path.is_file():
        return
    header = json.loads(_metadata(path, "Delete it, to score again.").get(SELECTION_HEADER, "{}"))
    stored = header.get("made_of", {})
    if SELECTION_DIRECTIONS not in header:
        stored = earlier_selection(stored, is_cut_along_directions=is_cut_along_earlier_directions(path))
    check_fingerprints(path, _comparable(stored, now), now, SELECTION_ADVICE)
    folder = None if inputs.teacher is None else inputs.teacher.folder
    # Files of an earlier version name no inputs of the teacher; a teacher on the hub has no files here.
    stored_teacher, teacher = header.get(SELECTION_INPUTS, {}), teacher_inputs(inputs.recipe, folder)
    common = stored_teacher.keys() & teacher.keys()
    check_fingerprints(path, {n: stored_teacher[n] for n in common}, {n: teacher[n] for n in common}, SELECTION_ADVICE)


def _comparable(stored: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """The stored entries that a recipe and its rows decide; fingerprints of loaded models are left to the run."""
    return {name: value for name, value in stored.items() if name in now or name.partition(".")[0] in _SECTIONS}


def _metadata(path: Path, advice: str) -> Mapping[str, str]:
    """Metadata in the header of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}). {advice}") from error


def _weights_digest(folder: Path) -> str:
    """A hash of a model's weight files: their sizes, and a megabyte from the start, middle and end of each."""
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(path for path in folder.iterdir() if path.suffix in (*WEIGHT_ENDINGS, GGUF_ENDING)):
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for offset in (0, max(size // 2, 0), max(size - _DIGESTED_BYTES, 0)):
                stream.seek(offset)
                digest.update(stream.read(_DIGESTED_BYTES))
    return digest.hexdigest()


def _folder_errors(where: str, written: str, folder: Path) -> Iterator[FlexKDError]:
    """Why a folder, named `written` in messages, cannot be made or written into."""
    reason = why_not_writable(folder)
    if reason == IS_FILE:
        yield RecipeError(f"{where}: '{written}' is a file. Name a folder, which may be new.")
    elif reason:
        yield RecipeError(f"{where}: '{written}' cannot be written: {reason}. Name another folder.")
