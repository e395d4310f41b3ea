"""Methods x seeds under one recipe: one teacher, the same rows, order, start and steps, compared in pairs."""

import datetime
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from flexkd.evaluate.contrasts import paired_differences, with_contrasts
from flexkd.evaluate.row_contrasts import RowValues, read_row_values, row_metric, with_row_contrasts
from flexkd.facts.families.table import family_can_rotate
from flexkd.facts.metrics import LOWER_IS_BETTER
from flexkd.files import written_whole
from flexkd.models.loading.pretrained import load_config
from flexkd.pipeline.cells import cell_file, run_cell, steps_of_plan
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.recording import describe_baselines, environment
from flexkd.pipeline.sharing import share_answers
from flexkd.pipeline.start import rotation_of
from flexkd.preflight.comparison import cell_folder, equal_steps, finished_steps
from flexkd.preflight.contrasts import are_late, first_contrasts, limits
from flexkd.preflight.run_folder import continued
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.methods import (
    check_comparison,
    compared_contrasts,
    compared_methods,
    compared_seeds,
    definition_notes,
    method_recipe,
    reference_method,
)
from flexkd.recipe.taught_features import may_rotate
from flexkd.record import CompareCell, CompareRecord
from flexkd.run_files import COMPARISON_FILE, CONTRASTS_FILE, PREDICTIONS_FILE, STEPS_FILE
from flexkd.training.time_limit import LIMITS

logger = logging.getLogger(__name__)


def compare(
    recipe: Recipe,
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    search: Mapping[str, Sequence[Any]] | None = None,
) -> CompareRecord:
    """Run every method with every seed, and compare each with plain fine-tuning, or else with the first method.

    Other contrasts can be named in `compare.contrasts`, before anything is trained; the exact test is corrected for
    their number. Contrasts that are named after the first student is finished are marked in the record.

    A search tries the same values for every method with the first seed and chooses by the validation rows; it is part
    of the budget, which is the same for all methods but for keys of a section that a method does not have. Each
    finished cell is kept, so that an interrupted comparison continues with the missing ones. Where a time limit decides
    on the steps, all students take those that the first one plans.

    Args:
        recipe: Describes `flexkd`; `recipe.methods.METHODS` says what the other methods change, and its own `compare`
            section may define more.
        methods: Names of methods; empty: the recipe's, or the default ones.
        seeds: Seeds of the students; empty: the recipe's, or `DEFAULT_SEEDS`.
        search: Recipe key to the values that every method tries; None: the recipe's.

    Raises:
        RecipeError: As `check_comparison`.
        ArtifactError: Finished students belong to another recipe, or took different numbers of steps.
        FlexKDError: As `pipeline.distill`.
    """
    requested, (recipe, _) = recipe, continued(recipe)
    config = load_config(recipe.teacher.model, where="teacher.model")
    can_rotate, width = family_can_rotate(config.model_type), getattr(config, "hidden_size", None)
    methods, seeds = compared_methods(recipe, methods, can_rotate=can_rotate), compared_seeds(recipe, seeds)
    grid: Mapping[str, Sequence[Any]] = search or (recipe.compare.search if recipe.compare and search is None else {})
    check_comparison(recipe, methods, seeds, can_rotate=can_rotate, width=width)
    variants = {method: method_recipe(recipe, method) for method in methods}
    folder, contrasts = recipe.folder, _contrasts(recipe, methods, seeds)
    job = prepare(requested, students=len(methods) * len(seeds), resumes="comparison")
    # Whether a teacher can be rotated is first read from its family and now from its forward: the methods have to hold
    # for both, or one of them would teach something else than its name says.
    rotations = [rotation_of(job, variant) for variant in variants.values() if may_rotate(variant)]
    check_comparison(recipe, methods, seeds, can_rotate=can_rotate and None not in rotations, width=width)
    finished, notes = _finished_steps(recipe, methods, seeds), definition_notes(recipe, methods)
    _name_contrasts(folder, contrasts)
    teacher, baselines = job.predict(job.teacher), job.task.baselines()
    candidates = {method: _candidates(variant, grid) for method, variant in variants.items()}
    # Before any student trains, so that the teacher runs once for all of them.
    share_answers(job, _unfinished(candidates, seeds, folder))
    # The winner of each search leaves a finished cell of the first seed, which is only read below.
    best = {method: _search(job, teacher, recipes, folder, method, seeds[0]) for method, recipes in candidates.items()}
    cells = [_logged_cell(job, teacher, best[method], method, seed) for seed in seeds for method in methods]
    reference = reference_method(methods)
    record = CompareRecord(
        metric=recipe.task.metric,
        problem=recipe.task.problem,
        methods=methods,
        seeds=seeds,
        cells=cells,
        reference=reference,
        paired=paired_differences(cells, methods, seeds, recipe.task.metric, reference),
        teacher=dict(job.task.metrics(teacher, teacher)),
        name=recipe.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        recipe=recipe.model_dump(mode="json"),
        environment=environment(job.precision),
        notes=[*job.notes, *notes, *_step_notes(recipe, finished), *_search_notes(best, grid)],
        baselines={model.name: model.metrics for model in describe_baselines(job, baselines, teacher)},
    )
    record = with_contrasts(record, contrasts, named_after_results=are_late(folder, contrasts))
    record = with_row_contrasts(record, _row_values(record, folder))
    record.write(folder / COMPARISON_FILE)
    return record


