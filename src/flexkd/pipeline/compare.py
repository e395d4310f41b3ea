"""Methods x seeds under one recipe: one teacher, the same rows, order, start and steps, compared in pairs."""

import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flexkd.compare_record import CompareCell, CompareRecord
from flexkd.display.progress import Countdown
from flexkd.evaluate.contrasts import paired_differences, with_contrasts
from flexkd.evaluate.row_contrasts import RowValues, read_row_values, row_metric, with_row_contrasts
from flexkd.facts.families.table import family_can_rotate
from flexkd.files import written_whole
from flexkd.guards.work import in_run_folder
from flexkd.pipeline.cells import is_finished, run_cell, shared_steps, step_notes, tell_cell
from flexkd.pipeline.comparison import Comparison, compared_variants, prepare_comparison
from flexkd.pipeline.job import Job
from flexkd.pipeline.recording import describe_baselines, environment
from flexkd.pipeline.search.trials import hand_over, with_values
from flexkd.pipeline.search.tuning import candidates, read_tuning, search_spaces, search_values, trial_folder
from flexkd.pipeline.sharing import share_answers
from flexkd.preflight.comparison import cell_folder, cell_recipe
from flexkd.preflight.contrasts import are_late, changed_seeds, first_contrasts, first_seeds, limits
from flexkd.preflight.starts import alike_starts
from flexkd.processes import alone, decided, follow
from flexkd.recipe import Recipe
from flexkd.recipe.methods import compared_contrasts, definition_notes, reference_method
from flexkd.recipe.search import with_search
from flexkd.run_files import CELLS_FOLDER, COMPARISON_FILE, CONTRASTS_FILE, PREDICTIONS_FILE, SEEDS_FILE
from flexkd.tuning_record import TuningRecord

logger = logging.getLogger(__name__)


@in_run_folder
def compare(
    recipe: Recipe,
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    search: Mapping[str, Any] | None = None,
    tuned: bool = False,
) -> CompareRecord:
    """Run every method with every seed, and compare each with plain fine-tuning, or else with the first method.

    Other contrasts can be named in `compare.contrasts`, before anything is trained; the exact test is corrected for
    their number. Contrasts that are named after the first student is finished are marked in the record, and so are
    seeds that are added or left out after it.

    A search tries the same values for every method with the first seed and chooses by the validation rows, as `tune`
    does; it is part of the budget, which is the same for all methods but for keys of a section that a method does not
    have. Each finished cell is kept, so that an interrupted comparison continues with the missing ones. Where a time
    limit decides on the steps, all students take those that the first one plans.

    Arguments and errors are those of the public `flexkd.compare`, which draws the page of the record as well.
    """
    recipe = with_search(recipe, search)
    variants, seeds = compared_variants(recipe, methods, seeds)
    methods = list(variants)
    if tuned:
        read_tuning(recipe, variants, {})
    folder, contrasts = recipe.folder, _contrasts(recipe, methods, seeds)
    comparison = prepare_comparison(recipe, variants, seeds, students=len(seeds))
    job, recipe = comparison.job, comparison.job.recipe
    finished = shared_steps(recipe, [cell_folder(folder, method, seed) for seed in seeds for method in methods])
    notes = definition_notes(recipe, methods)
    notes += _start_notes(comparison)
    _write_plan(folder, contrasts, seeds)
    teacher, baselines = job.predict_teacher(), job.task.baselines()
    job.task.write(folder / CELLS_FOLDER / PREDICTIONS_FILE, {"teacher": teacher, **baselines})
    tuning = _tuning(comparison, tuned=tuned)
    cells = _cells(comparison, tuning, teacher)
    reference = reference_method(methods)
    late_seeds, left_out_seeds = changed_seeds(folder, seeds)
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
        notes=[*job.notes, *notes, *step_notes(recipe, finished), *tuning.notes],
        baselines={model.name: model.metrics for model in describe_baselines(job, baselines, teacher)},
        late_seeds=late_seeds,
        left_out_seeds=left_out_seeds,
    )
    record = with_contrasts(record, contrasts, named_after_results=are_late(folder, contrasts))
    follow()
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


