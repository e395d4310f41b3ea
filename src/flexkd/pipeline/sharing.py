"""One pass of the teacher before the first student learns, for all that a run or a comparison will read of it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from flexkd.core.objective import Objective
from flexkd.errors import RecipeError
from flexkd.pipeline.caching import ALWAYS, AUTO, NEVER, cached_teacher, live_teacher, verified_cache
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.run import Run
from flexkd.recipe import Recipe, override_recipe
from flexkd.teacher.cache.columns import merged
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.cache.verification import Verification
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest

logger = logging.getLogger(__name__)


def cache_answers(recipe: Recipe) -> CachedTeacher:
    """The cache that `distill` reads with this recipe, whatever its size; an interrupted one is gone on with.

    Raises:
        RecipeError: No term of the objective reads the teacher, or the recipe wants no cache.
        ArtifactError: As in `cached_teacher`.
    """
    found = cached_teacher(*_asked(recipe))
    assert found is not None, "asked for"
    return found


def verify_answers(recipe: Recipe) -> tuple[CachedTeacher, Verification]:
    """The cache of this recipe with all its bytes compared, and what the teacher answers to some of its rows now.

    Raises:
        RecipeError: As in `cache_answers`.
        ArtifactError: As in `verified_cache`.
    """
    return verified_cache(*_asked(recipe))


def _asked(recipe: Recipe) -> tuple[Job, LiveTeacher, SignalRequest]:
    """The teacher of a recipe, and what is read of it."""
    if recipe.teacher.cache == NEVER:
        raise RecipeError("teacher.cache: 'never' wants no cache. Set it to auto, always or a folder.")
    if recipe.objective.baseline:
        raise RecipeError(
            "objective.baseline: true reads no teacher, so that there is nothing to store. Set it to false."
        )
    if recipe.teacher.cache == AUTO:
        recipe = override_recipe(recipe, [f"teacher.cache={ALWAYS}"])
    run = Run(prepare(recipe, resumes="run"), recipe, recipe.folder)
    selection = run.select()
    start = run.start(selection)
    _, objective = run.objective(start, selection)
    return run.job, live_teacher(run.job), SignalRequest.of(objective)


def share_answers(job: Job, recipes: Sequence[Recipe]) -> None:
    """Open or make caches that serve all these students, with as few passes of the teacher as can be.

    Students are started once more for it, so that the units and directions that they will be taught are known; those
    that differ in their training alone share a start.

    Args:
        job: Of the comparison; the caches are open in it afterwards.
        recipes: Of the students that are still to be trained.
    """
    teaching = [recipe for recipe in recipes if not recipe.objective.baseline]
    if job.recipe.teacher.cache == NEVER or not teaching:
        return
    requests = [SignalRequest.of(one) for one in _objectives(job, teaching) if one.needs_teacher]
    live, passes = live_teacher(job), max(_passes(recipe, len(job.splits["train"])) for recipe in teaching)
    for request in merged(requests):
        cached_teacher(job, live, request, passes=passes)
    nn.Module.to(job.teacher, "cpu")


def _objectives(job: Job, recipes: Sequence[Recipe]) -> list[Objective]:
    starts: dict[str, dict[str, Recipe]] = {}
    for recipe in recipes:
        starts.setdefault(_start_key(recipe), {})[recipe.objective.model_dump_json()] = recipe
    found = []
    logger.info("teacher: what %d kinds of students read of it", sum(map(len, starts.values())))
    with TemporaryDirectory(prefix="flexkd-") as scratch:
        for number, group in enumerate(starts.values()):
            run = Run(job, next(iter(group.values())), Path(scratch, str(number)))
            selection = run.select()
            start = run.start(selection)
            for recipe in group.values():
                run = Run(job, recipe, Path(scratch, "objectives"))
                found.append(run.objective(start, selection)[1])
    return found


def _start_key(recipe: Recipe) -> str:
    """What decides a start: the seed only where something of it is drawn that states hang on."""
    is_drawn = recipe.student.start == "config" or recipe.scores.attribution == "random"
    seed: Any = recipe.training.seed if is_drawn else None
    return f"{recipe.scores.model_dump_json()} {recipe.student.model_dump_json()} {seed}"


def _passes(recipe: Recipe, rows: int) -> float:
    section = recipe.training
    return section.epochs if section.max_steps is None else section.max_steps * section.batch_size / rows
