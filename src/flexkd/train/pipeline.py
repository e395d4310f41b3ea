"""A recipe from teacher to page: score the teacher's units, start a student, teach it, and say what it is worth."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.scores import UnitScores
from flexkd.core.terms import LayerPair
from flexkd.evaluate.classification import Predictions, predict
from flexkd.evaluate.predictions import write_predictions
from flexkd.models.loading import load_classifier, load_tokenizer
from flexkd.recipe import Recipe
from flexkd.recipe.section import Section
from flexkd.record import ModelRecord, RunRecord, ScoreRecord
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.memory import RememberingTeacher
from flexkd.teacher.signal import SignalRequest, Teacher
from flexkd.train.arguments import RunSettings, autocast_dtype, prefer_short_rows_attention, training_arguments
from flexkd.train.artefact import Selection, load_selection, save_selection
from flexkd.train.job import Job, prepare
from flexkd.train.recording import Outcome, describe_model, model_costs, run_record, score_records
from flexkd.train.scoring import score_units
from flexkd.train.starting import Start, build_objective, pair_layers, start_student, start_units
from flexkd.train.trainer import DistillationTrainer
from flexkd.train.training import train

logger = logging.getLogger(__name__)

REMEMBERED_BYTES: Final = 2**31
"""Most memory that a teacher's answers may take; beyond it the teacher runs on every batch."""

_ASKED_TOGETHER: Final = 32


def distill(recipe: Recipe) -> RunRecord:
    """The whole job: a run folder with the student, its predictions, the record, the report and the model card.

    A run that was interrupted goes on from its last checkpoint.

    Raises:
        FlexKDError: Recipe, rows or models are wrong, or training must not go on.
    """
    seconds: dict[str, float] = {}
    folder = Path(recipe.output)
    with _timed(seconds, "prepare teacher and rows"):
        job = prepare(recipe)
    with _timed(seconds, "score units"):
        selection = select(job, recipe, folder)
    with _timed(seconds, "start student"):
        start = start_student(job, recipe, selection.start_units)
        selection, objective = teach_what(job, recipe, start, selection, folder)
    with _timed(seconds, "evaluate before"):
        teacher = predictions_of(job, job.teacher, own=True)
        before = predictions_of(job, start.student)
    with _timed(seconds, "train student"):
        trainer = train_student(job, recipe, start, objective, folder / "checkpoints")
    with _timed(seconds, "evaluate after"):
        after = predictions_of(job, start.student)
        _save_student(folder / "student", start.student, job)
        write_predictions(
            folder / "predictions.jsonl", {"teacher": teacher, "student_before": before, "student": after}
        )
        described = _describe(job, start.student, {"student_before": before, "student": after}, teacher)
    outcome = Outcome(described, teacher, after, selection, start.new_parameters, trainer.state.log_history, seconds)
    record = run_record(job, recipe, objective, outcome)
    write_run(folder, recipe, record)
    return record


def _describe(
    job: Job, student: PreTrainedModel, students: Mapping[str, Predictions], teacher: Predictions
) -> list[ModelRecord]:
    """Teacher and student, measured in turns; training changes no cost, so that both students share one."""
    teacher_cost, cost = model_costs(job, [(job.teacher, True), (student, False)])
    return [
        describe_model(job, "teacher", job.teacher, teacher, teacher, teacher_cost),
        *(describe_model(job, role, student, predictions, teacher, cost) for role, predictions in students.items()),
    ]


def score(recipe: Recipe) -> list[ScoreRecord]:
    """Scores of the teacher's units on disk, `scores.safetensors` in the run folder."""
    return score_records(select(prepare(recipe), recipe, Path(recipe.output)), "none")


def evaluate(model: str, recipe: Recipe) -> ModelRecord:
    """Metrics and cost of `teacher`, `student` (of the run folder) or any classifier under the recipe's task.

    Raises:
        FlexKDError: The model is not there, or does not have the labels of the data.
    """
    job = prepare(recipe)
    teacher = predictions_of(job, job.teacher, own=True)
    if model == "teacher":
        return describe_model(job, "teacher", job.teacher, teacher, teacher, model_costs(job, [(job.teacher, True)])[0])
    source = str(Path(recipe.output, "student")) if model == "student" else model
    other, _ = load_classifier(source, where="evaluate")
    prefer_short_rows_attention([other], recipe.data.max_length)
    job = job.for_model(other, load_tokenizer(source, where="evaluate"))
    return describe_model(
        job, "student", other, predictions_of(job, other), teacher, model_costs(job, [(other, False)])[0]
    )


def select(job: Job, recipe: Recipe, folder: Path) -> Selection:
    """Scores of the teacher's units and the units a student is sliced by; those of the run folder where they fit."""
    path, made_of = folder / "scores.safetensors", _made_of(job, recipe)
    if path.is_file():
        return load_selection(path, made_of)
    selection = Selection(_scores(job, recipe))
    selection = Selection(selection.scores, start_units(recipe, job, selection))
    save_selection(path, selection, made_of)
    return selection


def _scores(job: Job, recipe: Recipe) -> tuple[UnitScores, ...]:
    """Computed once for a job and the same settings: the cells of a comparison share them."""
    section = recipe.scores
    seed = _score_seed(recipe)
    settings = f"{section.model_dump_json()} {seed}"
    if settings not in job.scored:
        layers = section.layer if isinstance(section.layer, tuple) else (section.layer,)
        batches = tqdm(list(job.batches("train", rows=section.rows)), "teacher units, batches scored", leave=False)
        options = {"target": section.target, "attribution": section.attribution}
        job.scored[settings] = tuple(score_units(job.teacher, batches, layer=layers, seed=seed, **options))
    return job.scored[settings]


