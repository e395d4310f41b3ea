"""A student's training as its recipe says it, with a teacher that runs or whose answers are on disk."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.data.encoding.collation import Collator
from flexkd.models.forward.autocast import DTYPES
from flexkd.models.forward.engine import engine_of
from flexkd.models.loading.adapters import unwrapped
from flexkd.models.loading.saving import round_weights
from flexkd.pipeline.caching import cached_teacher, live_teacher
from flexkd.pipeline.job import Job
from flexkd.pipeline.start import Start
from flexkd.recipe import Recipe
from flexkd.recipe.fingerprints import training_settings
from flexkd.teacher.signal import SignalRequest
from flexkd.training.arguments import RunSettings, training_arguments
from flexkd.training.fit import TrainingPlan, train
from flexkd.training.packing import packing_collator
from flexkd.training.time_limit import planned_steps


def train_student(
    job: Job, recipe: Recipe, start: Start, objective: Objective, checkpoints: Path
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """The trained student, low-rank updates merged into it where it learnt by those, and the log of the training."""
    section = recipe.training
    validation_metrics = job.task.validation_metrics()
    options = section.model_dump(exclude={"precision", "resume", "logit_chunk", "compile", "packing"})
    settings = RunSettings(precision=job.precision, metric=validation_metrics.metric, **options)
    learner = start.learner()
    training_plan = TrainingPlan(
        learner,
        objective,
        job.splits["train"],
        job.splits["validation"],
        _packing_collator(job, learner) if section.packing else job.encoded.collator,
        validation_metrics,
        "student",
        logit_chunk=section.logit_chunk,
        compile_blocks=section.compile,
    )
    live, cached, num_rows = None, None, len(training_plan.rows)
    request = SignalRequest.of(objective)
    if objective.needs_teacher:
        live = live_teacher(job)
        # Minutes are only passes over the rows when the pace is known.
        passes = None if settings.max_minutes else settings.passes(num_rows)
        cached = cached_teacher(job, live, request, passes=passes)
    settings = planned_steps(training_plan, cached or live, settings, checkpoints)
    arguments = training_arguments(checkpoints, settings, num_rows=num_rows)
    if live is not None and cached is None:
        cached = cached_teacher(job, live, request, passes=settings.passes(num_rows))
    if cached is not None:
        nn.Module.to(job.teacher, "cpu")
    made_of = {
        **job.fingerprints,
        **training_settings(recipe),
        "teacher.answers": "none" if live is None else "live" if cached is None else recipe.teacher.cache_storage,
        **({} if live is None or cached is not None else engine_of(live.model, live.precision)),
        "student_precision": job.precision,
    }
    trainer = train(training_plan, cached or live, arguments, fingerprints=made_of, resume=section.resume)
    # Students start on the CPU, and so does all that is measured of both models.
    nn.Module.to(job.teacher, "cpu")
    student = start.finished(learner)
    # It is evaluated with the weights that it is saved with.
    round_weights(student, saved_dtype(recipe))
    return student, list(trainer.state.log_history)


def saved_dtype(recipe: Recipe) -> torch.dtype:
    """The number type that the student's weights are saved in."""
    return DTYPES[recipe.student.save_dtype]


def _packing_collator(job: Job, learner: nn.Module) -> Collator:
    """A collator that packs rows, after proof that teacher and student keep them apart."""
    models = {"teacher": job.teacher, "student": unwrapped(learner)}
    return packing_collator(job.encoded.collator, models, job.splits["train"])
