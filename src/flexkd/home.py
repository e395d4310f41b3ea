"""Where flexkd keeps what took long to make: fine-tuned teachers, converted models, rows that were fetched."""

import os
from pathlib import Path


def home_folder(kind: str) -> Path:
    """`$FLEXKD_HOME/KIND`, by default below `~/.cache/flexkd`; it may not exist yet."""
    home = os.environ.get("FLEXKD_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "flexkd") / kind
