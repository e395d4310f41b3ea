"""The folders for what takes long to produce: fine-tuned teachers, converted models, fetched rows."""

import os
from pathlib import Path

from flexkd.files import local_path


def home_folder(kind: str) -> Path:
    """`$FLEXKD_HOME/KIND`, by default `KIND` in the folder `flexkd` of the user's cache; it may not exist yet.

    Raises:
        RecipeError: The environment variable is no path.
    """
    home = os.environ.get("FLEXKD_HOME")
    if home:
        return local_path(home, where="FLEXKD_HOME") / kind
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", where="XDG_CACHE_HOME") / "flexkd" / kind
