"""What a run did as a record: models with metrics and costs, data, scores, history, machine."""

import datetime
import math
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.evaluate.classification import undefined_metrics_expected
from flexkd.evaluate.cost import Cost
from flexkd.facts.names import ALL_LAYERS
from flexkd.models.forward.hidden import HEAD_INPUT, num_layers
from flexkd.models.loading.int8 import computes_in_int8, save_int8
from flexkd.models.loading.saving import save_model
from flexkd.pipeline.job import Job
from flexkd.pipeline.stages import Stages
from flexkd.processes import decided
from flexkd.recipe import Recipe
from flexkd.recipe.taught_features import cut_choice, describe_cut, describe_taught, taught_choice, unit_attribution
from flexkd.record import DataRecord, ModelRecord, RunRecord, ScoreRecord
from flexkd.scoring.selection_file import Selection, directions_hash, scores_hash

_COSTS: Final = TypeAdapter(list[Cost])
_PACKAGES: Final = ("flexkd", "torch", "transformers", "accelerate", "datasets", "safetensors")


@dataclass(frozen=True)
class Outcome:
    """What the stages of a run leave behind; `results` holds each model's results on the test rows, by role or name.

    Attributes:
        rotated: Whether the student was cut along directions.
        notes: What a reader of the results has to know of the training.
    """

    models: Sequence[ModelRecord]
    results: Mapping[str, Any]
    selection: Selection
    new_parameters: Sequence[str]
    log: Sequence[Mapping[str, Any]]
    stages: Stages
    rotated: bool = False
    notes: Sequence[str] = ()


def describe_model(job: Job, role: str, model: PreTrainedModel, results: Any, teacher: Any, cost: Cost) -> ModelRecord:
    """Metrics and costs of one model, measured like every other's.

    Args:
        role: As in `ModelRecord`.
        results: The model's results on the test rows.
        teacher: The teacher's results, which the model is compared with.
        cost: From `model_costs`.
    """
    return ModelRecord(
        role=role,
        name=job.recipe.teacher.model if role == "teacher" else job.recipe.name,
        parameters=cost.parameters,
        bytes_on_disk=cost.bytes_on_disk,
        hidden_size=job.width(model, as_teacher=role == "teacher"),
        num_layers=num_layers(model),
        examples_per_second=cost.examples_per_second,
        peak_memory_bytes=cost.peak_memory_bytes,
        metrics=dict(job.task.metrics(results, teacher)),
        dtype=cost.dtype,
        latency=cost.latency,
    )


def describe_baselines(job: Job, baselines: Mapping[str, Any], teacher: Any) -> list[ModelRecord]:
    """Metrics of the baselines that need no model and cost nothing.

    Args:
        baselines: Results by name, from `Task.baselines`.
        teacher: The teacher's results.
    """
    with undefined_metrics_expected():
        metrics = {name.replace("_", " "): job.task.metrics(results, teacher) for name, results in baselines.items()}
    return [ModelRecord("baseline", name, 0, 0, 0, 0, None, None, dict(values)) for name, values in metrics.items()]


@dataclass(frozen=True)
class Timed:
    """A model whose cost is measured.

    Attributes:
        as_teacher: Whether it reads the teacher's encoding of the rows.
        dtype: Number type in which it is saved; None: as it is.
        own_job: The job that holds the rows in an encoding of its own; None: it reads one of the run's.
    """

    model: PreTrainedModel
    as_teacher: bool = False
    dtype: torch.dtype | None = None
    own_job: Job | None = None

    @classmethod
    def teacher_of(cls, job: Job) -> "Timed":
        """The teacher of a job, which reads the rows in all of its tokens, where students know some of them."""
        return cls(job.reported.teacher, as_teacher=True, own_job=job.whole)

    def save(self, folder: Path) -> None:
        """Write the model as its cost is measured."""
        if computes_in_int8(self.model):
            save_int8(self.model, folder)
        else:
            save_model(self.model, folder, dtype=self.dtype)


def model_costs(job: Job, models: Sequence[Timed], *, saved: Sequence[Path] = ()) -> list[Cost]:
    """Size, speed, latency and memory of models on the same rows and in the same precision.

    The models are timed in turns, so that other work on the machine slows all of them alike.

    Args:
        saved: Folders of students that are measured beside these models.
    """

    def measured() -> Any:
        with tempfile.TemporaryDirectory(prefix="flexkd-") as temporary:
            folders = [Path(temporary, str(index)) for index in range(len(models))]
            for folder, timed in zip(folders, models, strict=True):
                timed.save(folder)
            tasks = {place: timed.own_job.task for place, timed in enumerate(models) if timed.own_job is not None}
            costs = job.task.costs(
                [*folders, *saved],
                as_teacher=[*(timed.as_teacher for timed in models), *(False for _ in saved)],
                own_batches={place: task.cost_batches() for place, task in tasks.items()},
            )
            return _COSTS.dump_python(costs, mode="json")

    # The machine has to be idle: of several processes one measures, while the others wait.
    return _COSTS.validate_python(decided(measured))


