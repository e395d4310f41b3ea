"""A recipe at several sizes as a table in the terminal."""

from flexkd.display.results import show
from flexkd.display.tables import EMPTY_CELL, FigureTable
from flexkd.evaluate.sizes.curve import advice, curve_notes, knee_text
from flexkd.evaluate.sizes.next_step import next_step
from flexkd.facts.metrics import deviations, metric_label
from flexkd.record import ModelRecord, Number, proper_interval
from flexkd.report.wording import byte_size, compact, metric_text, speed
from flexkd.sizes_record import SizesRecord


def print_sizes(record: SizesRecord) -> None:
    """Print what each size costs and keeps, the knee of the curve, and the smallest size that keeps enough."""
    metric = record.metric
    table = FigureTable(
        [
            record.key.replace("_", " "),
            "layers x width",
            "parameters",
            "disk",
            "rows/s",
            metric_label(metric),
            "95% interval",
            "kept",
        ]
    )
    for result in record.sizes:
        name = f"{result.name}{' *' * (result.name == record.knee.size)}"
        share = EMPTY_CELL if result.share is None else f"{result.share:.1%}"
        table.add_row(name, *_cells(result.model, metric), _interval(result.low, result.high), share)
    table.add_section()
    table.add_row("teacher", *_cells(record.teacher, metric), EMPTY_CELL, EMPTY_CELL)
    show(table)
    for model in record.baselines:
        if model.metrics.get(metric) is not None:
            show(f"{model.name}: {metric_text(model.metrics[metric])}")
    star = "* " * (record.knee.size is not None)
    show(f"{star}{knee_text(record)}\n{advice(record)}")
    if next_step(record):
        show(next_step(record))
    for note in [*curve_notes(record), *deviations(record.problem, [metric], record.recipe), *record.notes]:
        show(note)


def _cells(model: ModelRecord, metric: str) -> list[str]:
    """Shape, costs and quality of a model."""
    return [
        f"{model.num_layers} x {model.hidden_size}",
        compact(model.parameters),
        byte_size(model.bytes_on_disk),
        speed(model.examples_per_second),
        metric_text(model.metrics.get(metric)),
    ]


def _interval(low: Number | None, high: Number | None) -> str:
    ends = proper_interval(low, high)
    return EMPTY_CELL if ends is None else f"{metric_text(ends[0])} .. {metric_text(ends[1])}"
