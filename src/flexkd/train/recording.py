"""What a run did as a record: models with metrics and costs, data, scores, history, machine."""

import datetime
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.evaluate.classification import Predictions, agreement, classification_metrics
from flexkd.evaluate.cost import Cost, measure_costs
from flexkd.evaluate.predictions import disagreements
from flexkd.models.hidden import num_layers
from flexkd.recipe import Recipe
from flexkd.record import DataRecord, ModelRecord, RunRecord, ScoreRecord
from flexkd.train.artefact import Selection
from flexkd.train.job import Job

COST_ROWS: Final = 256
"""Test rows that speed and memory are measured on."""

_PACKAGES: Final = ("flexkd", "torch", "transformers", "accelerate", "datasets", "safetensors")
_EXAMPLES: Final = 8


@dataclass(frozen=True)
class Outcome:
    """What the stages of a run left behind."""

    models: Sequence[ModelRecord]
    teacher: Predictions
    student: Predictions
    selection: Selection
    new_parameters: Sequence[str]
    log: Sequence[Mapping[str, Any]]
    seconds: Mapping[str, float]


def test_metrics(job: Job, predictions: Predictions, teacher: Predictions) -> dict[str, float | None]:
    """Metrics of the task on the test rows, and the agreement with the teacher."""
    problem = job.recipe.task.problem
    found = classification_metrics(predictions.logits, predictions.labels, problem)
    return {**found, **agreement(predictions.logits, teacher.logits, problem)}


def describe_model(
    job: Job, role: str, model: PreTrainedModel, predictions: Predictions, teacher: Predictions, cost: Cost
) -> ModelRecord:
    """Metrics and costs of one model, measured like every other's.

    Args:
        job: Its test rows are those of every model.
        role: As in `ModelRecord`.
        model: For its shape.
        predictions: Its own.
        teacher: The teacher's.
        cost: From `model_costs`.
    """
    return ModelRecord(
        role=role,
        name=job.recipe.teacher.model if role == "teacher" else job.recipe.name,
        parameters=cost.parameters,
        bytes_on_disk=cost.bytes_on_disk,
        hidden_size=job.width(model, own=role == "teacher"),
        num_layers=num_layers(model),
        examples_per_second=cost.examples_per_second,
        peak_memory_bytes=cost.peak_memory_bytes,
        metrics=dict(test_metrics(job, predictions, teacher)),
    )


def model_costs(job: Job, models: Sequence[tuple[PreTrainedModel, bool]]) -> list[Cost]:
    """Size, speed and memory of models on the same rows and in the same precision.

    Models that read one encoding are timed in turns, so that other work on the machine slows all of them alike.

    Args:
        job: Gives the rows.
        models: Each with whether it reads the teacher's encoding.
    """
    with tempfile.TemporaryDirectory(prefix="flexkd-") as temporary:
        folders = [Path(temporary, str(index)) for index in range(len(models))]
        for folder, (model, _) in zip(folders, models, strict=True):
            model.save_pretrained(folder)
        if not job.has_own_encoding:
            return measure_costs(folders, _cost_batches(job, own=False), precision=job.precision)
        return [
            measure_costs([folder], _cost_batches(job, own=own), precision=job.precision)[0]
            for folder, (_, own) in zip(folders, models, strict=True)
        ]


def _cost_batches(job: Job, *, own: bool) -> list[dict[str, Any]]:
    prefix = "teacher_" if own and job.has_own_encoding else ""
    return [_plain(batch, prefix) for batch in job.batches("test", rows=COST_ROWS, batch_size=32)]


def _plain(batch: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    if prefix:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return {key: value for key, value in tensors.items() if not key.startswith("teacher_")}


def run_record(job: Job, recipe: Recipe, objective: Objective, outcome: Outcome) -> RunRecord:
    """Everything that report and model card are drawn from."""
    data = job.data
    return RunRecord(
        name=recipe.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        task=recipe.task.type,
        problem=recipe.task.problem,
        metric=recipe.task.metric,
        objective=objective.formula(),
        recipe=recipe.model_dump(mode="json"),
        seed=recipe.training.seed,
        environment=environment(job.precision),
        data=DataRecord(
            sources=dict(data.sources),
            rows=dict(data.rows),
            skipped=dict(data.skipped),
            skipped_examples=[f"{row.where}: {row.reason}" for row in data.bad_rows[:20]],
            labels=list(data.labels.names),
            truncated={split: cut.rows for split, cut in job.cuts.items()},
            fingerprint=data.fingerprint,
        ),
        models=list(outcome.models),
        scores=score_records(outcome.selection, _mapping(recipe)),
        history=[_row(entry) for entry in outcome.log if "loss" in entry],
        evaluations=[_row(entry) for entry in outcome.log if "eval_loss" in entry],
        disagreements=disagreements(job.examples("test"), outcome.teacher, outcome.student, data.labels, _EXAMPLES),
        new_parameters=list(outcome.new_parameters),
        notes=list(job.notes),
        seconds=dict(outcome.seconds),
    )


def _mapping(recipe: Recipe) -> str:
    features = recipe.objective.features
    return "none" if features is None else features.mapping


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if isinstance(value, int | float)}


def score_records(selection: Selection, mapping: str) -> list[ScoreRecord]:
    """One for each scored layer, with the units that are taught of it.

    Args:
        selection: Scores, and pairs once there is a student; before that the units that it will be sliced by.
        mapping: How units meet, as the recipe says it.
    """
    records = []
    for scores in selection.scores:
        pair = next((p for p in selection.layers or () if p.teacher_layer == scores.layer), None)
        is_tangent = pair is not None and pair.teacher_basis is not None
        if pair is not None:
            units = pair.units.teacher if pair.units is not None and not is_tangent else None
        else:
            units = selection.start_units if selection.layers is None else None
        records.append(
            ScoreRecord(
                layer=scores.layer,
                target=scores.target,
                attribution=scores.attribution,
                values=scores.values.tolist(),
                units=[] if units is None else units.sort().values.tolist(),
                num_predictions=scores.num_predictions,
                effective_predictions=scores.effective_predictions,
                num_unused=scores.num_unused,
                basis="tangent" if is_tangent else "units",
                mapping=mapping,
                selection_hash=selection.hash(),
            )
        )
    return records


def environment(precision: str) -> dict[str, str]:
    """Versions and machine behind the figures."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.is_file() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        device = names[0] if names else platform.machine()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "platform": platform.platform(terse=True),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "precision": precision,
    }
