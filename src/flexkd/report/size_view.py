"""What the page of `flexkd sizes` shows: the curve, its knee, and what each size costs, ready for the template."""

from collections.abc import Callable
from typing import Final

from flexkd.evaluate.sizes.curve import advice, curve_notes, knee_text, size_words
from flexkd.evaluate.sizes.next_step import next_step
from flexkd.facts.metrics import LOWER_IS_BETTER, definitions, metric_label
from flexkd.record import ModelRecord, Number, proper_interval
from flexkd.report.charts import Point, curve_chart
from flexkd.report.run_charts import Chart
from flexkd.report.run_view import COST_COLUMNS, cost_cells, recipe_text
from flexkd.report.verdicts import Verdict
from flexkd.report.wording import Row, Table, duration, metric_heading, metric_text
from flexkd.sizes_record import SizesRecord

_COSTS: Final[tuple[tuple[str, str, str, Callable[[ModelRecord], Number | None]], ...]] = (
    ("size", "parameters", "left", lambda model: model.parameters),
    ("speed", "examples a second", "right", lambda model: model.examples_per_second),
)


def size_view(record: SizesRecord) -> dict[str, object]:
    """All values for the template of a recipe at several sizes."""
    seeds = f"{len(record.seeds)} seed" + "s" * (len(record.seeds) != 1)
    subtitle = (f"{len(record.sizes)} sizes", seeds, record.problem.replace("_", " "), record.created)
    return {
        "title": record.name,
        "subtitle": ", ".join(part for part in subtitle if part),
        "verdict": Verdict(advice(record)),
        "knee": knee_text(record),
        "next_step": next_step(record),
        "charts": [_chart(record, *cost) for cost in _COSTS],
        "quality": _quality_table(record),
        "quality_notes": curve_notes(record),
        "costs": _cost_table(record),
        "costs_note": _cost_note(record),
        "metrics": _metric_table(record),
        "metrics_note": " ".join(definitions(record.problem, _metrics(record), record.recipe)),
        "cells": _cells_table(record),
        "notes": record.notes,
        "environment": list(record.environment.items()),
        "recipe": recipe_text(record.recipe) if record.recipe else "",
    }


def _chart(
    record: SizesRecord, short: str, x_label: str, side: str, cost: Callable[[ModelRecord], Number | None]
) -> Chart:
    """Quality against one cost: the sizes joined by a line, the teacher, and what needs no model as levels."""
    metric, title, name = record.metric, f"Quality against {short}", f"quality-{short}"
    curve, others = [], []
    for result in record.sizes:
        x, y = cost(result.model), result.model.metrics.get(metric)
        is_knee = result.name == record.knee.size
        label = f"{result.name}{' (knee)' * is_knee}"
        if x is not None and y is not None:
            interval = None if result.low is None or result.high is None else (result.low, result.high)
            curve.append(Point(label, x, y, "student", interval=interval, ring=is_knee))
    if len(curve) < 2:
        return Chart(name, title, None, f"fewer than two sizes have both {metric} and {x_label}.")
    x, y = cost(record.teacher), record.teacher.metrics.get(metric)
    if x is not None and y is not None:
        others.append(Point("teacher", x, y, "teacher"))
    levels = [(model.name, value) for model in record.baselines if (value := model.metrics.get(metric)) is not None]
    labels = {"x_label": x_label, "y_label": metric_label(metric), "name": name}
    svg = curve_chart(curve, others, **labels, levels=levels, goal=_goal(record))
    caption = [f"{'Down' if metric in LOWER_IS_BETTER else 'Up'} and {side} is better."]
    caption += [f"Points are named by their student.{record.key}."]
    caption += ["An upright line is a 95% interval."] if record.interval_over else []
    caption += ["The ring marks the knee."] if record.knee.size is not None else []
    return Chart(name, title, svg, " ".join(caption))


def _goal(record: SizesRecord) -> tuple[str, float] | None:
    """The quality that a student has to keep, where a share of the teacher's says something."""
    teacher = record.teacher.metrics.get(record.metric)
    if teacher is None or all(result.share is None for result in record.sizes):
        return None
    return f"{record.keep * 100:g}% of the teacher", record.keep * teacher


def _quality_table(record: SizesRecord) -> Table:
    """The main metric of every size with its interval, and as a share of the teacher's."""
    name = metric_heading(record.metric)
    columns = ["size", name, "kept", f"95% interval of {name}", "of what is kept"]
    rows = [Row(model.name, _model_cells(record, model)) for model in record.baselines]
    for result in record.sizes:
        cells = [
            metric_text(result.model.metrics.get(record.metric)),
            "" if result.share is None else f"{result.share:.1%}",
            _interval(result.low, result.high, metric_text),
            _interval(result.share_low, result.share_high, "{:.1%}".format),
        ]
        is_knee = result.name == record.knee.size
        rows.append(Row(size_words(record, result), cells, note="knee" * is_knee, mark=is_knee))
    return Table(columns, [*rows, Row("teacher", _model_cells(record, record.teacher))])


def _model_cells(record: SizesRecord, model: ModelRecord) -> list[str]:
    """The main metric of the teacher or a baseline, and as a share of the teacher's where sizes have one."""
    value, teacher = model.metrics.get(record.metric), record.teacher.metrics.get(record.metric)
    has_share = any(result.share is not None for result in record.sizes)
    share = f"{value / teacher:.1%}" if has_share and value is not None and teacher else ""
    return [metric_text(value), share, "", ""]


def _interval(low: Number | None, high: Number | None, text: Callable[[Number], str]) -> str:
    ends = proper_interval(low, high)
    return "" if ends is None else f"{text(ends[0])} to {text(ends[1])}"


def _cost_table(record: SizesRecord) -> Table:
    """What every size and the teacher cost."""
    rows = [
        Row(size_words(record, result), cost_cells(result.model), mark=result.name == record.knee.size)
        for result in record.sizes
    ]
    return Table(["size", *COST_COLUMNS], [*rows, Row("teacher", cost_cells(record.teacher))])


def _cost_note(record: SizesRecord) -> str:
    """How speed, latency and memory were measured."""
    latency = record.teacher.latency
    measured = "Speed and memory: the same rows in the same batches, each model in a fresh process, all in turns."
    return measured if latency is None else f"{measured} {latency.describe()}"


def _metrics(record: SizesRecord) -> list[str]:
    names = (name for result in record.sizes for name in result.model.metrics)
    return list(dict.fromkeys([record.metric, *names]))


def _metric_table(record: SizesRecord) -> Table:
    """All metrics of every size, means over the seeds."""
    names = _metrics(record)
    models = [(size_words(record, result), result.model) for result in record.sizes]
    models = [*((model.name, model) for model in record.baselines), *models, ("teacher", record.teacher)]
    rows = [Row(label, [metric_text(model.metrics.get(name)) for name in names]) for label, model in models]
    return Table(["size", *map(metric_heading, names)], rows)


def _cells_table(record: SizesRecord) -> Table:
    """The main metric of each student, and where those lie that were kept."""
    words = {result.name: size_words(record, result) for result in record.sizes}
    folders = {(result.name, record.seeds[0]): result.folder for result in record.sizes}
    rows = [
        Row(
            words[cell.method],
            [
                str(cell.seed),
                metric_text(cell.metrics.get(record.metric)),
                duration(cell.seconds),
                folders.get((cell.method, cell.seed), ""),
            ],
        )
        for cell in sorted(record.cells, key=lambda cell: (float(cell.method), cell.seed))
    ]
    return Table(["size", "seed", metric_heading(record.metric), "time", "student"], rows)
