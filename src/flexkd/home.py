"""Where flexkd keeps what took long to make: fine-tuned teachers, converted models, rows that were fetched."""

import os
from pathlib import Path


def home_folder(kind: str) -> Path:
    """`$FLEXKD_HOME/KIND`, by default in `flexkd` of the user's cache (`~/.cache`); it may not exist yet."""
    home = os.environ.get("FLEXKD_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(home) if home else Path(cache, "flexkd")) / kind
