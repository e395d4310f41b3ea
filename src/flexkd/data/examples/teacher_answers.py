"""Answers of a teacher in place of the rows' own: what `flexkd generate` wrote, found again by the id of each row."""

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
"""Entry of the first line of a file of answers: what they depend on."""


def with_teacher_answers(data: GenerationData, path: str | None) -> GenerationData:
    """The training rows with the teacher's answers; validation and test keep the references.

    Ids hold the content of a row, so that no answer meets another prompt, whatever the order of the rows.

    Args:
        data: Rows of the task.
        path: File of `flexkd generate`; None leaves the rows as they are.

    Raises:
        ArtifactError: It is not there, is damaged, or lacks a training row.
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
    # The first line says what the answers depend on; it has no id.
    made_of: dict[str, Any] = next((line[MADE_OF] for line in lines if MADE_OF in line), {})
    rows = [line for line in lines if "id" in line]
    answers = {str(row["id"]): (str(row["answer"]), bool(row["is_cut"])) for row in rows}
    missing = [example.id for example in data.train if example.id not in answers]
    if missing:
        raise ArtifactError(
            f"data.teacher_answers: '{file}' lacks {len(missing):,} of {len(data.train):,} training rows (first "
            f"{missing[0]}). Run flexkd generate with this recipe again; it adds what is missing."
        )
    usable = [one for one in data.train if answers[one.id][0].strip() and not answers[one.id][1]]
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
    train = tuple(replace(one, answer=answers[one.id][0].strip()) for one in usable)
    digest = hashlib.blake2b(data.fingerprint.encode(), digest_size=16)
    for one in sorted(train, key=lambda example: example.id):
        digest.update(f"{one.id}\x1f{one.answer}\x1e".encode())
    return replace(data, train=train, fingerprint=digest.hexdigest(), notes=(*data.notes, note))
