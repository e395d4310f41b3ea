"""Whether a checkpoint says in a way that can be read where its answers end."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexkd.data.answer_ends import checkpoint_ends
from flexkd.errors import FlexKDError, UnsupportedModelError
from flexkd.preflight.evidence import Evidence, tried


def end_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """Ends that are no token ids; transformers passes over a generation_config.json that it cannot read."""
    if evidence.recipe.generation is None:
        return
    errors: list[FlexKDError] = []
    for where, model in evidence.models.items():
        if model.folder is not None:
            folder, config = model.folder, model.config
            tried(errors, lambda: checkpoint_ends(_generation_config(folder, where), config, where=where))  # noqa: B023 (called at once)
    yield from errors


def _generation_config(folder: Path, where: str) -> Mapping[str, Any]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(
            f"{where}: {file} is not JSON ({error}). Save the model again, or delete the file: then config.json says "
            "where answers end."
        ) from None
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{where}: {file} holds no settings. Save the model again, or delete the file.")
    return content
