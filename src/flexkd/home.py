"""Where flexkd keeps what took long to make: fine-tuned teachers, converted models, rows that were fetched."""

import os
from pathlib import Path

from flexkd.files import local_path


def home_folder(kind: str) -> Path:
    """`$FLEXKD_HOME/KIND`, by default in `flexkd` of the user's cache (`~/.cache`); it may not exist yet.

    Raises:
        RecipeError: The variable names no path.
    """
    home = os.environ.get("FLEXKD_HOME")
    if home:
        return local_path(home, where="FLEXKD_HOME") / kind
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", where="XDG_CACHE_HOME") / "flexkd" / kind
