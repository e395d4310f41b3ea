"""What the page of a run shows: its tables, charts and sentences, ready for the template."""

from collections.abc import Mapping, Sequence
from typing import Final

from flexkd.facts.metrics import LOWER_IS_BETTER, METRIC_FACTS, definitions, metric_label
from flexkd.recipe.document import write_yaml
from flexkd.record import ModelRecord, RunRecord
from flexkd.report.answers import answer_view, generation_facts
from flexkd.report.class_view import class_view, example_groups
from flexkd.report.rivals import rival_lines
from flexkd.report.run_charts import (
    cost_charts,
    evaluation_chart,
    labelled_models,
    logged_terms,
    loss_chart,
    score_charts,
)
from flexkd.report.verdicts import verdict
from flexkd.report.wording import (
    ROLES,
    Row,
    Table,
    byte_size,
    compact,
    duration,
    factor,
    interval_text,
    intervals_note,
    kept,
    latency_cell,
    latency_text,
    main_metric,
    metric_heading,
    metric_text,
    model_interval,
    model_label,
    size_ratio,
    speed,
)

_NA: Final = "n/a: not defined or not measured."
COST_COLUMNS: Final = ("parameters", "hidden x layers", "weights on disk", "examples/s", "latency, ms", "peak memory")
_LAST_LOGGED: Final = (
    "feature_positions",
    "dead_student_units",
    "dead_teacher_units",
    "skipped_feature_terms",
    "nonfinite",
    "grad_norm",
    "learning_rate",
)


def run_view(record: RunRecord, prefix: str) -> dict[str, object]:
    """All values for the template of one run; chart ids start with `prefix`."""
    return {
        "title": record.name,
        "verdict": verdict(record),
        "tiles": _tiles(record),
        "quality": quality_table(record),
        "quality_note": _quality_note(record),
        "cost": cost_table(record),
        "cost_note": _cost_note(record),
        "notes": record.notes,
        "rivals": rival_lines(record),
        "cost_charts": cost_charts(labelled_models(record), record.metric, prefix),
        "objective": record.objective,
        "choices": record.choices,
        "training_charts": [loss_chart(record, "weighted", prefix), evaluation_chart(record, prefix)],
        "raw_charts": [loss_chart(record, "raw", prefix)] if logged_terms(record, "raw") else [],
        "score_charts": score_charts(record.scores, prefix),
        "is_generation": record.problem == "generation",
        "classes": class_view(record),
        "has_classes": record.problem in ("single_label", "multi_label"),
        "examples": example_groups(record),
        "answers": [answer_view(example) for example in record.answers],
        "data_table": Table(
            ("split", "rows", "source"),
            [Row(split, (f"{rows:,}", record.data.sources.get(split, ""))) for split, rows in record.data.rows.items()],
        ),
        "data_facts": _data_facts(record),
        "skipped_examples": record.data.skipped_examples,
        "facts": _facts(record),
        "stages": [(stage, _stage(record, stage)) for stage in record.seconds],
        "environment": list(record.environment.items()),
        "recipe": recipe_text(record.recipe),
    }


def _stage(record: RunRecord, stage: str) -> str:
    """How long a stage took, and the most memory in it where that is known."""
    peak = record.peaks.get(stage)
    return duration(record.seconds[stage]) + ("" if peak is None else f", {byte_size(peak)} at most")


def recipe_text(recipe: Mapping[str, object]) -> str:
    """A resolved recipe as YAML that `flexkd check` reads."""
    return write_yaml(dict(recipe))


def _tiles(record: RunRecord) -> list[dict[str, str]]:
    """The student against the teacher in up to four numbers: quality, size, speed, memory."""
    teacher, student = record.model("teacher"), record.model("student")
    if teacher is None or student is None:
        return []
    name, share = metric_label(record.metric), kept(record)
    reached, target = (metric_text(main_metric(record, role)) for role in ("student", "teacher"))
    tiles = [(reached, f"{name}; teacher {target}")]
    if share is not None and not share.rows_are_few:
        interval = f" ({share.interval})" if share.ends else ""
        tiles = [(share.text, f"of the teacher's {name}{interval}: {reached}, teacher {target}")]
    ratio = size_ratio(teacher, student).partition(" ")
    if ratio[0].endswith("x"):
        tiles.append((ratio[0], f"{ratio[2]}: {compact(student.parameters)} of {compact(teacher.parameters)}"))
    if teacher.examples_per_second and student.examples_per_second:
        fast, slow = student.examples_per_second, teacher.examples_per_second
        tiles.append((factor(fast / slow), f"the speed: {speed(fast)} against {speed(slow)} examples/s"))
    if teacher.peak_memory_bytes and student.peak_memory_bytes:
        small, large = student.peak_memory_bytes, teacher.peak_memory_bytes
        tiles.append((f"{small / large:.0%}", f"of the memory: {byte_size(small)} of {byte_size(large)}"))
    return [{"value": value, "text": text} for value, text in tiles]


