"""Results of runs, comparisons and sizes as tables of figures with their intervals, for a paper or a spreadsheet."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from flexkd.compare_record import CompareRecord, PairedDifference
from flexkd.evaluate.statistics import mean_interval
from flexkd.facts.metrics import metric_label
from flexkd.record import ModelRecord, Number, RunRecord, proper_interval
from flexkd.report.wording import (
    distinct_names,
    intervals_note,
    kept,
    metric_heading,
    model_interval,
    model_label,
)
from flexkd.sizes_record import SizesRecord


@dataclass(frozen=True)
class Estimate:
    """A figure with the ends of its 95 % interval; None for what is not known."""

    value: Number | None
    low: Number | None = None
    high: Number | None = None


Cell = str | int | float | Estimate | None
"""One cell of a table; None where there is nothing."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: In CSV, where an interval has two more columns, `NAME_low` and `NAME_high`.
        heading: In print; empty for a column of CSV alone.
        kind: What its cells are: text, count, metric, signed, share, p_value, bytes, speed, milliseconds or seconds.
        has_interval: Whether its cells are estimates.
    """

    name: str
    heading: str
    kind: str = "text"
    has_interval: bool = False


@dataclass(frozen=True)
class ResultTable:
    """Columns, rows, and what a reader has to know.

    Attributes:
        details: More rows, of CSV alone.
        notes: In print.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    details: Sequence[Sequence[Cell]] = ()
    notes: Sequence[str] = field(default_factory=list)


_COSTS = (
    Column("parameters", "parameters", "count"),
    Column("hidden_size", "", "count"),
    Column("num_layers", "", "count"),
    Column("dtype", ""),
    Column("bytes_on_disk", "on disk", "bytes"),
    Column("examples_per_second", "examples/s", "speed"),
    Column("latency_median_ms", "latency, ms", "milliseconds"),
    Column("latency_p95_ms", "", "milliseconds"),
    Column("peak_memory_bytes", "peak memory", "bytes"),
)


def _costs(model: ModelRecord) -> list[Cell]:
    """Size, speed, latency and memory; nothing for a baseline without parameters."""
    if not model.parameters:
        return [None] * len(_COSTS)
    latency = model.latency
    return [
        model.parameters,
        model.hidden_size,
        model.num_layers,
        model.dtype,
        model.bytes_on_disk,
        model.examples_per_second,
        None if latency is None else latency.median_ms,
        None if latency is None else latency.p95_ms,
        model.peak_memory_bytes,
    ]


def _heading(metric: str, *, has_interval: bool = False) -> str:
    return metric_heading(metric) + (" [95% interval]" if has_interval else "")


def runs_table(records: Sequence[RunRecord]) -> ResultTable:
    """All models of one run or several: metrics, what the student keeps, costs."""
    mains = list(dict.fromkeys(record.metric for record in records))
    names = dict.fromkeys([*mains, *(name for record in records for model in record.models for name in model.metrics)])
    metrics = [Column(name, _heading(name, has_interval=name in mains), "metric", name in mains) for name in names]
    columns = [
        Column("run", "run" if len(records) > 1 else ""),
        Column("model", "model"),
        Column("role", ""),
        Column("seed", "", "count"),
        Column("test_rows", "", "count"),
        *metrics,
        Column("kept", "of the teacher's [95% interval]", "share", True),
        *_COSTS,
    ]
    rows = [
        [*_run_cells(record, name, model), *_metric_cells(record, model, metrics), _kept(record, model), *_costs(model)]
        for record, name in zip(records, distinct_names([record.name for record in records]), strict=True)
        for model in record.models
    ]
    notes = dict.fromkeys(note for record in records if (note := intervals_note(record)))
    return ResultTable(columns, rows, notes=list(notes))


def _run_cells(record: RunRecord, name: str, model: ModelRecord) -> list[Cell]:
    rows = record.data.rows.get("test") if record.generation is None else record.generation.rows
    return [name, model_label(model), model.role, record.seed, rows]


def _metric_cells(record: RunRecord, model: ModelRecord, columns: Sequence[Column]) -> list[Cell]:
    cells: list[Cell] = []
    for column in columns:
        value = model.metrics.get(column.name)
        ends = model_interval(record, model) if column.name == record.metric else []
        cells.append(Estimate(value, *ends) if column.has_interval else value)
    return cells


def _kept(record: RunRecord, model: ModelRecord) -> Cell:
    share = kept(record) if model.role == "student" else None
    return Estimate(None) if share is None else Estimate(share.share, *share.ends)


def compare_table(records: Sequence[CompareRecord]) -> ResultTable:
    """The methods of one comparison or several, with means over seeds; in CSV each student as well."""
    metrics = list(dict.fromkeys(record.metric for record in records))
    others = [name for record in records for cell in record.cells for name in cell.metrics]
    names = [name for name in dict.fromkeys(others) if name not in metrics]
    columns = [
        Column("comparison", "comparison" if len(records) > 1 else ""),
        Column("method", "method"),
        Column("seed", ""),
        Column("seeds", "seeds", "count"),
        *(Column(name, _heading(name, has_interval=True), "metric", True) for name in metrics),
        Column("std", "std", "metric"),
        Column("reference", "reference" if len({record.reference for record in records}) > 1 else ""),
        Column("difference", f"difference to {records[0].reference} [95% interval]", "signed", True)
        if len({record.reference for record in records}) == 1
        else Column("difference", "difference [95% interval]", "signed", True),
        Column("paired_t_p", "paired t p", "p_value"),
        Column("exact_p", "", "p_value"),
        Column("holm_p", "Holm p", "p_value"),
        *(Column(name, "", "metric") for name in names),
        Column("seconds", "time a student", "seconds"),
    ]
    rows: list[Sequence[Cell]] = []
    details: list[Sequence[Cell]] = []
    for record, name in zip(records, distinct_names([record.name for record in records]), strict=True):
        rows += _method_rows(record, name, metrics, names)
        details += _cell_rows(record, name, metrics, names)
    notes = [
        "Intervals of means are over the seeds, by Student's t; those of differences over differences of the same seed."
    ]
    if any(record.named_after_results for record in records):
        notes.append("Contrasts were named after results were there: their p values test nothing.")
    return ResultTable(columns, rows, details, notes)


