"""Methods x seeds under one recipe: one teacher, the same rows, order, start and steps, compared in pairs."""

import datetime
import json
import logging
import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

from scipy import stats

from flexkd.facts.families.table import family_turns
from flexkd.facts.metrics import LOWER_IS_BETTER
from flexkd.files import written_whole
from flexkd.fingerprints import check_fingerprints
from flexkd.models.forward.autocast import autocast_dtype
from flexkd.models.forward.engine import engine_of
from flexkd.models.loading.pretrained import load_config
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.recording import describe_baselines, environment
from flexkd.pipeline.run import Run
from flexkd.pipeline.sharing import share_answers
from flexkd.pipeline.start import rotation_of
from flexkd.preflight.comparison import cell_folder, cell_recipe, check_cell
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.methods import check_comparison, compared_methods, compared_seeds, method_recipe
from flexkd.recipe.taught_features import may_rotate
from flexkd.record import CompareCell, CompareRecord, PairedDifference
from flexkd.run_files import CELL_FILE

logger = logging.getLogger(__name__)

CONFIDENCE: Final = 0.95


def compare(
    recipe: Recipe,
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    search: Mapping[str, Sequence[Any]] | None = None,
) -> CompareRecord:
    """Run every method with every seed, keep each finished cell, and compare with plain fine-tuning, or the first.

    A search tries the same values for every method with the first seed, chooses by the validation rows, and counts as
    budget: all methods have the same, but for keys of a section that a method does without. An interrupted comparison
    goes on with the cells that are missing.

    Args:
        recipe: Describes `flexkd`; `recipe.methods.METHODS` says what the others change.
        methods: Names of these; empty: the recipe's, or the default ones.
        seeds: Of students; empty: the recipe's, or `DEFAULT_SEEDS`.
        search: Recipe key to the values that every method tries; None: the recipe's.

    Raises:
        RecipeError: As `check_comparison`.
        FlexKDError: As `pipeline.distill`.
    """
    section = recipe.compare
    config = load_config(recipe.teacher.model, where="teacher.model")
    turns, width = family_turns(config.model_type), getattr(config, "hidden_size", None)
    methods, seeds = compared_methods(recipe, methods, turns=turns), compared_seeds(recipe, seeds)
    grid: Mapping[str, Sequence[Any]] = search if search is not None else (section.search if section else {})
    check_comparison(recipe, methods, seeds, turns=turns, width=width)
    variants = {method: method_recipe(recipe, method) for method in methods}
    folder = recipe.folder
    job = prepare(recipe, students=len(methods) * len(seeds), resumes="comparison")
    # What the teacher's family promises, its forward has to keep: else a method would teach something else.
    rotations = [rotation_of(job, variant) for variant in variants.values() if may_rotate(variant)]
    check_comparison(recipe, methods, seeds, turns=turns and None not in rotations, width=width)
    teacher = job.predict(job.teacher)
    baselines = job.task.baselines()
    candidates = {method: _candidates(variant, grid) for method, variant in variants.items()}
    share_answers(job, _to_train(candidates, seeds, folder))
    chosen = {method: _search(job, teacher, some, folder, method, seeds[0]) for method, some in candidates.items()}
    cells = []
    for seed in seeds:
        for method in methods:
            cells.append(_cell(job, teacher, chosen[method], method, seed, cell_folder(folder, method, seed)))
            logger.info("%s seed %d: %s", method, seed, _shown(cells[-1].metrics, recipe.task.metric))
    reference = "fine_tuning" if "fine_tuning" in methods else methods[0]
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
        notes=[*job.notes, *_search_notes(chosen, grid)],
        baselines={model.name: model.metrics for model in describe_baselines(job, baselines, teacher)},
    )
    record.write(folder / "compare.json")
    return record


def paired_differences(
    cells: Sequence[CompareCell], methods: Sequence[str], seeds: Sequence[int], metric: str, reference: str
) -> list[PairedDifference]:
    """Mean and spread of each method, and its difference to the reference seed by seed with a paired t-test.

    `low` and `high` are the 95 % confidence interval of the mean difference.
    """
    values = {(cell.method, cell.seed): cell.metrics[metric] for cell in cells}
    found = []
    for method in methods:
        own = [values[method, seed] for seed in seeds]
        if any(value is None for value in own):
            found.append(PairedDifference(method, None, None, None, None, None, None))
            continue
        numbers = [float(value) for value in own if value is not None]
        mean, std = statistics.fmean(numbers), statistics.stdev(numbers)
        others = [values[reference, seed] for seed in seeds]
        if method == reference or any(value is None for value in others):
            found.append(PairedDifference(method, mean, std, None, None, None, None))
            continue
        base = [float(value) for value in others if value is not None]
        found.append(_paired(method, mean, std, numbers, base))
    return found


