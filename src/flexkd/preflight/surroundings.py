"""Whether a run can stand here: one process, and a folder that can be written."""

import os
from collections.abc import Iterator
from pathlib import Path

from flexkd.errors import FlexKDError, RecipeError
from flexkd.preflight.evidence import Evidence


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
    """The run folder is one, or can be made."""
    output = evidence.recipe.output
    if Path(output).is_file():
        yield RecipeError(f"output: '{output}' is a file. Name a folder, which may be new.")
