"""Whether a run can stand here: one process, and a folder that can be written."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from flexkd.errors import FlexKDError, RecipeError
from flexkd.files import IS_FILE, local_path, why_not_writable
from flexkd.home import home_folder
from flexkd.preflight.evidence import Evidence

_FOLDERS: Final = ("checkpoints", "student", "cache", "cells")
_FILES: Final = ("scores.safetensors", "recipe.yaml", "record.json", "report.html", "predictions.jsonl")
"""What commands write into a run folder."""


def check_processes() -> None:
    """A run folder has one writer: scores, records and the teacher store are not shared between processes yet.

    Raises:
        RecipeError: Several processes were started together.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise RecipeError(
            f"{processes} processes: a recipe runs in one process in this version. Use DistillationTrainer in a script "
            "of your own under 'accelerate launch', or start one process."
        )


def output_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """The run folder, and what stands in it, can be written; so can the folders that are named beside it."""
    recipe = evidence.recipe
    folder = recipe.folder
    yield from _folder_errors("output", recipe.output, folder)
    for name in _FOLDERS if folder.is_dir() else ():
        yield from _folder_errors("output", f"{recipe.output}/{name}", folder / name)
    for name in _FILES:
        if (folder / name).is_dir():
            yield RecipeError(f"output: '{recipe.output}/{name}' is a folder where a file is written. Move it away.")
    if recipe.teacher.cache not in ("auto", "always", "never"):
        cache = local_path(recipe.teacher.cache, where="teacher.cache")
        yield from _folder_errors("teacher.cache", recipe.teacher.cache, cache)
    if recipe.teacher.fine_tune is not None:
        store = home_folder("teachers")
        yield from _folder_errors("FLEXKD_HOME", str(store), store)


def output_notes(evidence: Evidence) -> Iterator[str]:
    """A folder that is really called `~`, as an earlier version made it."""
    output = evidence.recipe.output
    if output.startswith("~") and Path(output).exists():
        yield f"output: '{output}' is below your home folder; a folder of that very name, here, is './{output}'."


def _folder_errors(where: str, written: str, folder: Path) -> Iterator[FlexKDError]:
    reason = why_not_writable(folder)
    if reason == IS_FILE:
        yield RecipeError(f"{where}: '{written}' is a file. Name a folder, which may be new.")
    elif reason:
        yield RecipeError(f"{where}: '{written}' cannot be written: {reason}. Name another folder.")
