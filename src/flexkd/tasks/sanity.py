"""The sanity check of a teacher before time is spent on it: its metric on some validation rows."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

from flexkd.errors import TrainingError
from flexkd.evaluate.inference import evenly_spaced
from flexkd.evaluate.sanity import FEWEST_ROWS, SANITY_ROWS, SanityResult
from flexkd.models.forward.autocast import autocast_dtype, resolve_precision
from flexkd.models.forward.engine import engine_of
from flexkd.recipe import Recipe
from flexkd.tasks.stored_results import StoredResults, remembered
from flexkd.tasks.task import Task

logger = logging.getLogger(__name__)

_CLASSES: Final = (
    "the names or the order of its classes are not those of the data (data.label_names), another text column"
)
_WORDS: Final = "another prompt or chat template (data.chat, data.template), other columns"


def look_at_teacher(
    recipe: Recipe,
    task: Task[Any],
    teacher: PreTrainedModel,
    *,
    stop: bool,
    made_of: Mapping[str, str] | None = None,
) -> list[str]:
    """Report how well the teacher does on some validation rows, and stop if it is clearly of no use.

    The teacher is left as it was: modes, device, weights.

    Args:
        recipe: With `teacher.allow_weak`, or an objective without teacher, there is a warning in place of the stop.
        task: Evaluates the teacher.
        teacher: After its fine-tuning, if any.
        stop: Whether to stop at all; else the result is only reported.
        made_of: Teacher, tokenizers and rows; what is seen is then kept for the next run with the same. None:
            it is not.

    Returns:
        Notes for a reader of the results; none without validation rows.

    Raises:
        TrainingError: The teacher is no better than a baseline that needs no model.
    """
    validation = task.encode().splits["validation"]
    if not validation:
        return []

    def seen() -> SanityResult:
        with _on_accelerator(teacher):
            return task.look(teacher, evenly_spaced(validation, SANITY_ROWS))

    if made_of is None:
        look = seen()
    else:
        engine = engine_of(teacher, autocast_dtype(resolve_precision(recipe.teacher.precision)))
        look = _remembered(recipe, task, {**made_of, **engine}, seen)
    note = f"teacher: {look.figure}."
    if look.verdict in ("sound", "undecided"):
        logger.info("%s", note)
        return [note]
    if look.verdict == "doubtful":
        note = f"teacher: {look.figure}: not shown to be better. {_causes(recipe, look)}"
    elif look.stops and stop and not recipe.teacher.allow_weak and not recipe.objective.baseline:
        raise TrainingError(
            f"teacher.model: '{recipe.teacher.model}' does not know this task: {look.figure}. "
            f"{_causes(recipe, look)} Correct that, {_training(recipe)}, or go on with teacher.allow_weak: true."
        )
    else:
        few = f" (fewer than {FEWEST_ROWS} rows, too few to stop for)" if not look.stops else ""
        note = f"teacher: it does not know this task: {look.figure}{few}. {_causes(recipe, look)}"
    logger.warning("%s", note)
    return [note]


def _remembered(
    recipe: Recipe, task: Task[Any], made_of: Mapping[str, str], look: Callable[[], SanityResult]
) -> SanityResult:
    """What was seen in an earlier run, or is seen now."""
    batch_size = None if recipe.generation is None else recipe.generation.batch_size
    settings = {"problem": recipe.task.problem, "labels": str(task.labels), "batch_size": str(batch_size)}
    return remembered(
        "teacher's answers to validation rows",
        {**made_of, **settings, "of": f"at most {SANITY_ROWS} validation rows"},
        look,
        pack=lambda result: StoredResults(asdict(result)),
        unpack=lambda stored: SanityResult(**stored.values),
    )


def _causes(recipe: Recipe, look: SanityResult) -> str:
    if look.hint:
        return f"{look.hint}."
    reasons = _WORDS if recipe.generation is not None else _CLASSES
    return f"Likely reasons: {reasons}, or weights that are not those of the task."


def _training(recipe: Recipe) -> str:
    if recipe.teacher.fine_tune is None:
        return "add teacher.fine_tune: {} to train it on the task first"
    return "train it longer or with another teacher.fine_tune.learning_rate"


@contextmanager
def _on_accelerator(teacher: PreTrainedModel) -> Iterator[None]:
    """Within it the teacher is on an accelerator, if there is one; a quantized teacher stays where it is."""
    device = teacher.device
    moves = torch.cuda.is_available() and not getattr(teacher, "is_quantized", False)
    if moves:
        nn.Module.to(teacher, "cuda")
    try:
        yield
    finally:
        if moves:
            nn.Module.to(teacher, device)
