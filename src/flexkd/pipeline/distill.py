"""A recipe from teacher to page: score the teacher's units, start a student, teach it, and say what it is worth."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.scores import UnitScores
from flexkd.data.encoding.collation import Collator
from flexkd.files import written_whole
from flexkd.models.forward.attention import prefer_short_rows_attention
from flexkd.models.forward.autocast import scoring_dtype
from flexkd.models.forward.engine import engine_of
from flexkd.models.loading.adapters import unwrapped
from flexkd.models.loading.pretrained import load_tokenizer
from flexkd.models.loading.saving import make_savable, round_weights, save_model
from flexkd.pipeline.caching import cached_teacher, live_teacher
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.pairing import build_objective, pair_layers
from flexkd.pipeline.recording import (
    Outcome,
    describe_baselines,
    describe_model,
    model_costs,
    run_record,
    score_records,
)
from flexkd.pipeline.start import Start, rotation_of, start_student, start_units
from flexkd.preflight.weights import check_model
from flexkd.recipe import Recipe
from flexkd.recipe.made_of import score_seed, selection_settings, training_settings
from flexkd.recipe.model_sections import ScoresSection
from flexkd.recipe.teaching import reads_scores, why_scores_are_not_read
from flexkd.record import ModelRecord, RunRecord, ScoreRecord
from flexkd.run_files import SELECTION_FILE
from flexkd.scoring.selection_file import Selection, load_selection, save_selection
from flexkd.scoring.units import score_units
from flexkd.teacher.signal import SignalRequest
from flexkd.training.arguments import RunSettings, training_arguments
from flexkd.training.fit import TrainingPlan, train
from flexkd.training.packing import packing_collator
from flexkd.training.time_limit import planned_steps

logger = logging.getLogger(__name__)


def distill(recipe: Recipe) -> RunRecord:
    """The whole job: a run folder with the student, its predictions, the record, the report and the model card.

    A run that was interrupted goes on from its last checkpoint.

    Raises:
        FlexKDError: Recipe, rows or models are wrong, or training must not go on.
    """
    seconds: dict[str, float] = {}
    folder = recipe.folder
    with _timed(seconds, "prepare teacher and rows"):
        job = prepare(recipe, resumes="run")
    with _timed(seconds, "score units"):
        selection = select(job, recipe, folder)
    with _timed(seconds, "start student"):
        start = start_student(job, recipe, selection.start_units)
        selection, objective = teach_what(job, recipe, start, selection, folder)
    with _timed(seconds, "evaluate before"):
        results = {"teacher": job.results_of(job.teacher), "student_before": job.results_of(start.student)}
    with _timed(seconds, "train student"):
        student, log = train_student(job, recipe, start, objective, folder / "checkpoints")
    with _timed(seconds, "evaluate after"):
        results["student"] = job.results_of(student)
        _save_student(folder / "student", student, job)
        baselines = job.task.baselines(job.encoded)
        described = [*_describe(job, student, results), *describe_baselines(job, baselines, results["teacher"])]
        results |= baselines
        job.task.write(folder / "predictions.jsonl", job.encoded, results)
    outcome = Outcome(described, results, selection, start.new_parameters, log, seconds)
    record = run_record(job, recipe, objective, outcome)
    write_run(folder, recipe, record)
    return record


def _describe(job: Job, student: PreTrainedModel, results: Mapping[str, Any]) -> list[ModelRecord]:
    """Teacher and student, measured in turns; training changes no cost, so that both students share one."""
    costs = model_costs(job, [(job.teacher, True), (student, False)], student_dtype=_saved_dtype(job.recipe))
    models = {"teacher": (job.teacher, costs[0]), "student_before": (student, costs[1]), "student": (student, costs[1])}
    return [
        describe_model(job, role, model, results[role], results["teacher"], cost)
        for role, (model, cost) in models.items()
    ]


def score(recipe: Recipe) -> list[ScoreRecord]:
    """Scores of the teacher's units in `scores.safetensors` of the run folder, whether a run reads them or not."""
    job, folder = prepare(recipe, resumes="run"), recipe.folder
    selection = select(job, recipe, folder)
    if not selection.scores:
        selection = replace(selection, scores=_scores(job, recipe))
        save_selection(folder / SELECTION_FILE, selection, _made_of(job, recipe), job.inputs)
    return score_records(selection, "none")


def evaluate(model: str, recipe: Recipe) -> ModelRecord:
    """Metrics and cost of `teacher`, `student` (of the run folder) or any model under the recipe's task.

    Raises:
        FlexKDError: The model is not there, or does not have the labels of the data.
    """
    source = str(recipe.folder / "student") if model == "student" else model
    if model != "teacher":
        check_model("evaluate", source)
    job = prepare(recipe, stop_at_weak=False)
    if model == "teacher":
        results = job.results_of(job.teacher)
        costs = model_costs(job, [(job.teacher, True)])
        return describe_model(job, "teacher", job.teacher, results, results, costs[0])
    # Before the teacher is asked, which may take long.
    other, _ = job.task.load(source, where="evaluate", own_head=True)
    make_savable(other, where="evaluate")
    prefer_short_rows_attention([other], recipe.data.max_length)
    other_job = job.for_model(other, load_tokenizer(source, where="evaluate"))
    teacher = job.results_of(job.teacher)
    costs = model_costs(other_job, [(other, False)])
    return describe_model(other_job, "student", other, other_job.results_of(other), teacher, costs[0])


