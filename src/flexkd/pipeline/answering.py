"""The teacher's answers to all training rows on disk, for sequence-level distillation."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from flexkd.data.examples.generation import GenerationExample
from flexkd.data.examples.teacher_answers import MADE_OF
from flexkd.display.progress import Progress
from flexkd.errors import ArtifactError, RecipeError
from flexkd.evaluate.generation import Answer, iterate_answers
from flexkd.files import writing, written_whole
from flexkd.fingerprints import check_fingerprints
from flexkd.guards.work import in_run_folder
from flexkd.models.forward.autocast import autocast_dtype
from flexkd.models.forward.engine import engine_of
from flexkd.pipeline.job import Job, prepare
from flexkd.processes import decided, is_first
from flexkd.recipe import Recipe
from flexkd.run_files import ANSWERS_FILE
from flexkd.tasks.generation import GenerationTask

logger = logging.getLogger(__name__)

_BATCHES_TOGETHER: Final = 8
"""Batches of prompts that are sorted by length together; an interruption loses at most the batch in progress."""


@in_run_folder
def answer_training_rows(recipe: Recipe) -> Path:
    """Generate the teacher's answer to every training row that has none yet; `data.teacher_answers` reads the file.

    Each finished batch is written at once, so that an interrupted call continues with the rows that are missing. The
    first line says what the answers depend on; another teacher, layout or decoding is refused.

    Returns:
        The file of answers, in the recipe's output folder.

    Raises:
        RecipeError: The task writes no text.
        ArtifactError: The file belongs to something else, is damaged, or another process writes it.

    Source:
        Kim and Rush, Sequence-Level Knowledge Distillation, 2016, arXiv:1606.07947, sec. 3.2.
    """
    if recipe.generation is None:
        raise RecipeError(f"task.type: {recipe.task.type} writes no text. Use instruction or summarization.")
    if recipe.data.teacher_answers is not None:
        raise RecipeError(
            f"data.teacher_answers: {recipe.data.teacher_answers!r} are answers already. Set it to null to generate."
        )
    path = recipe.folder / ANSWERS_FILE
    job = prepare(recipe).reported
    with writing(path):
        return _answer(job, path)


def _answer(job: Job, path: Path) -> Path:
    """Generate the answers that the file lacks; called with its folder held."""
    task = job.task
    assert isinstance(task, GenerationTask), "the task writes text"
    engine = engine_of(job.teacher, autocast_dtype(job.teacher_precision))
    made_of = {**job.fingerprints, **engine, **task.decoding_of(job.teacher)}
    examples = {example.id: example for example in task.all_data.train}
    writable = {example.id for example in task.data.train}
    answered = set(decided(lambda: sorted(_answered_rows(path, made_of))))
    # A row whose reference answer is too long to be learnt is answered like any other.
    open_ids = [id_ for id_ in examples if id_ not in answered]
    logger.info("%s: %d of %d training rows are answered", path, len(answered), len(examples))
    _, prompts = task.questions("train", [id_ for id_ in open_ids if id_ in writable])
    without_prompt = set(open_ids) - {str(prompt["id"]) for prompt in prompts}
    settings, stop_ids = task.settings, task.stop_ids(job.teacher)
    step = settings.batch_size * _BATCHES_TOGETHER
    with (
        (path if is_first() else Path(os.devnull)).open("a", encoding="utf-8", newline="\n") as file,
        Progress("teacher's answers", len(examples), "rows", done=len(answered) + len(without_prompt)) as progress,
    ):
        # A prompt that does not fit, or cannot be rendered, gets an empty answer; students leave such rows out.
        file.writelines(_line(Answer(id_, "", None, False), examples[id_]) for id_ in sorted(without_prompt))
        for first in range(0, len(prompts), step):
            chunk = prompts[first : first + step]
            options: dict[str, Any] = {"seed": settings.seeds[0], "precision": job.teacher_precision}
            for answers in iterate_answers(job.teacher, job.tokenizer, chunk, settings, stop_ids=stop_ids, **options):
                file.writelines(_line(answer, examples[answer.id]) for answer in answers)
                file.flush()
                if is_first():
                    os.fsync(file.fileno())
                progress.advance(len(answers))
    return path


def _line(answer: Answer, example: GenerationExample) -> str:
    row = {"id": answer.id, "answer": answer.text, "is_cut": answer.is_cut, "reference": example.answer}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _answered_rows(path: Path, made_of: Mapping[str, Any]) -> set[str]:
    """Ids of the rows with an answer in the file; removes a line that an interruption left half, or starts a new file.

    Raises:
        ArtifactError: The file is damaged, or its answers were made in another way.
    """
    head = json.dumps({MADE_OF: made_of}, ensure_ascii=False) + "\n"
    if not path.exists():
        path.write_text(head, encoding="utf-8")
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with written_whole(path) as partial:
            partial.write_bytes(whole)
    lines = whole.decode("utf-8").split("\n")[:-1]
    try:
        rows = [json.loads(line) for line in lines]
        stored = rows[0][MADE_OF] if rows else made_of
        ids = [str(row["id"]) for row in rows[1:]]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: damaged ({error!r}). Delete it, to answer again.") from error
    advice = "Choose another output folder, or delete it to answer again."
    notes = check_fingerprints(path, stored, json.loads(json.dumps(made_of)), advice)
    if notes:
        logger.warning("%s: %s; its answers are kept. Delete it, to answer again.", path, "; ".join(notes))
    if not rows:
        path.write_text(head, encoding="utf-8")
    if len(set(ids)) < len(ids):
        raise ArtifactError(f"{path}: holds a row twice. Delete it, to answer again.")
    return set(ids)
