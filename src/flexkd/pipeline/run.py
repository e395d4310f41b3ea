"""One student from the teacher's unit scores to trained weights: select, start, pair, train."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from flexkd.allocator import release
from flexkd.core.objective import Objective
from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.tokenizers import truncating_right
from flexkd.files import writing
from flexkd.models.forward.autocast import DTYPES, scoring_dtype
from flexkd.models.forward.engine import engine_of
from flexkd.models.forward.hidden import HEAD_INPUT
from flexkd.models.loading.adapters import unwrapped
from flexkd.models.loading.saving import round_weights, save_model
from flexkd.pipeline.caching import cached_teacher, live_teacher
from flexkd.pipeline.job import Job
from flexkd.pipeline.pairing import build_objective, pair_layers
from flexkd.pipeline.scores import geometry_at, unit_scores
from flexkd.pipeline.start import Start, cut_scores, rotation_of, start_directions, start_student, start_units
from flexkd.processes import check_alike, decided, is_first, num_processes
from flexkd.recipe import Recipe
from flexkd.recipe.fingerprints import selection_settings, training_settings
from flexkd.recipe.model_sections import ScoresSection
from flexkd.recipe.taught_features import (
    describe_cut,
    describe_taught,
    read_score_keys,
    unit_attributions,
    unread_scores_reason,
)
from flexkd.recipe.training_sections import TrainingSection
from flexkd.run_files import CHECKPOINTS_FOLDER, SELECTION_FILE
from flexkd.scoring.selection_file import Selection, directions_hash, load_selection, save_selection
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest
from flexkd.training.arguments import RunSettings, training_arguments
from flexkd.training.early_stopping import EarlyStopping
from flexkd.training.fit import TrainingPlan, train
from flexkd.training.packing import packing_collator
from flexkd.training.time_limit import planned_steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One student of a job, from nothing to its trained weights.

    A teacher is wider than a task needs. `select` scores how much the task's answers depend on each unit of its hidden
    state. `start` makes a narrower student, by default cut out of the teacher along the units that score highest.
    `objective` pairs units of the student with those of the teacher and says what is minimised: labels, the teacher's
    logits, and the correlation of each pair. `train` minimises it.

        run = Run(prepare(recipe), recipe, recipe.folder)
        selection = run.select()
        start = run.start(selection)
        selection, objective = run.objective(start, selection)
        student, log = run.train(start, objective)

    Attributes:
        job: Rows, tokenizers and teacher, shared with the other runs of a comparison; its memo holds what was computed
            of the teacher for any of them.
        recipe: How this student starts and learns.
        folder: Scores and checkpoints of this run; a second run in it continues from them.
        steps_folder: Keeps how many steps fit into `training.max_minutes`, for all runs that share it; None: beside the
            checkpoints.
    """

    job: Job
    recipe: Recipe
    folder: Path
    steps_folder: Path | None = None

    def __post_init__(self) -> None:
        # Whoever makes a run, its start reads the rows that its recipe draws.
        object.__setattr__(self, "job", self.job.for_start(self.recipe))

    def select(self) -> Selection:
        """Scores of the teacher's units, and the units along which a sliced student is cut.

        Read from the folder if it has them. Scores that nothing in the recipe reads are not computed.

        Raises:
            ArtifactError: The folder's scores belong to something else.
        """
        path = self.folder / SELECTION_FILE
        if decided(path.is_file):
            selection = load_selection(path, self.made_of)
            if selection.geometry is not None:
                geometry_at(self.job, self.recipe, HEAD_INPUT, stored=selection.geometry)
            return selection
        job, recipe = self.job, self.recipe
        rotated = rotation_of(job, recipe, is_scored=True) is not None
        _tell_unread_keys(recipe, rotated=rotated)
        attributions = unit_attributions(recipe, rotated=rotated)
        scores = tuple(entry for attribution in attributions for entry in unit_scores(job, recipe, attribution))
        units = start_units(job, recipe, scores)
        cut_layer = None if units is None else cut_scores(job, scores).layer
        ranking, directions = start_directions(job, recipe)
        is_mixed = ranking is not None and ranking.chosen_by == "mixed"
        selection = Selection(
            scores,
            units,
            cut_layer=cut_layer,
            direction_scores=ranking,
            start_directions=directions,
            geometry=geometry_at(job, recipe, HEAD_INPUT).float() if is_mixed else None,
        )
        return self._saved(selection)

    def score(self) -> Selection:
        """As `select`, but scores are computed even where nothing in the recipe reads them."""
        selection = self.select()
        if selection.scores:
            return selection
        scores = unit_scores(self.job, self.recipe, self.recipe.scores.attribution)
        return self._saved(replace(selection, scores=scores))

    def start(self, selection: Selection) -> Start:
        """The untrained student: sliced, loaded, or made from a config."""
        start = start_student(self.job, self.recipe, selection.start_units, selection.start_directions)
        rotated = start.stream is not None
        cut, taught = (describe(self.recipe, rotated=rotated) for describe in (describe_cut, describe_taught))
        logger.info("student: %s; taught: %s", cut, taught)
        return start

    def objective(self, start: Start, selection: Selection) -> tuple[Selection, Objective]:
        """Pairs of units, stored beside the scores, and the objective that teaches them."""
        if selection.layers is None:
            layers = pair_layers(self.job, self.recipe, start, selection)
            directions = _cut_directions(start)
            selection = self._saved(replace(selection, layers=layers, cut_directions=directions))
        if num_processes() > 1:
            check_alike("the student", selection.hash(), advice="Run all processes on machines of one kind.")
        return selection, build_objective(self.job, self.recipe, start, selection)

    def train(
        self, start: Start, objective: Objective, *, callbacks: Sequence[TrainerCallback] = ()
    ) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
        """The trained student, and the log of its training; an interrupted one continues from its last checkpoint."""
        return _train_student(self, start, objective, callbacks)

    @property
    def early_stopping(self) -> EarlyStopping | None:
        """When its training ends before the last step; None: never."""
        section = self.recipe.training.early_stopping
        if section is None:
            return None
        metric = section.metric or self.job.task.validation_metrics().metric
        return EarlyStopping(section.patience, metric, section.min_delta)

    @property
    def made_of(self) -> dict[str, str]:
        """Fingerprints of everything that scores and pairs depend on; stored with them."""
        engine = engine_of(self.job.teacher, scoring_dtype(self.job.teacher_precision))
        return {**self.job.fingerprints, **engine, **selection_settings(self.recipe)}

    def _saved(self, selection: Selection) -> Selection:
        save_selection(self.folder / SELECTION_FILE, selection, self.made_of, self.job.inputs)
        return selection