def _row_values(record: CompareRecord, folder: Path) -> dict[tuple[str, int], RowValues]:
    """What each student says about each test row; logs which cells of earlier versions did not keep it."""
    metric = row_metric(record.problem, record.metric)
    values = {
        (cell.method, cell.seed): read_row_values(
            cell_folder(folder, cell.method, cell.seed) / PREDICTIONS_FILE, record.problem, metric
        )
        for cell in record.cells
    }
    missing = [f"{method}-{seed}" for (method, seed), rows in values.items() if rows is None]
    if missing:
        logger.warning(
            "%s: no predictions were kept with %s, so that their rows are not compared. Delete their folders to train "
            "them again.",
            folder,
            ", ".join(missing),
        )
    return {cell: rows for cell, rows in values.items() if rows is not None}


def _contrasts(recipe: Recipe, methods: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, str]]:
    """The contrasts of a comparison; logs what they and the seeds cannot show."""
    contrasts = compared_contrasts(recipe, methods)
    for note in limits(recipe, contrasts, seeds):
        logger.warning(note)
    return contrasts


def _name_contrasts(folder: Path, contrasts: Sequence[tuple[str, str]]) -> None:
    """Write down the contrasts of a comparison; once a student is finished, those that were named before it stay."""
    first = first_contrasts(folder, contrasts)
    with written_whole(folder / CONTRASTS_FILE) as partial:
        partial.write_text(json.dumps(first), encoding="utf-8")


def _logged_cell(job: Job, teacher: Any, recipe: Recipe, method: str, seed: int) -> CompareCell:
    metric = job.recipe.task.metric
    cell = run_cell(job, teacher, recipe, method, seed, cell_folder(job.recipe.folder, method, seed))
    logger.info("%s seed %d: %s %s", method, seed, metric, cell.metrics[metric])
    return cell


def _candidates(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> list[Recipe]:
    """The recipe of a method with every combination of the grid's values."""
    grid = {key: values for key, values in grid.items() if _has_section(recipe, key)}
    return [
        override_recipe(recipe, [f"{key}={json.dumps(value)}" for key, value in zip(grid, values, strict=True)])
        for values in product(*grid.values())
    ]


def _unfinished(candidates: Mapping[str, Sequence[Recipe]], seeds: Sequence[int], folder: Path) -> list[Recipe]:
    """Recipes of all cells that may still be trained: any candidate of a method may turn out the best."""
    return [
        override_recipe(recipe, [f"training.seed={seed}"])
        for method, recipes in candidates.items()
        for seed in seeds
        if not cell_file(cell_folder(folder, method, seed)).is_file()
        for recipe in recipes
    ]


def _search(job: Job, teacher: Any, candidates: Sequence[Recipe], folder: Path, method: str, seed: int) -> Recipe:
    """The candidate that is best on the validation rows; its student of this seed becomes a cell of the comparison."""
    if len(candidates) == 1:
        return candidates[0]
    metric = job.task.validation_metrics().metric
    sign = -1 if metric in LOWER_IS_BETTER else 1
    folders = [folder / "search" / method / str(index) for index in range(len(candidates))]
    values = []
    for index, candidate in enumerate(candidates):
        cell = run_cell(job, teacher, candidate, f"candidate {index}", seed, folders[index])
        value = cell.metrics[f"validation_{metric}"]
        values.append(-math.inf if value is None else sign * float(value))
    winner = values.index(max(values))
    file = cell_file(cell_folder(folder, method, seed))
    if not file.is_file():
        with written_whole(file) as partial:
            shutil.copyfile(cell_file(folders[winner]), partial)
    return candidates[winner]


def _finished_steps(recipe: Recipe, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, int | None]:
    """Steps of the finished students, which those still to be trained will take as well; empty without a time limit.

    Raises:
        ArtifactError: As `equal_steps`.
    """
    if recipe.training.max_minutes is None:
        return {}
    finished = finished_steps(recipe.folder, methods, seeds)
    steps = equal_steps(finished)
    if steps is not None:
        limits = {name: getattr(recipe.training, name) for name in LIMITS}
        with written_whole(recipe.folder / STEPS_FILE) as partial:
            partial.write_text(json.dumps({"steps": steps, "limits": limits}), encoding="utf-8")
    return finished


def _step_notes(recipe: Recipe, finished: Mapping[str, int | None]) -> list[str]:
    """How many steps all students took where a time limit decided on them, and of which students it is not known.

    Args:
        finished: From `_finished_steps`.
    """
    minutes, plan = recipe.training.max_minutes, recipe.folder / STEPS_FILE
    if minutes is None:
        return []
    notes = []
    if plan.is_file():
        notes.append(
            f"training.max_minutes = {minutes:g}: every student takes {steps_of_plan(plan)} steps, as many as the "
            "first one has time for."
        )
    unknown = [name for name, steps in finished.items() if steps is None]
    if unknown:
        notes.append(
            f"training.max_minutes: an earlier version trained {', '.join(unknown)}. It timed each student for itself "
            "and did not write down its steps: they may differ. To train them again, delete their folders."
        )
    return notes


def _has_section(recipe: Recipe, key: str) -> bool:
    """Whether a method's recipe has the section of a key; setting the key would otherwise create the section."""
    section: Any = recipe.model_dump(mode="json")
    for step in key.split(".")[:-1]:
        section = section.get(step, {}) if isinstance(section, dict) else {}
        if section is None:
            return False
    return True


def _search_notes(best: Mapping[str, Recipe], grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """The values that the search chose, in words."""
    notes = []
    for key in grid:
        for method, recipe in best.items():
            if not _has_section(recipe, key):
                continue
            value: Any = recipe.model_dump(mode="json")
            for step in key.split("."):
                value = value[step]
            notes.append(f"{method}: {key} = {value}, chosen of {list(grid[key])} by the validation rows.")
    return notes