def _paired(method: str, mean: float, std: float, own: Sequence[float], base: Sequence[float]) -> PairedDifference:
    differences = [a - b for a, b in zip(own, base, strict=True)]
    difference = statistics.fmean(differences)
    if max(differences) - min(differences) <= 1e-12 * max(map(abs, [*own, *base])):
        # A t-test of equal differences is 0/0, or made of rounding; there is nothing to estimate.
        return PairedDifference(method, mean, std, difference, difference, difference, None)
    test = stats.ttest_rel(own, base)
    interval = test.confidence_interval(CONFIDENCE)
    return PairedDifference(
        method, mean, std, difference, float(interval.low), float(interval.high), float(test.pvalue)
    )


def _candidates(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> list[Recipe]:
    """The variants of a recipe over the same grid for every method."""
    grid = {key: values for key, values in grid.items() if _has_section(recipe, key)}
    return [
        override_recipe(recipe, [f"{key}={json.dumps(value)}" for key, value in zip(grid, values, strict=True)])
        for values in product(*grid.values())
    ]


def _to_train(candidates: Mapping[str, Sequence[Recipe]], seeds: Sequence[int], folder: Path) -> list[Recipe]:
    """Recipes of the cells that are not finished; any candidate of a method may be the one that is chosen."""
    return [
        override_recipe(recipe, [f"training.seed={seed}"])
        for method, some in candidates.items()
        for seed in seeds
        if not _finished(cell_folder(folder, method, seed)).is_file()
        for recipe in some
    ]


def _finished(folder: Path) -> Path:
    """What a cell leaves in its folder when it is done."""
    return folder / CELL_FILE


def _search(job: Job, teacher: Any, candidates: Sequence[Recipe], folder: Path, method: str, seed: int) -> Recipe:
    """The candidate that is best on the validation rows; what it did with this seed is not done again."""
    if len(candidates) == 1:
        return candidates[0]
    metric = job.task.validation_metrics().metric
    sign = -1 if metric in LOWER_IS_BETTER else 1
    tried = [folder / "search" / method / str(index) for index in range(len(candidates))]
    scored = []
    for index, candidate in enumerate(candidates):
        best = _cell(job, teacher, candidate, f"candidate {index}", seed, tried[index]).metrics[f"validation_{metric}"]
        scored.append(-math.inf if best is None else sign * float(best))
    winner = scored.index(max(scored))
    kept = _finished(cell_folder(folder, method, seed))
    if not kept.is_file():
        with written_whole(kept) as partial:
            shutil.copyfile(_finished(tried[winner]), partial)
    return candidates[winner]


def _has_section(recipe: Recipe, key: str) -> bool:
    """Whether a method uses what a key sets: to set one would open a section that the method does without."""
    section: Any = recipe.model_dump(mode="json")
    for step in key.split(".")[:-1]:
        section = section.get(step, {}) if isinstance(section, dict) else {}
        if section is None:
            return False
    return True


def _cell(job: Job, teacher: Any, recipe: Recipe, method: str, seed: int, folder: Path) -> CompareCell:
    """One student; read from its folder when it was finished before under the same recipe."""
    recipe, settings = cell_recipe(recipe, seed, folder)
    done = _finished(folder)
    made_of = {"recipe": settings, **job.fingerprints}
    if done.is_file():
        stored = json.loads(done.read_text(encoding="utf-8"))
        check_cell(done, stored["made_of"], made_of)
        told = check_fingerprints(done, stored.get("engine", {}), _engine(job), "Choose another output folder.")
        if told:
            logger.warning("%s: %s", done, "; ".join(told))
        return CompareCell(method, seed, stored["metrics"], stored["seconds"])
    began = time.perf_counter()
    run = Run(job, recipe, folder)
    selection = run.select()
    start = run.start(selection)
    _, objective = run.objective(start, selection)
    student, log = run.train(start, objective)
    metric = job.task.validation_metrics().metric
    results = job.predict(student)
    metrics = {**job.task.metrics(results, teacher), f"validation_{metric}": _best(log, metric)}
    cell = CompareCell(method, seed, dict(metrics), round(time.perf_counter() - began, 1))
    content = {"made_of": made_of, "engine": _engine(job), "metrics": cell.metrics, "seconds": cell.seconds}
    with written_whole(done) as partial:
        partial.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return cell


def _engine(job: Job) -> dict[str, str]:
    """How teacher and student compute: figures of another precision do not stand in the same table."""
    teacher = engine_of(job.teacher, autocast_dtype(job.teacher_precision))
    return {**teacher, "student_precision": job.precision}


def _best(log: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """The best value of a metric over the evaluations of a run; None where it was never defined."""
    values = [float(entry[f"eval_{metric}"]) for entry in log if f"eval_{metric}" in entry]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    return min(finite) if metric in LOWER_IS_BETTER else max(finite)


def _shown(metrics: Mapping[str, Any], metric: str) -> str:
    return f"{metric} {metrics[metric]}"


def _search_notes(chosen: Mapping[str, Recipe], grid: Mapping[str, Sequence[Any]]) -> list[str]:
    notes = []
    for key in grid:
        for method, recipe in chosen.items():
            if not _has_section(recipe, key):
                continue
            value: Any = recipe.model_dump(mode="json")
            for step in key.split("."):
                value = value[step]
            notes.append(f"{method}: {key} = {value}, chosen of {list(grid[key])} by the validation rows.")
    return notes
