"""One cell of a comparison: a student of one method and seed, trained once and read from its folder afterwards."""

import json
import logging
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from flexkd.compare_record import CompareCell
from flexkd.display.durations import duration_text
from flexkd.facts.metrics import LOWER_IS_BETTER, metric_label
from flexkd.facts.names import VALIDATION_PREFIX
from flexkd.files import written_whole
from flexkd.fingerprints import check_fingerprints
from flexkd.models.forward.autocast import autocast_dtype
from flexkd.models.forward.engine import engine_of
from flexkd.pipeline.job import Job
from flexkd.pipeline.recording import learning_curve
from flexkd.pipeline.run import Run, save_student
from flexkd.preflight.comparison import cell_recipe, check_cell, equal_steps, finished_steps
from flexkd.processes import alone, decided
from flexkd.recipe import Recipe
from flexkd.run_files import CELL_FILE, CHECKPOINTS_FOLDER, PREDICTIONS_FILE, STEPS_FILE, STUDENT_FOLDER
from flexkd.strict_json import damage_named, read_object
from flexkd.training.time_limit import LIMITS

logger = logging.getLogger(__name__)


def run_cell(
    job: Job,
    teacher_results: Any,
    recipe: Recipe,
    method: str,
    seed: int,
    folder: Path,
    *,
    earlier: float = 0.0,
    saves: bool = False,
) -> CompareCell:
    """One cell of a comparison: train and evaluate a student, or read the metrics that a finished one left.

    Args:
        earlier: Seconds for which a search has trained the student that lies in the folder.
        saves: Keep the student too; a finished one that was not kept is trained again.

    Raises:
        ArtifactError: The folder's cell was made by another recipe, teacher or engine.
    """
    recipe, settings = cell_recipe(recipe, seed, folder)
    file = cell_file(folder)
    made_of = {"recipe": settings, **job.fingerprints}
    if decided(file.is_file):
        stored = check_stored(file, made_of, student_engine(job))
        if decided(lambda: is_finished(folder, saves=saves)):
            # Earlier versions did not keep the evaluations.
            with damage_named(file):
                return CompareCell(
                    method, seed, dict(stored["metrics"]), float(stored["seconds"]), list(stored.get("evaluations", []))
                )
    began = time.perf_counter()
    student, log = train_student(job, recipe, folder)
    metric = job.task.validation_metrics().metric
    results = job.predict(student, followed=teacher_results)
    job.task.write(folder / PREDICTIONS_FILE, {"student": results})
    if saves:
        save_student(folder / STUDENT_FOLDER, student, job)
    validation = {f"{VALIDATION_PREFIX}{metric}": best_value(log, metric)}
    metrics = {**job.task.metrics(results, teacher_results), **validation}
    seconds = round(earlier + time.perf_counter() - began, 1)
    cell = CompareCell(method, seed, metrics, seconds, learning_curve(log))
    content = {
        "made_of": made_of,
        "engine": student_engine(job),
        "metrics": cell.metrics,
        "seconds": cell.seconds,
        "evaluations": cell.evaluations,
        "steps": max(int(entry["step"]) for entry in log),
    }
    with written_whole(file) as partial:
        partial.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    alone(lambda: shutil.rmtree(folder / CHECKPOINTS_FOLDER, ignore_errors=True))
    return cell


