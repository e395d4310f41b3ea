"""What the page of a comparison shows: its tables, charts and sentences, ready for the template."""

from flexkd.facts.metrics import definitions
from flexkd.record import CompareRecord, PairedDifference
from flexkd.report.compare_charts import compare_charts
from flexkd.report.run_view import Row, Table, recipe_text
from flexkd.report.wording import compare_verdict, duration, metric_heading, metric_text


def compare_view(record: CompareRecord) -> dict[str, object]:
    """All values for the template of a comparison."""
    subtitle = ("methods x seeds", record.problem.replace("_", " "), record.created)
    return {
        "title": record.name,
        "subtitle": ", ".join(part for part in subtitle if part),
        "verdict": compare_verdict(record),
        "methods": _methods_table(record),
        "methods_note": _methods_note(record),
        "charts": compare_charts(record),
        "cells": _cells_table(record),
        "notes": record.notes,
        "environment": list(record.environment.items()),
        "recipe": recipe_text(record.recipe) if record.recipe else "",
    }


def _methods_table(record: CompareRecord) -> Table:
    """The teacher, the baselines and every method with its paired difference to the reference."""
    columns = [
        "method",
        f"mean {metric_heading(record.metric)}",
        "std",
        "difference",
        "95% interval",
        "p",
        "seeds",
        "time a cell",
    ]
    paired = {row.method: row for row in record.paired}
    models = {"teacher": record.teacher, **record.baselines}
    fixed = [Row(name, [metric_text(values.get(record.metric)), *[""] * 6]) for name, values in models.items()]
    return Table(columns, [*fixed, *(_method_row(record, method, paired[method]) for method in record.methods)])


def _method_row(record: CompareRecord, method: str, row: PairedDifference) -> Row:
    """Mean and spread of a method, and its paired difference to the reference."""
    cells = [cell for cell in record.cells if cell.method == method]
    seconds = [cell.seconds for cell in cells]
    interval = "" if row.low is None or row.high is None else f"{row.low:+.3f} to {row.high:+.3f}"
    is_reference = method == record.reference
    values = [
        metric_text(row.mean),
        "" if row.std is None else metric_text(row.std),
        "" if row.difference is None or is_reference else f"{row.difference:+.3f}",
        "" if is_reference else interval,
        "" if row.p_value is None or is_reference else f"{row.p_value:.2g}",
        str(len(cells)),
        duration(sum(seconds) / len(seconds)) if seconds else "n/a",
    ]
    return Row(method, values, note="reference" if is_reference else "")


def _methods_note(record: CompareRecord) -> str:
    """How the numbers of the methods were computed."""
    return (
        f"Mean and sample standard deviation over seeds {', '.join(map(str, record.seeds))}; difference to "
        f"{record.reference}, paired by seed, with its 95% confidence interval and p of scipy's t-test. "
        + " ".join(definitions(record.problem, [record.metric], record.recipe))
    ).rstrip()


def _cells_table(record: CompareRecord) -> Table:
    """All metrics of each student."""
    names = list(dict.fromkeys([record.metric, *(name for cell in record.cells for name in cell.metrics)]))
    rows = [
        Row(
            cell.method,
            [str(cell.seed), *(metric_text(cell.metrics.get(name)) for name in names), duration(cell.seconds)],
        )
        for cell in record.cells
    ]
    return Table(["method", "seed", *map(metric_heading, names), "time"], rows)
