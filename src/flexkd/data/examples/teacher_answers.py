"""Training rows with the answers that `flexkd generate` wrote for a teacher, matched by row id."""

import hashlib
import logging
from dataclasses import replace
from typing import Any, Final

from flexkd.data.examples.generation import GenerationData
from flexkd.data.sources.json_lines import read_lines
from flexkd.errors import ArtifactError
from flexkd.files import local_path
from flexkd.fingerprints import describe_engine

logger = logging.getLogger(__name__)

MADE_OF: Final = "made_of"
"""Key in the first line of a file of answers: the fingerprints that the answers depend on."""


def with_teacher_answers(data: GenerationData, path: str | None) -> GenerationData:
    """The data with the teacher's answers in train; validation and test keep their references.

    The id of a row depends on its content, so no answer can be matched to another prompt.

    Args:
        path: File of `flexkd generate`; None leaves the data as it is.

    Raises:
        ArtifactError: The file is missing or damaged, or lacks a training row.
    """
    if path is None:
        return data
    file = local_path(path, where="data.teacher_answers")
    if not file.is_file():
        raise ArtifactError(
            f"data.teacher_answers: '{file}' is not there. Run flexkd generate with the teacher, which writes it, or "
            "correct the path."
        )
    lines = read_lines(file, dict[str, Any])
    # The first line holds fingerprints and has no id.
    made_of: dict[str, Any] = next((line[MADE_OF] for line in lines if MADE_OF in line), {})
    rows = [line for line in lines if "id" in line]
    answers = {str(row["id"]): (str(row["answer"]), bool(row["is_cut"])) for row in rows}
    missing = [example.id for example in data.train if example.id not in answers]
    if missing:
        raise ArtifactError(
            f"data.teacher_answers: '{file}' lacks {len(missing):,} of {len(data.train):,} training rows (first "
            f"{missing[0]}). Run flexkd generate with this recipe again; it adds what is missing."
        )
    usable = [example for example in data.train if answers[example.id][0].strip() and not answers[example.id][1]]
    if not usable:
        raise ArtifactError(
            f"data.teacher_answers: '{file}' holds no answer that the teacher ended by itself. Raise "
            "generation.max_new_tokens and generate again."
        )
    left_out = len(data.train) - len(usable)
    note = (
        f"the training rows have the teacher's answers ({describe_engine(made_of)}); {left_out:,} that were empty or "
        "cut are left out."
    )
    logger.info("data: %s", note)
    train = tuple(replace(example, answer=answers[example.id][0].strip()) for example in usable)
    digest = hashlib.blake2b(data.fingerprint.encode(), digest_size=16)
    for example in sorted(train, key=lambda example: example.id):
        digest.update(f"{example.id}\x1f{example.answer}\x1e".encode())
    return replace(data, train=train, fingerprint=digest.hexdigest(), notes=(*data.notes, note))