def metric_names(record: RunRecord) -> list[str]:
    """Names of all metrics, the main one first."""
    return list(dict.fromkeys([record.metric, *(name for model in record.models for name in model.metrics)]))


def quality_table(record: RunRecord) -> Table:
    """All metrics of teacher, student before and after, and baselines, and the interval of the main one."""
    names = metric_names(record)
    columns = ["model", *map(metric_heading, names)]
    rows = [[metric_text(model.metrics.get(name)) for name in names] for model in record.models]
    if record.intervals is not None:
        columns.insert(2, "95% interval")
        for cells, model in zip(rows, record.models, strict=True):
            cells.insert(1, interval_text(model_interval(record, model)))
    return Table(columns, [_model_row(model, cells) for model, cells in zip(record.models, rows, strict=True)])


def cost_table(record: RunRecord) -> Table:
    """Size, speed, latency and memory of the models; a baseline without parameters, such as a rule, has none."""
    models = [model for model in record.models if model.parameters]
    return Table(["model", *COST_COLUMNS], [_model_row(model, cost_cells(model)) for model in models])


def cost_cells(model: ModelRecord) -> list[str]:
    """Size, speed, latency and memory, in the order of `COST_COLUMNS`; dashes for a baseline without parameters."""
    if not model.parameters:
        return ["-"] * len(COST_COLUMNS)
    return [
        compact(model.parameters),
        f"{model.hidden_size} x {model.num_layers}",
        f"{byte_size(model.bytes_on_disk)} {model.dtype}".rstrip(),
        speed(model.examples_per_second),
        latency_cell(model.latency),
        byte_size(model.peak_memory_bytes),
    ]


def _model_row(model: ModelRecord, cells: Sequence[str]) -> Row:
    # The sentences below the table say how a rival was made.
    name = model_label(model) if model.role == "rival" else ROLES.get(model.role, model.role)
    return Row(name, cells, note="rival" if name == model.name else model.name, mark=model.role == "student")


def _quality_note(record: RunRecord) -> str:
    """What was measured on which rows, and how to read the metrics."""
    rows = record.data.rows.get("test")
    split = "" if rows is None else f"Metrics on the {rows:,} rows of the test split. "
    lower = "\u2193: less is better. " if LOWER_IS_BETTER & set(metric_names(record)) else ""
    if record.generation is not None:
        share = "" if rows is None else f" of the {rows:,}"
        split = f"Metrics on {record.generation.rows:,}{share} rows of the test split. "
        lower += "Cut share: answers that were cut off at the limit of new tokens. "
    notes = (definitions_text(record), _teacher_metrics_note(record.problem), intervals_note(record), _NA)
    return f"{split}{lower}{' '.join(note for note in notes if note)}"


def _teacher_metrics_note(problem: str) -> str:
    """Which metrics of a problem compare a model with the teacher."""
    names = [facts.name for facts in METRIC_FACTS if facts.compares_with_teacher and problem in facts.problems]
    units = {"kl": " (nats a token)"} if problem == "generation" else {}
    labels = [f"{metric_label(name)}{units.get(name, '')}" for name in names]
    return f"{' and '.join(labels).capitalize()} compare with the teacher."


def definitions_text(record: RunRecord) -> str:
    """How the metrics of a run were computed."""
    return " ".join(definitions(record.problem, metric_names(record), record.recipe))


def _cost_note(record: RunRecord) -> str:
    """How speed, latency and memory were measured."""
    latency = f"{text} " if (text := latency_text(record)) else ""
    workload = ""
    if record.generation is not None and record.generation.cost_tokens:
        workload = f"An example is a prompt answered with exactly {record.generation.cost_tokens} new tokens. "
    return (
        f"Speed and memory: the same rows in the same batches, in a fresh process for each model. {workload}{latency}"
        "Memory: the peak above what was resident before the model was loaded."
    )


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "none"


def _data_facts(record: RunRecord) -> list[tuple[str, str]]:
    data = record.data
    return [
        ("rows left out", _counts(data.skipped)),
        ("texts cut at the length limit", _counts(data.truncated)),
        *([("labels", ", ".join(data.labels) or "none")] if record.problem != "generation" else []),
        ("fingerprint", data.fingerprint),
    ]


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    last = record.history[-1] if record.history else {}
    logged = ", ".join(f"{metric_label(name)} {last[name]:.4g}" for name in _LAST_LOGGED if name in last)
    facts = [
        ("task", f"{record.task}, {record.problem.replace('_', ' ')}"),
        *([] if record.generation is None else generation_facts(record.generation)),
        ("seed", str(record.seed)),
        ("made", record.created),
        ("time", duration(sum(record.seconds.values())) if record.seconds else "n/a"),
        ("newly initialized weights", ", ".join(record.new_parameters) or "none"),
    ]
    return [*facts, ("at the last log", logged)] if logged else facts