def _method_rows(
    record: CompareRecord, name: str, metrics: Sequence[str], others: Sequence[str]
) -> list[Sequence[Cell]]:
    """The teacher, the baselines, and each method over its seeds."""
    empty: list[Cell] = [None, "", Estimate(None), None, None, None]
    rows: list[Sequence[Cell]] = []
    for model, values in {"teacher": record.teacher, **record.baselines}.items():
        mains = [Estimate(values.get(metric)) for metric in metrics]
        rows.append([name, model, "", None, *mains, *empty, *(values.get(other) for other in others), None])
    for paired in record.paired:
        cells = [cell for cell in record.cells if cell.method == paired.method]
        mains = [_mean(record, paired, metric) for metric in metrics]
        means = [_mean_of([cell.metrics.get(other) for cell in cells]) for other in others]
        seconds = _mean_of([cell.seconds for cell in cells])
        rows.append(
            [name, paired.method, "", len(cells), *mains, paired.std, *_against(record, paired), *means, seconds]
        )
    return rows


def _mean(record: CompareRecord, paired: PairedDifference, metric: str) -> Estimate:
    """The mean of the main metric, with its interval where there are two seeds or more."""
    if metric != record.metric:
        return Estimate(None)
    values = [cell.metrics.get(metric) for cell in record.cells if cell.method == paired.method]
    defined = [float(value) for value in values if value is not None]
    if len(defined) < len(values) or len(defined) < 2:
        return Estimate(paired.mean)
    return Estimate(paired.mean, *(proper_interval(*mean_interval(defined)) or ()))


def _mean_of(values: Sequence[Number | None]) -> float | None:
    defined = [float(value) for value in values if value is not None]
    return statistics.fmean(defined) if defined and len(defined) == len(values) else None


def _against(record: CompareRecord, paired: PairedDifference) -> list[Cell]:
    """The reference, the difference to it, and its p values; those of a contrast where one was named."""
    if paired.method == record.reference:
        return ["", Estimate(None), None, None, None]
    contrast = record.contrast(paired.method, record.reference)
    tests: list[Cell] = [None, None] if contrast is None else [contrast.exact_p_value, contrast.holm_p_value]
    return [
        record.reference,
        Estimate(paired.difference, *(proper_interval(paired.low, paired.high) or ())),
        paired.p_value,
        *tests,
    ]


def _cell_rows(record: CompareRecord, name: str, metrics: Sequence[str], others: Sequence[str]) -> list[Sequence[Cell]]:
    """Each student."""
    empty: list[Cell] = [None, "", Estimate(None), None, None, None]
    return [
        [
            name,
            cell.method,
            str(cell.seed),
            1,
            *(Estimate(cell.metrics.get(metric)) for metric in metrics),
            *empty,
            *(cell.metrics.get(other) for other in others),
            cell.seconds,
        ]
        for cell in record.cells
    ]


def sizes_table(records: Sequence[SizesRecord]) -> ResultTable:
    """The sizes of one call of `flexkd sizes` or several, the teacher, and what needs no model."""
    metrics = list(dict.fromkeys(record.metric for record in records))
    models = [model for record in records for model in _models(record)]
    others = [name for name in dict.fromkeys(name for model in models for name in model.metrics) if name not in metrics]
    columns = [
        Column("sizes", "sizes" if len(records) > 1 else ""),
        Column("size", "size"),
        Column("is_knee", "knee"),
        Column("seeds", "", "count"),
        *(Column(name, _heading(name, has_interval=True), "metric", True) for name in metrics),
        Column("kept", "of the teacher's [95% interval]", "share", True),
        *(Column(name, _heading(name), "metric") for name in others),
        *_COSTS,
    ]
    rows: list[Sequence[Cell]] = []
    for record, name in zip(records, distinct_names([record.name for record in records]), strict=True):
        for result in record.sizes:
            mains = [_of_main(record, result.model, metric, result.low, result.high) for metric in metrics]
            share = Estimate(result.share, result.share_low, result.share_high)
            knee = "knee" if result.name == record.knee.size else ""
            values = [result.model.metrics.get(other) for other in others]
            label = f"{record.key.replace('_', ' ')} {result.name}"
            rows.append([name, label, knee, len(record.seeds), *mains, share, *values, *_costs(result.model)])
        for model in (record.teacher, *record.baselines):
            mains = [_of_main(record, model, metric, None, None) for metric in metrics]
            values = [model.metrics.get(other) for other in others]
            rows.append([name, model_label(model), "", None, *mains, Estimate(None), *values, *_costs(model)])
    notes = [
        f"Intervals of {metric_label(record.metric)} are over {record.interval_over}."
        for record in records
        if record.interval_over
    ]
    return ResultTable(columns, rows, notes=list(dict.fromkeys(notes)))


def _models(record: SizesRecord) -> list[ModelRecord]:
    return [*(result.model for result in record.sizes), record.teacher, *record.baselines]


def _of_main(record: SizesRecord, model: ModelRecord, metric: str, low: Number | None, high: Number | None) -> Estimate:
    return Estimate(model.metrics.get(metric), low, high) if metric == record.metric else Estimate(None)