def _write_plan(folder: Path, contrasts: Sequence[tuple[str, str]], seeds: Sequence[int]) -> None:
    """Write down contrasts and seeds of a comparison; once a student is finished, those that were named before stay."""
    plans = {CONTRASTS_FILE: first_contrasts(folder, contrasts), SEEDS_FILE: first_seeds(folder, seeds)}
    for name, plan in plans.items():
        with written_whole(folder / name) as partial:
            partial.write_text(json.dumps(plan), encoding="utf-8")


def _tuning(comparison: Comparison, *, tuned: bool) -> TuningRecord:
    """The values of each method: those of an earlier search, or of one that is made now; without methods if of none.

    Before any student trains, the teacher runs once for all that may be trained.
    """
    job, variants = comparison.job, comparison.variants
    tuning = TuningRecord(metric=job.task.validation_metrics().metric, seed=comparison.seeds[0], methods=[])
    possible = {method: [variant] for method, variant in variants.items()}
    has_search = not tuned and job.recipe.compare is not None and bool(job.recipe.compare.search)
    spaces = search_spaces(job.recipe, variants) if has_search else {}
    if tuned:
        tuning = read_tuning(job.recipe, variants, job.fingerprints)
        possible = {entry.method: [with_values(variants[entry.method], entry.chosen)] for entry in tuning.methods}
    elif has_search:
        possible = {method: candidates(variant, spaces[method]) for method, variant in variants.items()}
    share_answers(job, _unfinished(possible, comparison.seeds, job.recipe.folder))
    return search_values(comparison, spaces) if has_search else tuning


def _cells(comparison: Comparison, tuning: TuningRecord, teacher: Any) -> list[CompareCell]:
    """All cells, each with the values that a search chose for its method."""
    job, variants = comparison.job, comparison.variants
    best = {entry.method: with_values(variants[entry.method], entry.chosen) for entry in tuning.methods}
    recipes = {**variants, **best}
    seconds = _hand_over(job, tuning, comparison.seeds)
    places = [(method, seed) for seed in comparison.seeds for method in variants]
    countdown, cells = Countdown("cell", [method for method, _ in places]), []
    for method, seed in places:
        folder = cell_folder(job.recipe.folder, method, seed)
        with countdown.next(f"{method}, seed {seed}", is_finished=is_finished(folder)):
            earlier = seconds.get((method, seed), 0.0)
            cell = run_cell(job, teacher, recipes[method], method, seed, folder, earlier=earlier)
        countdown.finished(cell.seconds)
        tell_cell(cell, f"{method}, seed {seed}", job.recipe.task.metric)
        cells.append(cell)
    return cells


def _hand_over(job: Job, tuning: TuningRecord, seeds: Sequence[int]) -> dict[tuple[str, int], float]:
    """Make the best students of a search cells of the comparison; returns for how many seconds each was trained.

    Args:
        seeds: Of the comparison; a search with another seed has trained none of its students.
    """
    seconds: dict[tuple[str, int], float] = {}
    for entry in tuning.methods if tuning.seed in seeds else ():
        if entry.best is not None:
            trial = trial_folder(job.recipe.folder, entry.method, entry.best)
            alone(partial(hand_over, trial, cell_folder(job.recipe.folder, entry.method, tuning.seed)))
            seconds[entry.method, tuning.seed] = float(entry.trials[entry.best].seconds)
    return seconds


def _unfinished(possible: Mapping[str, Sequence[Recipe]], seeds: Sequence[int], folder: Path) -> list[Recipe]:
    """Recipes of all cells that may still be trained: any recipe of a method may turn out the best."""
    return [
        cell_recipe(recipe, seed, cell_folder(folder, method, seed))[0]
        for method, recipes in possible.items()
        for seed in seeds
        if not decided(partial(is_finished, cell_folder(folder, method, seed)))
        for recipe in recipes
    ]


def _start_notes(comparison: Comparison) -> list[str]:
    """What a seed is, where the starts of its students read the rows that those of other seeds read; logs it."""
    job, variants = comparison.job, comparison.variants
    sections = [variant.compare for variant in variants.values() if variant.student.start == "slice"]
    if any(section is not None and section.starts == "shared" for section in sections):
        return [
            "compare.starts: shared: all seeds have the same calibration rows and rows of the scores, so that the "
            "spread over seeds is that of the order of the rows and of dropout alone."
        ]
    can_rotate = family_can_rotate(job.teacher.config.model_type)
    notes = list(alike_starts(job.recipe, variants, len(job.splits["train"]), can_rotate=can_rotate))
    for note in notes:
        logger.warning(note)
    return notes
