"""Where flexkd keeps what took long to make: fine-tuned teachers, converted models, rows that were fetched."""

import os
from pathlib import Path


def home_folder(kind: str) -> Path:
    """`$FLEXKD_HOME/KIND`, by default below `flexkd` in the user's cache; it may not exist yet."""
    home = os.environ.get("FLEXKD_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return (Path(home) if home else cache / "flexkd") / kind
