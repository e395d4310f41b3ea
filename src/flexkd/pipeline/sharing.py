"""Caches that are made before the first student learns, in as few passes of the teacher as possible."""

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from flexkd.core.objective import Objective
from flexkd.errors import RecipeError
from flexkd.facts.names import ALWAYS, AUTO, NEVER
from flexkd.guards.work import in_run_folder
from flexkd.pipeline.caching import cached_teacher, live_teacher, verified_cache
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.run import Run
from flexkd.pipeline.start import rotation_of
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.fingerprints import draws_at_random
from flexkd.recipe.taught_features import unit_attributions
from flexkd.teacher.cache.columns import merged
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.cache.verification import Verification
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest

logger = logging.getLogger(__name__)


@in_run_folder
def cache_answers(recipe: Recipe) -> CachedTeacher:
    """The cache that `distill` reads with this recipe, made whatever its size; an interrupted one is continued.

    Raises:
        RecipeError: No term of the objective reads the teacher, or `teacher.cache` is never.
        ArtifactError: As in `cached_teacher`.
    """
    cache = cached_teacher(*_teacher_and_request(recipe))
    assert cache is not None, "teacher.cache is neither auto nor never"
    return cache


@in_run_folder
def verify_answers(recipe: Recipe) -> tuple[CachedTeacher, Verification]:
    """The cache of this recipe after a check of all its bytes, and how the teacher answers some of its rows now.

    Raises:
        RecipeError: As in `cache_answers`.
        ArtifactError: As in `verified_cache`.
    """
    return verified_cache(*_teacher_and_request(recipe))


def _teacher_and_request(recipe: Recipe) -> tuple[Job, LiveTeacher, SignalRequest]:
    """The teacher of a recipe, and what the recipe's student reads of it."""
    if recipe.teacher.cache == NEVER:
        raise RecipeError("teacher.cache: 'never' makes no cache. Set it to auto, always or a folder.")
    if recipe.objective.baseline:
        raise RecipeError("objective.baseline: true reads no teacher, so there is nothing to store. Set it to false.")
    if recipe.teacher.cache == AUTO:
        recipe = override_recipe(recipe, [f"teacher.cache={ALWAYS}"])
    job = prepare(recipe, resumes="scores")
    run = Run(job, job.recipe, recipe.folder)
    selection = run.select()
    start = run.start(selection)
    _, objective = run.objective(start, selection)
    return run.job, live_teacher(run.job), SignalRequest.of(objective)


def share_answers(job: Job, recipes: Sequence[Recipe]) -> None:
    """Open or make the caches that all students still to be trained will read; the job's memo holds them afterwards.

    A cache stores taught units and directions, which are known only once a student has been started and paired. So one
    student of each kind is started here and thrown away; recipes that differ in their training alone share a start.
    """
    teaching = [recipe for recipe in recipes if not recipe.objective.baseline]
    if job.recipe.teacher.cache == NEVER or not teaching:
        return
    requests = [SignalRequest.of(objective) for objective in _objectives(job, teaching) if objective.needs_teacher]
    live = live_teacher(job)
    passes = max(_passes(recipe, len(job.splits["train"])) for recipe in teaching)
    for request in merged(requests):
        cached_teacher(job, live, request, passes=passes)
    nn.Module.to(job.teacher, "cpu")


def _objectives(job: Job, recipes: Sequence[Recipe]) -> list[Objective]:
    """The different objectives of the recipes."""
    starts: dict[str, dict[str, Recipe]] = {}
    # All students of one start together: what only they share is kept no longer.
    for recipe in sorted(recipes, key=lambda recipe: recipe.student.start_seed or 0):
        starts.setdefault(_start_key(job, recipe), {})[recipe.objective.model_dump_json()] = recipe
    objectives = []
    logger.info("teacher: starting %d kinds of students, to see what they read of it", sum(map(len, starts.values())))
    with TemporaryDirectory(prefix="flexkd-") as scratch:
        for number, group in enumerate(starts.values()):
            run = Run(job, next(iter(group.values())), Path(scratch, str(number)))
            selection = run.select()
            start = run.start(selection)
            for recipe in group.values():
                run = Run(job, recipe, Path(scratch, "objectives"))
                objectives.append(run.objective(start, selection)[1])
    return objectives


def _start_key(job: Job, recipe: Recipe) -> str:
    """A key that recipes with the same start and unit scores share; with the seed only where it changes one of them."""
    is_drawn = recipe.student.start == "config" or draws_at_random(recipe)
    seed: Any = recipe.training.seed if is_drawn else None
    attributions = unit_attributions(recipe, rotated=rotation_of(job, recipe) is not None)
    share, student = recipe.data.train_share, recipe.student.model_dump_json()
    return f"{share} {recipe.scores.model_dump_json()} {student} {attributions} {seed}"


def _passes(recipe: Recipe, num_rows: int) -> float:
    """How often a student goes over as many rows as all training rows are, though it may learn from a share of them."""
    section = recipe.training
    if section.max_steps is None:
        return section.epochs * (recipe.data.train_share or 1)
    return section.max_steps * section.batch_size / num_rows