def train_student(
    job: Job, recipe: Recipe, folder: Path, *, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """A trained student and the log of its training; an interrupted one continues from what lies in its folder.

    All students of the job take the same steps where a time limit decides on them.
    """
    if recipe.training.max_minutes is not None:
        alone(lambda: _move_plan(folder / CHECKPOINTS_FOLDER, job.recipe.folder / STEPS_FILE))
    run = Run(job, recipe, folder, steps_folder=job.recipe.folder)
    selection = run.select()
    start = run.start(selection)
    _, objective = run.objective(start, selection)
    return run.train(start, objective, callbacks=callbacks)


def tell_cell(cell: CompareCell, name: str, metric: str) -> None:
    """Log what came of a cell."""
    value = cell.metrics[metric]
    result = "undefined" if value is None else f"{value:.4f}"
    logger.info("%s: %s %s, in %s", name, metric_label(metric), result, duration_text(cell.seconds))


def is_finished(folder: Path, *, saves: bool = False) -> bool:
    """Whether the cell of a folder was trained and evaluated, and its student kept where it `saves` it."""
    return cell_file(folder).is_file() and (not saves or (folder / STUDENT_FOLDER).is_dir())


def cell_file(folder: Path) -> Path:
    """The file that marks a finished cell and holds its metrics."""
    return folder / CELL_FILE


def check_stored(file: Path, made_of: Mapping[str, Any], engine: Mapping[str, str]) -> dict[str, Any]:
    """The content of the file of a finished student, after a check that it belongs to this comparison or search.

    Raises:
        ArtifactError: It was made by another recipe, teacher or engine.
    """
    stored = read_object(file, "made_of")
    with damage_named(file):
        check_cell(file, stored["made_of"], made_of)
        notes = check_fingerprints(file, stored.get("engine", {}), engine, "Choose another output folder.")
    if notes:
        logger.warning("%s: %s", file, "; ".join(notes))
    return stored


def student_engine(job: Job) -> dict[str, str]:
    """How teacher and student compute; students of another precision are refused, as their figures do not compare."""
    teacher = engine_of(job.teacher, autocast_dtype(job.teacher_precision))
    return {**teacher, "student_precision": job.precision}


def evaluations(log: Sequence[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """The validation metric at every evaluation of a training log, by step."""
    name = f"eval_{metric}"
    return {int(entry["step"]): float(entry[name]) for entry in log if name in entry}


def best_value(log: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """The best value of a metric over the evaluations of a run; None where it was never defined."""
    finite = [value for value in evaluations(log, metric).values() if math.isfinite(value)]
    if not finite:
        return None
    return min(finite) if metric in LOWER_IS_BETTER else max(finite)


def _move_plan(checkpoints: Path, plan: Path) -> None:
    """Make the steps that an earlier version planned for one student those of the comparison, if it has none yet.

    If it has others, the student is trained from its start: its checkpoint belongs to a longer or shorter schedule.
    """
    earlier = checkpoints / STEPS_FILE
    if not earlier.is_file():
        return
    if not plan.is_file():
        earlier.replace(plan)
        return
    steps, planned_steps = steps_of_plan(earlier), steps_of_plan(plan)
    if steps != planned_steps:
        logger.warning("%s: %d steps, not %d: trained from the start", checkpoints, steps, planned_steps)
        shutil.rmtree(checkpoints)


def steps_of_plan(plan: Path) -> int:
    """The optimizer steps that a plan of a time limit gives every student."""
    with damage_named(plan):
        return int(read_object(plan, "steps")["steps"])


def shared_steps(recipe: Recipe, folders: Iterable[Path]) -> dict[str, int | None]:
    """Steps of the finished students, which those still to be trained will take as well; empty without a time limit.

    Args:
        recipe: That of the job.
        folders: Those of all students.

    Raises:
        ArtifactError: As `equal_steps`.
    """
    if recipe.training.max_minutes is None:
        return {}
    finished = finished_steps(folders)
    steps = equal_steps(finished)
    if steps is not None:
        limits = {name: getattr(recipe.training, name) for name in LIMITS}
        with written_whole(recipe.folder / STEPS_FILE) as partial:
            partial.write_text(json.dumps({"steps": steps, "limits": limits}), encoding="utf-8")
    return finished


def step_notes(recipe: Recipe, finished: Mapping[str, int | None]) -> list[str]:
    """How many steps all students took where a time limit decided on them, and of which students it is not known.

    Args:
        finished: From `shared_steps`.
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
            "and did not write down its steps: they may differ. To train them again, each for the time of its cell, "
            "delete their folders."
        )
    return notes
