"""Whether a checkpoint says in a way that can be read where its answers end, and rows hold the end that is read."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexkd.data.encoding.answer_ends import checkpoint_ends
from flexkd.data.examples.classification import ClassificationData
from flexkd.errors import FlexKDError, UnsupportedModelError
from flexkd.models.forward.row_ends import check_row_ends, row_end
from flexkd.preflight.evidence import Evidence, tried
from flexkd.preflight.model_files import tokenizer_folder


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


def row_end_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """Rows of classifiers that are encoder-decoders, whose head reads the last end of text of each."""
    recipe, data, errors = evidence.recipe, evidence.data, list[FlexKDError]()
    own = recipe.student.tokenizer or (recipe.student.model if recipe.student.start == "pretrained" else None)
    sources = {"teacher.model": recipe.teacher.tokenizer or recipe.teacher.model}
    sources["student.model"] = own or sources["teacher.model"]
    for where, model in evidence.models.items():
        # What config.json does not hold is a default of the config's class, which is not known here.
        if recipe.generation is not None or "eos_token_id" not in model.config:
            continue
        end = tried(errors, lambda: row_end(model.config, where=where))  # noqa: B023 (called at once)
        folder = None
        if end is not None:
            folder = tried(errors, lambda: tokenizer_folder(where, sources[where]))  # noqa: B023 (called at once)
        file = None if folder is None else folder / "tokenizer.json"
        if end is not None and file is not None and file.is_file() and isinstance(data, ClassificationData):
            tried(errors, lambda: _check_rows(file, data, end, where))  # noqa: B023 (called at once)
    yield from errors


def _check_rows(file: Path, data: ClassificationData, end: int, where: str) -> None:
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    rows = [row for split in ("train", "validation", "test") for row in getattr(data, split)]
    texts = [row.texts if len(row.texts) > 1 else row.texts[0] for row in rows]
    counts = [encoded.ids.count(end) for encoded in tokenizer.encode_batch(texts)]
    check_row_ends(counts, end, where=where, names=[row.id for row in rows])


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
