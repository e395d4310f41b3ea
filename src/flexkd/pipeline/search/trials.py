"""One trial of a search: a student that learns under some values, judged by the validation rows alone."""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flexkd.errors import TrainingError
from flexkd.facts.names import VALIDATION_PREFIX
from flexkd.files import written_whole
from flexkd.pipeline.cells import best_value, check_stored, evaluations, student_engine, train_student
from flexkd.pipeline.job import Job
from flexkd.preflight.comparison import cell_recipe
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.search import value_at
from flexkd.run_files import CELL_FILE, CHECKPOINTS_FOLDER, PREDICTIONS_FILE, SELECTION_FILE, TRIAL_FILE
from flexkd.strict_json import damage_named, read_object
from flexkd.tuning_record import COMPLETE, FAILED, PRUNED, Trial

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)


class _StoppedError(Exception):
    """Ends the training of a trial that has fallen behind."""


class _Judge(TrainerCallback):
    """Shows the evaluations of a trial to Optuna, and ends the trial when it is told to."""

    def __init__(self, metric: str, trial: "optuna.trial.Trial | None"):
        self.metric = metric
        self.trial = trial
        self.reported: set[int] = set()
        self.state = TrainerState()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Resumed from the checkpoint of an evaluation, the trial is judged by it once more: it may have ended there.
        self._look(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._look(state)

    def _look(self, state: TrainerState) -> None:
        self.state = state
        if self.trial is None or state.global_step >= state.max_steps:
            return
        for step, value in evaluations(state.log_history, self.metric).items():
            if step not in self.reported:
                self.reported.add(step)
                self.trial.report(value, step)
                if self.trial.should_prune():
                    raise _StoppedError


def run_trial(
    job: Job,
    variant: Recipe,
    seed: int,
    folder: Path,
    number: int,
    values: Mapping[str, Any],
    running: Callable[[], "optuna.trial.Trial"] | None,
) -> Trial:
    """Train a student under some values, or read the trial that the folder holds; no test row is read.

    Args:
        variant: The recipe of the method.
        running: Makes the trial of Optuna that decides when to stop; None: it runs to its end.

    Raises:
        ArtifactError: The folder's trial was made by another recipe, teacher or engine.
    """
    recipe, settings = cell_recipe(with_values(variant, values), seed, folder)
    made_of = {"recipe": settings, **job.fingerprints}
    stored = _stored_file(folder)
    if stored is not None:
        content = check_stored(stored, made_of, student_engine(job))
        with damage_named(stored):
            return _read(content, number, values, job.task.validation_metrics().metric)
    metric = job.task.validation_metrics().metric
    judge, began = _Judge(metric, running() if running else None), time.perf_counter()
    state, message, log = COMPLETE, "", list[dict[str, Any]]()
    try:
        _, log = train_student(job, recipe, folder, callbacks=[judge])
    except _StoppedError:
        state = PRUNED
    except TrainingError as error:
        state, message = FAILED, str(error)
    log = log or list(judge.state.log_history)
    content = {
        "made_of": made_of,
        "engine": student_engine(job),
        "state": state,
        "value": best_value(log, metric),
        "values_by_step": {
            str(step): value if math.isfinite(value) else None for step, value in evaluations(log, metric).items()
        },
        "steps": max([judge.state.global_step, *(int(entry["step"]) for entry in log)]),
        "seconds": round(time.perf_counter() - began, 1),
        "message": message,
    }
    with written_whole(folder / TRIAL_FILE) as partial:
        partial.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    if state != COMPLETE:
        drop_checkpoints(folder)
    return _read(content, number, values, metric)


def with_values(variant: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe of a method with the values of a trial."""
    return override_recipe(variant, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def stored_values(folder: Path, keys: Mapping[str, Any]) -> dict[str, Any] | None:
    """The values of the finished trial in a folder, read from the recipe that made it; None where there is none."""
    file = _stored_file(folder)
    if file is None:
        return None
    with damage_named(file):
        settings = read_object(file, "made_of")["made_of"]["recipe"]
        return {key: value_at(settings, key) for key in keys}


def hand_over(trial: Path, cell: Path) -> None:
    """Make the trained student of a trial that of a cell, so that it is not trained a second time.

    Its checkpoints move there; the file of a trial that an earlier version finished is a finished cell.
    """
    if (cell / CELL_FILE).is_file():
        return
    if (trial / CELL_FILE).is_file():
        for name in (PREDICTIONS_FILE, CELL_FILE):
            if (trial / name).is_file():
                with written_whole(cell / name) as partial:
                    shutil.copyfile(trial / name, partial)
    elif (trial / CHECKPOINTS_FOLDER).is_dir() and not (cell / CHECKPOINTS_FOLDER).exists():
        with written_whole(cell / SELECTION_FILE) as partial:
            shutil.copyfile(trial / SELECTION_FILE, partial)
        (trial / CHECKPOINTS_FOLDER).rename(cell / CHECKPOINTS_FOLDER)


def drop_checkpoints(folder: Path) -> None:
    """Free the space of a student that will not be used."""
    shutil.rmtree(folder / CHECKPOINTS_FOLDER, ignore_errors=True)


def _stored_file(folder: Path) -> Path | None:
    """The file of a finished trial; earlier versions wrote a cell, with the metrics of the test rows as well."""
    files = (folder / TRIAL_FILE, folder / CELL_FILE)
    return next((file for file in files if file.is_file()), None)


def _read(content: Mapping[str, Any], number: int, values: Mapping[str, Any], metric: str) -> Trial:
    is_cell = "metrics" in content
    return Trial(
        number,
        dict(values),
        state=content.get("state", COMPLETE),
        value=content["metrics"][f"{VALIDATION_PREFIX}{metric}"] if is_cell else content["value"],
        steps=content.get("steps") or 0,
        seconds=content["seconds"],
        values_by_step=content.get("values_by_step", {}),
        message=content.get("message", ""),
    )