def _score_seed(recipe: Recipe) -> int:
    """Students of all seeds share their scores, but for the control whose point is another draw for each."""
    return recipe.training.seed if recipe.scores.attribution == "random" else 0


def teach_what(
    job: Job, recipe: Recipe, start: Start, selection: Selection, folder: Path
) -> tuple[Selection, Objective]:
    """The units that meet, kept beside the scores, and the objective that teaches them."""
    if selection.layers is None:
        layers = pair_layers(recipe, job, start.student, selection)
        selection = Selection(selection.scores, selection.start_units, layers)
        save_selection(folder / "scores.safetensors", selection, _made_of(job, recipe))
    assert selection.layers is not None
    return selection, build_objective(recipe, selection.layers, start.student, job)


def _made_of(job: Job, recipe: Recipe) -> dict[str, str]:
    """What scores and pairs depend on."""
    features = recipe.objective.features
    taught = features if features is not None and features.weight > 0 else None
    settings = {
        **_settings("scores", recipe.scores),
        "scores.seed": str(_score_seed(recipe)),
        **_settings("student", recipe.student),
        **({} if taught is None else _settings("features", taught, exclude={"weight"})),
    }
    return {**job.fingerprints, "features": "none" if taught is None else "taught", **settings}


def _settings(name: str, section: Section, *, exclude: set[str] | None = None) -> dict[str, str]:
    """A section of the recipe key by key, so that a mismatch names the key."""
    plain = section.model_dump(mode="json", exclude=exclude)
    return {f"{name}.{key}": json.dumps(value, sort_keys=True) for key, value in plain.items()}


def train_student(
    job: Job, recipe: Recipe, start: Start, objective: Objective, checkpoints: Path
) -> DistillationTrainer:
    """Train the student in place."""
    section = recipe.training
    options = section.model_dump(exclude={"precision", "resume"})
    run_settings = RunSettings(precision=job.precision, metric=recipe.task.metric, **options)
    arguments = training_arguments(checkpoints, run_settings, num_rows=len(job.splits["train"]))
    teacher = None
    if objective.needs_teacher:
        nn.Module.to(job.teacher, arguments.device)
        passes = arguments.max_steps * section.batch_size / len(job.splits["train"])
        teacher = _teacher(job, SignalRequest.of(objective), passes, arguments.device)
    made_of = {
        **job.fingerprints,
        "task.metric": recipe.task.metric,
        **_settings("objective", recipe.objective),
        **_settings("training", section, exclude={"resume", "report_to", "dataloader_workers"}),
    }
    trainer = train(
        start.student,
        teacher,
        objective,
        arguments,
        rows=job.splits["train"],
        validation=job.splits["validation"],
        collator=job.collator,
        problem=recipe.task.problem,
        fingerprints=made_of,
        description="student",
        resume=section.resume,
    )
    # Students start on the CPU, and so does all that is measured of both.
    nn.Module.to(job.teacher, "cpu")
    return trainer


def _teacher(job: Job, request: SignalRequest, passes: float, device: torch.device) -> Teacher:
    """The teacher, running on each row once where rows come back and its answers fit into memory, else on every batch.

    What it says of a row hangs, by a rounding, on the rows beside it. It is asked in one order, so that neither an
    interruption nor another cell of a comparison changes a number.
    """
    key = request.key()
    if key in job.remembered:
        return job.remembered[key]
    live = LiveTeacher(job.teacher, precision=autocast_dtype(job.teacher_precision))
    rows = [row for split in ("train", "validation") for row in job.splits[split]]
    columns = sum(_columns(job, pair) for pair in request.layers)
    if passes <= 1 or sum(len(row["input_ids"]) for row in rows) * columns * 4 > REMEMBERED_BYTES:
        return live
    remembering = RememberingTeacher(live, request)
    rows.sort(key=lambda row: (len(row["input_ids"]), row["id"]))
    for first in tqdm(range(0, len(rows), _ASKED_TOGETHER), "teacher, batches answered once", leave=False):
        batch = job.collator(rows[first : first + _ASKED_TOGETHER])
        remembering.signal({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}, request)
    job.remembered[key] = remembering
    return remembering


def _columns(job: Job, pair: LayerPair) -> int:
    if pair.units is not None:
        return len(pair.units.teacher)
    if pair.teacher_basis is not None:
        return pair.teacher_basis.shape[1]
    return job.width(job.teacher, pair.teacher_layer, own=True)


def predictions_of(job: Job, model: PreTrainedModel, *, own: bool = False) -> Predictions:
    """Predictions on the test rows, in the same precision for every model of a run."""
    return predict(model, job.batches("test", batch_size=64), precision=job.precision, own=own)


def _save_student(folder: Path, student: PreTrainedModel, job: Job) -> None:
    student.save_pretrained(folder)
    job.tokenizer.save_pretrained(folder)


def write_run(folder: Path, recipe: Recipe, record: RunRecord) -> None:
    """The resolved recipe and the record; page and card are drawn from the record by the floor above."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    record.write(folder / "record.json")


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    logger.info("%s ...", stage)
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began