def select(job: Job, recipe: Recipe, folder: Path) -> Selection:
    """Scores of the teacher's units and the units a student is sliced by; those of the run folder where they fit.

    Scores that nothing would read are not computed.
    """
    path, made_of = folder / SELECTION_FILE, _made_of(job, recipe)
    if path.is_file():
        return load_selection(path, made_of)
    selection = Selection(_scores(job, recipe) if _reads_scores(job, recipe) else ())
    selection = Selection(selection.scores, start_units(recipe, job, selection))
    save_selection(path, selection, made_of, job.inputs)
    return selection


def _reads_scores(job: Job, recipe: Recipe) -> bool:
    """Whether the scores decide anything, and a word where they do not."""
    rotated = rotation_of(job, recipe) is not None
    if reads_scores(recipe, rotated=rotated):
        return True
    logger.log(
        logging.INFO if recipe.scores == ScoresSection() else logging.WARNING,
        "scores: nothing of this recipe reads them: %s",
        why_scores_are_not_read(recipe, rotated=rotated),
    )
    return False


def _scores(job: Job, recipe: Recipe) -> tuple[UnitScores, ...]:
    """Computed once for a job and the same settings: the cells of a comparison share them."""
    section = recipe.scores
    seed = score_seed(recipe)
    settings = f"{section.model_dump_json()} {seed}"
    if settings not in job.scored:
        layers = section.layer if isinstance(section.layer, tuple) else (section.layer,)
        batches = tqdm(list(job.batches("train", rows=section.rows)), "teacher units, batches scored", leave=False)
        job.scored[settings] = tuple(
            score_units(
                job.teacher,
                batches,
                target=section.target,
                attribution=section.attribution,
                layer=layers,
                seed=seed,
                precision=scoring_dtype(job.teacher_precision),
            )
        )
    return job.scored[settings]


def teach_what(
    job: Job, recipe: Recipe, start: Start, selection: Selection, folder: Path
) -> tuple[Selection, Objective]:
    """The units that meet, kept beside the scores, and the objective that teaches them."""
    if selection.layers is None:
        layers = pair_layers(recipe, job, start, selection)
        selection = Selection(selection.scores, selection.start_units, layers)
        save_selection(folder / SELECTION_FILE, selection, _made_of(job, recipe), job.inputs)
    assert selection.layers is not None
    return selection, build_objective(recipe, selection.layers, start.student, job)


def _made_of(job: Job, recipe: Recipe) -> dict[str, str]:
    """What scores and pairs depend on."""
    engine = engine_of(job.teacher, scoring_dtype(job.teacher_precision))
    return {**job.fingerprints, **engine, **selection_settings(recipe)}


def train_student(
    job: Job, recipe: Recipe, start: Start, objective: Objective, checkpoints: Path
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """The trained student, low-rank updates merged into it where it learnt by those, and the log of the run."""
    section = recipe.training
    validation_metrics = job.task.validation_metrics(job.encoded)
    options = section.model_dump(exclude={"precision", "resume", "logit_chunk", "compile", "packing"})
    settings = RunSettings(precision=job.precision, metric=validation_metrics.metric, **options)
    learner = start.learner()
    training_plan = TrainingPlan(
        learner,
        objective,
        job.splits["train"],
        job.splits["validation"],
        _collator(job, learner) if section.packing else job.encoded.collator,
        validation_metrics,
        "student",
        logit_chunk=section.logit_chunk,
        compile_blocks=section.compile,
    )
    live, cached, rows = None, None, len(training_plan.rows)
    request = SignalRequest.of(objective)
    if objective.needs_teacher:
        live = live_teacher(job)
        # Minutes are only passes over the rows when the pace is known.
        wanted = None if settings.max_minutes else settings.passes(rows)
        cached = cached_teacher(job, live, request, passes=wanted)
    settings = planned_steps(training_plan, cached or live, settings, checkpoints)
    arguments = training_arguments(checkpoints, settings, num_rows=rows)
    if live is not None and cached is None:
        cached = cached_teacher(job, live, request, passes=settings.passes(rows))
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
    # Students start on the CPU, and so does all that is measured of both.
    nn.Module.to(job.teacher, "cpu")
    student = start.finished(learner)
    # It is judged with the weights that it is saved with.
    round_weights(student, _saved_dtype(recipe))
    return student, list(trainer.state.log_history)


def _saved_dtype(recipe: Recipe) -> torch.dtype:
    """The number type that the student's weights are saved in."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.student.save_dtype]


def _collator(job: Job, learner: nn.Module) -> Collator:
    """One that packs rows, which teacher and student keep apart."""
    models = {"teacher": job.teacher, "student": unwrapped(learner)}
    return packing_collator(job.encoded.collator, models, job.splits["train"])


def _save_student(folder: Path, student: PreTrainedModel, job: Job) -> None:
    save_model(student, folder, dtype=_saved_dtype(job.recipe))
    job.tokenizer.save_pretrained(folder)


def write_run(folder: Path, recipe: Recipe, record: RunRecord) -> None:
    """The resolved recipe and the record; page and card are drawn from the record by the floor above."""
    with written_whole(folder / "recipe.yaml") as partial:
        partial.write_text(recipe.to_yaml(), encoding="utf-8")
    record.write(folder / "record.json")


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    logger.info("%s ...", stage)
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began
