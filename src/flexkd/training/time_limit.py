"""How many optimizer steps fit into some minutes, by the pace of the first ten."""

import json
import logging
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from flexkd.allocator import release
from flexkd.files import writing, written_whole
from flexkd.processes import decided, num_processes
from flexkd.run_files import STEPS_FILE
from flexkd.strict_json import damage_named, read_object
from flexkd.teacher.signal import Teacher
from flexkd.training.arguments import RunSettings, training_arguments
from flexkd.training.fit import TrainingPlan, restored_forward

logger = logging.getLogger(__name__)

TIMED_STEPS: Final = 10
"""Steps whose pace decides; the first two of them warm up and do not count."""

_WARM_UP: Final = 2
LIMITS: Final = ("max_minutes", "epochs", "max_steps", "batch_size")
"""Settings that decide how many steps a run may take at most."""


def planned_steps(
    training_plan: TrainingPlan, teacher: Teacher | None, settings: RunSettings, folder: Path
) -> RunSettings:
    """The settings with `max_steps` set to the steps that fit into `max_minutes`; unchanged without such a limit.

    Ten steps on the training rows are timed and undone. The number of steps is stored, so that an interrupted run
    continues with the same number, as do runs with the same limits that share the folder. Evaluations are not counted.

    Args:
        training_plan: Its model and objective have the same weights afterwards.
        teacher: The slowest form in which it is used in the run: live if there is no cache yet.
        folder: Keeps the number, in `STEPS_FILE`.
    """
    if settings.max_minutes is None:
        return settings
    plan, limits = folder / STEPS_FILE, {name: getattr(settings, name) for name in LIMITS}
    stored = decided(lambda: _stored_steps(plan, limits))
    if stored is not None:
        return replace(settings, max_steps=stored)
    pace = _seconds_a_step(training_plan, teacher, settings)
    seconds = decided(lambda: pace)
    all_steps, rows = settings.steps(len(training_plan.rows)), len(training_plan.rows)
    steps = max(1, min(all_steps, math.floor(settings.max_minutes * 60 / seconds)))
    logger.info(
        "%s: %.2f s a step of %d rows: %d of %d steps (%.2g epochs) in %.1f of %g minutes, evaluations not counted",
        training_plan.description, seconds, settings.batch_size, steps, all_steps, steps * settings.batch_size / rows,
        steps * seconds / 60, settings.max_minutes,
    )  # fmt: skip
    with written_whole(plan) as partial:
        partial.write_text(json.dumps({"steps": steps, "seconds_a_step": seconds, "limits": limits}), encoding="utf-8")
    return replace(settings, max_steps=steps)


def _stored_steps(plan: Path, limits: Mapping[str, Any]) -> int | None:
    """The steps of an earlier plan with these limits."""
    if not plan.is_file():
        return None
    stored = read_object(plan, "steps")
    # Earlier versions did not store the limits.
    with damage_named(plan):
        return int(stored["steps"]) if stored.get("limits", limits) == limits else None


class _StepTimes(TrainerCallback):
    """The time at which each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def _seconds_a_step(training_plan: TrainingPlan, teacher: Teacher | None, settings: RunSettings) -> float:
    # A feature term that fades is timed as in the first step, at its full cost.
    training_plan = replace(training_plan, objective=training_plan.objective.at(0, TIMED_STEPS))
    learning = (training_plan.model, training_plan.objective.modules)
    with tempfile.TemporaryDirectory(prefix="flexkd-pace-") as scratch:
        # On disk they take no memory from the trial, which needs as much as the run itself.
        before = Path(scratch, "before.pt")
        with writing(before):
            torch.save([module.state_dict() for module in learning], before)
        trial = replace(settings, max_steps=TIMED_STEPS, report_to=())
        num_rows = len(training_plan.rows)
        arguments = training_arguments(Path(scratch), trial, num_rows=num_rows, num_processes=num_processes())
        arguments.eval_strategy = arguments.save_strategy = arguments.logging_strategy = "no"
        arguments.load_best_model_at_end = False
        set_seed(settings.seed)
        times = _StepTimes()
        with restored_forward(training_plan.model):
            training_plan.trainer(teacher, arguments, callbacks=[times]).train()
        # The trial's optimizer must not lie beside that of the run.
        release()
        # The trial is undone in the weights alone: optimizer and random state are made anew by the run itself.
        for module, state in zip(learning, torch.load(before, mmap=True, weights_only=True), strict=True):
            module.load_state_dict(state)
    training_plan.model.eval()
    return (times.ends[-1] - times.ends[_WARM_UP - 1]) / (len(times.ends) - _WARM_UP)