def _cut_directions(start: Start) -> str:
    """Hash of the directions along which a student was cut; empty if it was not."""
    return "" if start.stream is None else directions_hash(start.stream.basis[:, start.directions])


def _tell_unread_keys(recipe: Recipe, *, rotated: bool) -> None:
    """Log which keys of `scores` nothing in this recipe reads: a warning where one of them was set."""
    read, defaults = read_score_keys(recipe, rotated=rotated), ScoresSection()
    unread = [name for name in ScoresSection.model_fields if name not in read]
    changed = [name for name in unread if getattr(recipe.scores, name) != getattr(defaults, name)]
    names = "them" if not read else ", ".join(changed)
    if changed or not read:
        logger.log(
            logging.WARNING if changed else logging.INFO,
            "scores: nothing of this recipe reads %s: %s",
            names,
            unread_scores_reason(recipe, rotated=rotated),
        )


def _train_student(
    run: Run, start: Start, objective: Objective, callbacks: Sequence[TrainerCallback]
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """The trained student, with its low-rank updates merged if it has any, and the log of its training."""
    job, recipe, section, checkpoints = run.job, run.recipe, run.recipe.training, run.folder / CHECKPOINTS_FOLDER
    validation_metrics = job.task.validation_metrics()
    settings, learner = run_settings(job, section, validation_metrics.metric), start.learner()
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
    # A cache pays where rows are read more than once. With a limit in minutes, the number of passes is known only after
    # `planned_steps` has timed some steps, so that such a run decides on its cache again afterwards.
    if objective.needs_teacher:
        live = live_teacher(job)
        passes = None if settings.max_minutes else settings.passes(num_rows)
        cached = cached_teacher(job, live, request, passes=passes)
    settings = planned_steps(training_plan, cached or live, settings, run.steps_folder or checkpoints)
    arguments = training_arguments(checkpoints, settings, num_rows=num_rows, num_processes=num_processes())
    if live is not None and cached is None:
        cached = cached_teacher(job, live, request, passes=settings.passes(num_rows))
    if cached is not None:
        # The student reads the teacher from disk, and has the device to itself.
        nn.Module.to(job.teacher, "cpu")
    made_of = _checkpoint_fingerprints(job, recipe, live, cached)
    try:
        trainer = train(
            training_plan, cached or live, arguments, fingerprints=made_of, resume=section.resume,
            early_stopping=run.early_stopping, callbacks=callbacks,
        )  # fmt: skip
    finally:
        # The next student of the job is cut from the teacher on the CPU, and both models are measured from there.
        nn.Module.to(job.teacher, "cpu")
    log = list(trainer.state.log_history)
    del trainer
    release()
    student = start.finished(learner)
    # Evaluated with exactly the weights that will be saved.
    round_weights(student, saved_dtype(recipe))
    return student, log


def run_settings(job: Job, section: TrainingSection, metric: str) -> RunSettings:
    """How the student trains; `metric` chooses its best checkpoint."""
    options = section.model_dump(include=set(RunSettings.__dataclass_fields__) - {"precision"})
    return RunSettings(precision=job.precision, metric=metric, **options)


def _checkpoint_fingerprints(
    job: Job, recipe: Recipe, live: LiveTeacher | None, cached: CachedTeacher | None
) -> dict[str, str]:
    """What the training depends on: a checkpoint is continued only under the same fingerprints."""
    answers, engine = "none", {}
    if cached is not None:
        answers = recipe.teacher.cache_storage
    elif live is not None:
        answers, engine = "live", engine_of(live.model, live.precision)
    return {
        **job.fingerprints,
        **training_settings(recipe),
        "teacher.answers": answers,
        **engine,
        "student_precision": job.precision,
    }


def saved_dtype(recipe: Recipe) -> torch.dtype:
    """The number type that the student's weights are saved in."""
    return DTYPES[recipe.student.save_dtype]


def save_student(folder: Path, student: PreTrainedModel, job: Job) -> None:
    """Write a student with its tokenizer and what it needs to answer new rows."""
    if not is_first():
        return
    save_model(student, folder, dtype=saved_dtype(job.recipe))
    # Its rows lost their ends, whatever the tokenizer of the teacher does by default.
    with truncating_right(job.tokenizer), writing(folder):
        job.tokenizer.save_pretrained(folder)
    job.task.serving().write(folder)


def _packing_collator(job: Job, learner: nn.Module) -> Collator:
    """A collator that packs rows, after proof that teacher and student keep them apart."""
    models = {"teacher": job.teacher, "student": unwrapped(learner)}
    return packing_collator(job.encoded.collator, models, job.splits["train"])
