"""Whether a run folder that is there already belongs to the recipe: its scores, checkpoints and finished cells."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from flexkd.data.examples.classification import ClassificationData
from flexkd.errors import ArtifactError, FlexKDError
from flexkd.facts.families.table import family_turns
from flexkd.fingerprints import check_fingerprints
from flexkd.preflight.evidence import Evidence
from flexkd.preflight.model_files import adapter_folder
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.fingerprints import row_settings, selection_settings, teacher_settings, training_settings
from flexkd.recipe.methods import METHODS, compared_methods, compared_seeds, method_recipe
from flexkd.run_files import (
    CELL_FILE,
    INPUTS,
    SELECTION_ADVICE,
    SELECTION_FILE,
    SELECTION_HEADER,
    STATE_FILE,
    check_checkpoint,
    last_checkpoint,
)

_SECTIONS: Final = ("features", "objective", "scores", "student", "task", "training")
_SAMPLED: Final = 2**20


def check_cell(path: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a finished cell of another comparison.

    A cell of an earlier version lacks the keys that came later: its recipe is read as this version reads it.

    Args:
        path: Of the cell's file.
        stored: What the cell was made of: `recipe`, and fingerprints by name.
        now: What it would be made of.

    Raises:
        ArtifactError: It was made of something else; names what differs.
    """
    before, after = ({**made_of, "recipe": _read_again(made_of["recipe"])} for made_of in (stored, now))
    differing = _differing(before, json.loads(json.dumps(after)))
    if differing:
        raise ArtifactError(
            f"{path}: was made by another recipe or teacher ({', '.join(differing[:5])}). Choose another output folder."
        )


def _read_again(settings: Mapping[str, Any]) -> Any:
    """Settings of a cell with the defaults of keys that they lack; as they stand where this version refuses them."""
    values: dict[str, Any] = {"name": "cell", "output": "cell", **json.loads(json.dumps(settings))}
    features = values.get("objective", {}).get("features")
    if features:
        # JSON knows no keys but text, and layers are numbers.
        features["layer_map"] = {int(student): teacher for student, teacher in features["layer_map"].items()}
    try:
        recipe = Recipe.model_validate(values)
    except ValueError:
        return settings
    return _deciding_settings(recipe)


def _differing(before: Any, after: Any, at: str = "") -> list[str]:
    """Dotted names of the entries that differ."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return [] if before == after else [at]
    keys = sorted(before.keys() | after.keys())
    return [name for key in keys for name in _differing(before.get(key), after.get(key), f"{at}.{key}".lstrip("."))]


def _deciding_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe that decide the figures of a student."""
    settings: dict[str, Any] = recipe.model_dump(mode="json", exclude={"name", "output", "compare"})
    # Both decide whether there is a run, and none of its numbers; the rows that are read have a fingerprint.
    del settings["teacher"]["allow_weak"]
    del settings["data"]["bad_rows"]
    return settings


def cell_folder(folder: Path, method: str, seed: int) -> Path:
    """Where a comparison keeps one student."""
    return folder / "cells" / f"{method}-{seed}"


def cell_recipe(recipe: Recipe, seed: int, folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of one student of a comparison, and what of it decides its figures."""
    own = override_recipe(recipe, [f"training.seed={seed}", f"output={json.dumps(str(folder))}"])
    return own, _deciding_settings(own)


def teacher_inputs(recipe: Recipe, folder: Path | None) -> dict[str, str]:
    """What makes the teacher, as far as it can be known without loading it.

    Args:
        recipe: Of the run.
        folder: Of the teacher; None where it is not on this machine.
    """
    inputs = teacher_settings(recipe)
    if folder is not None:
        inputs["teacher.model"] = _digest(folder)
    adapter = None if recipe.teacher.adapter is None else adapter_folder("teacher.adapter", recipe.teacher.adapter)
    if adapter is not None:
        inputs["teacher.adapter"] = _digest(adapter)
    return inputs


def run_errors(evidence: Evidence) -> Iterable[FlexKDError]:
    """Scores and checkpoints of an earlier run in the same folder."""
    recipe = evidence.recipe
    rows = {} if evidence.data is None else row_settings(recipe, evidence.data.fingerprint)
    if not isinstance(evidence.data, ClassificationData):
        rows.pop("data", None)  # a template may leave rows out
    path = recipe.folder / SELECTION_FILE
    if path.is_file():
        header = json.loads(_metadata(path, "Delete it, to score again.").get(SELECTION_HEADER, "{}"))
        stored, now = header.get("made_of", {}), {**rows, **selection_settings(recipe)}
        check_fingerprints(path, _known(stored, now), now, SELECTION_ADVICE)
        folder = None if evidence.teacher is None else evidence.teacher.folder
        # An earlier version kept none; a teacher on the hub has no files here.
        seen, inputs = header.get(INPUTS, {}), teacher_inputs(recipe, folder)
        both = seen.keys() & inputs.keys()
        check_fingerprints(path, {n: seen[n] for n in both}, {n: inputs[n] for n in both}, SELECTION_ADVICE)
    last = last_checkpoint(recipe.folder / "checkpoints") if recipe.training.resume else None
    if last is not None:
        stored = _metadata(last / STATE_FILE, "Start in an empty output folder.")
        now = {**rows, **training_settings(recipe)}
        check_checkpoint(last / STATE_FILE, _known(stored, now), now)
    return ()


def cell_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """Finished students of an earlier comparison in the same folder; a search may have chosen any of its values."""
    recipe, teacher = evidence.recipe, evidence.models.get("teacher.model")
    if recipe.compare is None or recipe.compare.search or teacher is None:
        return
    turns = family_turns(teacher.model_type) if teacher.model_type else None
    for method in compared_methods(recipe, (), turns=turns):
        for seed in compared_seeds(recipe, ()):
            folder = cell_folder(recipe.folder, method, seed)
            if method in METHODS and (folder / CELL_FILE).is_file():
                stored = json.loads((folder / CELL_FILE).read_text(encoding="utf-8"))["made_of"]
                now = cell_recipe(method_recipe(recipe, method), seed, folder)[1]
                try:
                    check_cell(folder / CELL_FILE, {"recipe": stored["recipe"]}, {"recipe": now})
                except ArtifactError as error:
                    yield error
                    return


def _known(stored: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Of what is stored, all that a recipe and its rows decide: fingerprints of loaded models are left to the run."""
    return {name: old for name, old in stored.items() if name in now or name.partition(".")[0] in _SECTIONS}


def _metadata(path: Path, advice: str) -> Mapping[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}). {advice}") from error


def _digest(folder: Path) -> str:
    """Of the weights: their sizes, and a megabyte from the start, the middle and the end of each file."""
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf")):
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for place in (0, max(size // 2, 0), max(size - _SAMPLED, 0)):
                stream.seek(place)
                digest.update(stream.read(_SAMPLED))
    return digest.hexdigest()
