"""The whole job of a recipe: score the teacher's units, start a student, train it, measure both, write the record."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from flexkd.files import written_whole
from flexkd.guards.work import in_run_folder
from flexkd.models.forward.attention import prefer_short_rows_attention
from flexkd.models.loading.pretrained import load_tokenizer
from flexkd.models.loading.saving import make_savable
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.recording import (
    Outcome,
    Timed,
    describe_baselines,
    describe_model,
    model_costs,
    run_record,
    score_records,
)
from flexkd.pipeline.rivals import Rival, open_rivals, run_rivals
from flexkd.pipeline.run import Run, run_settings, save_student, saved_dtype
from flexkd.pipeline.stages import Stages
from flexkd.preflight.weights import check_model
from flexkd.processes import in_turn
from flexkd.recipe import Recipe
from flexkd.record import ModelRecord, RunRecord, ScoreRecord
from flexkd.run_files import PREDICTIONS_FILE, RECIPE_FILE, RECORD_FILE, STUDENT_FOLDER
from flexkd.training.arguments import RunSettings

logger = logging.getLogger(__name__)


@in_run_folder
def distill(recipe: Recipe) -> RunRecord:
    """Run a recipe; its folder then holds scores, the student, predictions of all models and the record.

    An interrupted run continues from its last checkpoint. `report` draws the page and the model card from the record.

    Raises:
        FlexKDError: Recipe, rows or models are wrong, or training failed.
    """
    stages = Stages()
    folder = recipe.folder
    with stages.stage("prepare teacher and rows"):
        job = prepare(recipe, resumes="run")
    recipe = job.recipe
    run = Run(job, recipe, folder)
    with in_turn():  # the first process may have to fetch them
        opened = open_rivals(job)
    with stages.stage("score units"):
        selection = run.select()
    with stages.stage("start student"):
        start = run.start(selection)
        selection, objective = run.objective(start, selection)
        job.memo.forget_starts()
    with stages.stage("evaluate before"):
        teacher = job.predict_teacher()
        before = job.predict(start.student, followed=teacher, is_untrained=True)
        results = {"teacher": teacher, "student_before": before}
    with stages.stage("train student"):
        student, log = run.train(start, objective)
    with stages.stage("evaluate after"):
        results["student"] = job.predict(student, followed=teacher)
        save_student(folder / STUDENT_FOLDER, student, job)
    rivals: list[Rival] = []
    if recipe.rivals is not None:
        with stages.stage("rivals"):
            rivals = list(run_rivals(run.job, opened, _settings_of(run, log), followed=teacher))
    baselines = job.task.baselines()
    others = {rival.name: rival.results for rival in rivals} | baselines
    job.task.write(folder / PREDICTIONS_FILE, results | others)
    with stages.stage("measure speed and memory"):
        described = [*_describe(job, student, results, rivals), *describe_baselines(job, baselines, results["teacher"])]
    results |= others
    rotated, notes = start.stream is not None, _notes_on_training(run, log)
    outcome = Outcome(described, results, selection, start.new_parameters, log, stages, rotated, notes)
    record = run_record(job, recipe, objective, outcome)
    _write_run(folder, recipe, record)
    return record


def _notes_on_training(run: Run, log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why the training ended before its last step, where it did."""
    rule = run.early_stopping
    note = None if rule is None else rule.note(log)
    return [] if note is None else [note]


def _settings_of(run: Run, log: Sequence[Mapping[str, Any]]) -> RunSettings:
    """How the student was trained, with the number of steps that it took."""
    settings = run_settings(run.job, run.recipe.training, run.job.task.validation_metrics().metric)
    return replace(settings, max_steps=max(int(entry["step"]) for entry in log), max_minutes=None)


def _describe(
    job: Job, student: PreTrainedModel, results: Mapping[str, Any], rivals: Sequence[Rival]
) -> list[ModelRecord]:
    """Records of teacher, student and rivals; the student's cost is measured once, as training does not change it."""
    teacher = job.reported.teacher
    measured = [Timed.teacher_of(job), Timed(student, dtype=saved_dtype(job.recipe))]
    costs = model_costs(job, [*measured, *(rival.timed for rival in rivals)])
    models = {"teacher": (teacher, costs[0]), "student_before": (student, costs[1]), "student": (student, costs[1])}
    described = [
        describe_model(job, role, model, results[role], results["teacher"], cost)
        for role, (model, cost) in models.items()
    ]
    beside = zip(rivals, costs[2:], strict=True)
    return [*described, *(rival.describe(results["teacher"], cost) for rival, cost in beside)]


@in_run_folder
def score(recipe: Recipe) -> list[ScoreRecord]:
    """Scores of the teacher's units in `scores.safetensors` of the run folder, whether a run reads them or not."""
    job = prepare(recipe, resumes="scores")
    run = Run(job, job.recipe, recipe.folder)
    return score_records(run.score(), run.recipe)


def evaluate(model: str, recipe: Recipe) -> ModelRecord:
    """Metrics and cost of `teacher`, `student` (of the run folder) or any model under the recipe's task.

    Raises:
        FlexKDError: The model is not there, or does not have the labels of the data.
    """
    source = str(recipe.folder / STUDENT_FOLDER) if model == "student" else model
    if model != "teacher":
        check_model("evaluate", source)
    job = prepare(recipe, stop_at_weak=False)
    if model == "teacher":
        job = job.reported
        results = job.predict(job.teacher)
        costs = model_costs(job, [Timed.teacher_of(job)])
        return describe_model(job, "teacher", job.teacher, results, results, costs[0])
    # Loaded before the teacher predicts, which may take long: a model that cannot be loaded is refused at once.
    with in_turn():
        other, _ = job.task.loader.load(source, where="evaluate", own_head=True)
    make_savable(other, where="evaluate")
    prefer_short_rows_attention([other], recipe.data.max_length)
    other_job = job.for_model(other, load_tokenizer(source, where="evaluate"))
    teacher = job.predict_teacher()
    costs = model_costs(other_job, [Timed(other)])
    return describe_model(other_job, "student", other, other_job.predict(other), teacher, costs[0])


def _write_run(folder: Path, recipe: Recipe, record: RunRecord) -> None:
    """Write the resolved recipe and the record."""
    with written_whole(folder / RECIPE_FILE) as partial:
        partial.write_text(recipe.to_yaml(), encoding="utf-8")
    record.write(folder / RECORD_FILE)