def run_record(job: Job, recipe: Recipe, objective: Objective, outcome: Outcome) -> RunRecord:
    """Everything that page and model card are drawn from."""
    data, encoded = job.data, job.encoded
    shown = job.task.report(outcome.results)
    rotated = outcome.rotated
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
            rows=data.num_rows,
            skipped={**data.skipped, **encoded.dropped},
            skipped_examples=[f"{row.where}: {row.reason}" for row in data.bad_rows[:20]],
            labels=list(job.task.labels),
            truncated=encoded.num_truncated(),
            fingerprint=data.fingerprint,
        ),
        models=list(outcome.models),
        scores=score_records(outcome.selection, recipe),
        cut=describe_cut(recipe, rotated=rotated),
        taught=describe_taught(recipe, rotated=rotated),
        vocabulary=job.vocabulary,
        history=[_row(entry) for entry in outcome.log if "loss" in entry],
        evaluations=[_row(entry) for entry in outcome.log if "eval_loss" in entry],
        disagreements=shown.disagreements,
        answers=shown.answers,
        generation=shown.generation,
        new_parameters=list(outcome.new_parameters),
        notes=[*job.notes, *outcome.notes, *shown.notes],
        seconds=dict(outcome.stages.seconds),
        peaks=dict(outcome.stages.peaks),
        classes=shown.classes,
        confusion=shown.confusion,
        outcomes=shown.outcomes,
        both_wrong=shown.both_wrong,
        intervals=shown.intervals,
    )


def learning_curve(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations in the log of a training: finite figures alone, and none about its own speed."""
    rows = [_row(entry) for entry in log if "eval_loss" in entry]
    timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return [{key: value for key, value in row.items() if key not in timings and math.isfinite(value)} for row in rows]


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if isinstance(value, int | float)}


def score_records(selection: Selection, recipe: Recipe) -> list[ScoreRecord]:
    """One for each scored layer, with the units of it that are taught, and one for the directions of a cut.

    Args:
        selection: Its pairs say which units are taught; without pairs, the units that a student is cut along.
        recipe: Says what the scores choose, and how units are paired.
    """
    features, rotated = recipe.objective.features, selection.start_directions is not None
    mapping = "none" if features is None or selection.layers is None else features.mapping
    taught = taught_choice(recipe, rotated=rotated)
    records = []
    for scores in selection.scores:
        pair = next((p for p in selection.layers or () if scores.layer in (p.teacher_layer, ALL_LAYERS)), None)
        has_basis = pair is not None and pair.teacher_basis is not None
        is_taught = taught is not None and unit_attribution(recipe, taught.chosen_by) == scores.attribution
        if pair is not None:
            units = pair.units.teacher if pair.units is not None and not has_basis and is_taught else None
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
                basis="directions" if has_basis else "units",
                mapping=mapping,
                selection_hash=selection.hash(),
                scores_hash=scores_hash(scores),
            )
        )
    return [*records, *_direction_records(selection, recipe, mapping)]


def _direction_records(selection: Selection, recipe: Recipe, mapping: str) -> list[ScoreRecord]:
    """What the directions of a cut were chosen by, and which of them it keeps."""
    scores, directions = selection.direction_scores, selection.start_directions
    if scores is None or directions is None:
        return []
    cut = cut_choice(recipe, rotated=True)
    return [
        ScoreRecord(
            layer=ALL_LAYERS if cut is not None and cut.over_layers else HEAD_INPUT,
            target="output",
            attribution=scores.chosen_by,
            values=scores.values.tolist(),
            units=directions.tolist(),
            num_predictions=0,
            effective_predictions=0,
            num_unused=int((scores.values == 0).sum()),
            basis="directions",
            mapping=mapping,
            selection_hash=selection.hash(),
            scores_hash=directions_hash(scores.values),
            of="directions",
        )
    ]


@cache
def _versions() -> dict[str, str]:
    """Reading them takes milliseconds, and a comparison records them for every student."""
    return {name: version(name) for name in _PACKAGES}


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
        **_versions(),
        "platform": platform.platform(terse=True),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "precision": precision,
    }
