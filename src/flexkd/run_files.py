"""Names of the files and folders in a run folder, and the check that a checkpoint belongs to the run."""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from flexkd.errors import ArtifactError
from flexkd.fingerprints import differences

RECIPE_FILE: Final = "recipe.yaml"
RECORD_FILE: Final = "record.json"
PREDICTIONS_FILE: Final = "predictions.jsonl"
REPORT_FILE: Final = "report.html"
LOG_FILE: Final = "flexkd.log"
"""What every command that worked in the folder has said, one after the other."""
COMPARISON_FILE: Final = "compare.json"
"""Stands in the folder of a comparison instead of `RECORD_FILE`."""
CONTRASTS_FILE: Final = "contrasts.json"
"""Contrasts of a comparison that were named before its first student was finished, beside `COMPARISON_FILE`."""
SEEDS_FILE: Final = "seeds.json"
"""Seeds of a comparison that were named before its first student was finished, in the same place."""
ANSWERS_FILE: Final = "answers.jsonl"
"""A teacher's answers to the training rows, from `flexkd generate`."""

STUDENT_FOLDER: Final = "student"
STUDENT_SETTINGS_FILE: Final = "flexkd.json"
"""In the student's folder: how it reads rows, for `flexkd predict`."""
LOCK_FILE: Final = "flexkd.lock"
"""Is there while a command works in the folder, and names its process."""

CHECKPOINTS_FOLDER: Final = "checkpoints"
CACHE_FOLDER: Final = "cache"
CELLS_FOLDER: Final = "cells"
"""Holds one folder for each method and seed of a comparison."""
SEARCH_FOLDER: Final = "search"
"""Holds one folder for each method of a search, and in it one for each trial."""
TRIAL_FILE: Final = "trial.json"
"""The result of one of them, in its folder."""
TUNING_FILE: Final = "tune.json"
"""What a search chose for each method, for `flexkd compare --tuned`."""
CELL_FILE: Final = "cell.json"
"""The result of one of them, in its folder."""
SIZES_FILE: Final = "sizes.json"
"""Stands in the folder of `flexkd sizes` instead of `RECORD_FILE`."""
SIZES_FOLDER: Final = "sizes"
"""Holds one folder for each size and seed, like `CELLS_FOLDER`."""
STEPS_FILE: Final = "steps.json"
"""How many optimizer steps fit into `max_minutes`: beside the checkpoints of a run, or in a comparison's folder."""

STATE_FILE: Final = "objective.safetensors"
"""What a checkpoint holds besides the student; written last, so that a checkpoint with it is complete."""

_TRAINER_STATE: Final = "trainer_state.json"
_NEEDED: Final = (STATE_FILE, _TRAINER_STATE, "optimizer.*", "scheduler.*", "rng_state*.pth", "*model*")
"""Files of a checkpoint, without which a run would go on otherwise than it would have."""

SELECTION_FILE: Final = "scores.safetensors"
SELECTION_HEADER: Final = "flexkd"
"""Metadata entry of a selection file with its fingerprints, as JSON."""
SELECTION_INPUTS: Final = "inputs"
"""Entry of that JSON with the fingerprints of the teacher and the rows."""
SELECTION_DIRECTIONS: Final = "directions"
"""Entry of that JSON about scores of directions, null without any; files of earlier versions have none."""
SELECTION_ADVICE: Final = "Choose another output folder, or delete this one to start afresh."


def check_checkpoint(path: Path, stored: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Refuse a checkpoint of another run.

    Returns:
        Notes on differences that do no harm, as in `differences`.

    Raises:
        ArtifactError: Names every other difference, old and new.
    """
    refused, notes = differences(stored, now)
    if refused:
        raise checkpoint_error(path, refused)
    return notes


def checkpoint_error(path: Path, reasons: Sequence[str]) -> ArtifactError:
    """The error for a checkpoint that a run cannot resume from."""
    return ArtifactError(
        f"{path}: {'; '.join(reasons)}. Resume with what the run began with, or start in an empty output folder."
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that is complete and whole; None where there is none."""
    return next((checkpoint for checkpoint, damage in checkpoints(folder) if not damage), None)


def checkpoints(folder: Path) -> Iterator[tuple[Path, str]]:
    """The complete checkpoints, the latest first, each with why a run cannot go on from it: nothing, or a reason.

    A run also needs the checkpoint of its best evaluation so far.
    """
    complete = [path.parent for path in folder.glob(f"checkpoint-[0-9]*/{STATE_FILE}")]
    for checkpoint in sorted(complete, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        damage = _damage(checkpoint)
        if not damage:
            state = json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))
            best = checkpoint.with_name(f"checkpoint-{state.get('best_global_step') or 0}")
            if best.name not in ("checkpoint-0", checkpoint.name):
                damage = _damage(best)
                damage = damage and f"its best one, {best.name}: {damage}"
        yield checkpoint, damage


def _damage(checkpoint: Path) -> str:
    """Which of a checkpoint's files is missing or cannot be read, as far as their beginnings and ends show."""
    names = [path.name for path in checkpoint.glob("[!.]*")]
    for pattern in _NEEDED:
        if not any(fnmatch(name, pattern) for name in names):
            return f"{pattern} is missing"
    return next((f"{name}: {reason}" for name in sorted(names) if (reason := _damage_of_file(checkpoint / name))), "")


def _damage_of_file(file: Path) -> str:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="np"):
                return ""
        if file.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(file):
                return ""
        if file.suffix == ".json" and not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
            return "it is no object"
    except (ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return str(error)
    return ""
