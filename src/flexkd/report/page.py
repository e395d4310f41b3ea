"""Records to one self-contained HTML page: a run, several runs side by side, or a comparison of methods."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import jinja2

from flexkd.facts.metrics import LOWER_IS_BETTER, definitions, metric_label
from flexkd.files import written_whole
from flexkd.record import CompareRecord, ModelRecord, PairedDifference, RunRecord
from flexkd.report.compare_charts import forest_chart, seeds_chart
from flexkd.report.drawings import Chart, cost_charts
from flexkd.report.views import COST_COLUMNS, Row, Table, cost_cells, recipe_text, run_view
from flexkd.report.wording import (
    ROLES,
    Verdict,
    compare_verdict,
    duration,
    kept,
    metric_name,
    metric_of,
    shown,
    verdict,
)

_TEMPLATES: Final = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(records: Sequence[RunRecord], path: str | Path) -> None:
    """Write the page of one run, or of several side by side; a pure function of the records."""
    assert records, "a report needs a record"
    first = records[0]
    several = len(records) > 1
    title = f"{len(records)} runs side by side" if several else first.name
    page = _TEMPLATES.get_template("report.html").render(
        title=title,
        subtitle=", ".join(record.name for record in records) if several else f"{first.task}, {first.created}",
        verdict=_best_run(records),
        side_by_side=_side_by_side(records) if several else None,
        runs=[run_view(record, f"run{index}-" if several else "") for index, record in enumerate(records, start=1)],
        source="record.json",
    )
    _write(page, path)


def compare_page(record: CompareRecord, path: str | Path) -> None:
    """Write the page of a comparison of methods over seeds."""
    page = _TEMPLATES.get_template("compare.html").render(
        title=record.name,
        subtitle=", ".join(
            part for part in ("methods x seeds", record.problem.replace("_", " "), record.created) if part
        ),
        verdict=compare_verdict(record),
        methods=_methods_table(record),
        methods_note=_methods_note(record),
        charts=_compare_charts(record),
        cells=_cells_table(record),
        notes=record.notes,
        environment=list(record.environment.items()),
        recipe=recipe_text(record.recipe) if record.recipe else "",
        source="compare.json",
    )
    _write(page, path)


def _write(page: str, path: str | Path) -> None:
    # A lone surrogate out of the data has no UTF-8 form; as a character reference it shows as a replacement sign.
    with written_whole(path) as partial:
        partial.write_bytes(page.encode("utf-8", errors="xmlcharrefreplace"))


def _side_by_side(records: Sequence[RunRecord]) -> dict[str, object]:
    metrics = list(dict.fromkeys(record.metric for record in records))
    names = _distinct([record.name for record in records])
    quality: list[Row] = []
    cost: list[Row] = []
    models: list[tuple[ModelRecord, str, str]] = []
    seen: set[tuple[object, ...]] = set()
    for record, name in zip(records, names, strict=True):
        for model in record.models:
            key = (model.role, model.name, model.parameters, model.metrics.get(record.metric))
            if model.role == "student_before" or (model.role != "student" and key in seen):
                continue
            seen.add(key)
            label = name if model.role == "student" else f"{ROLES.get(model.role, model.role)} {model.name}"
            quality.append(_side_row(record, model, label, metrics))
            cost.append(Row(label, cost_cells(model), mark=model.role == "student"))
            models.append((model, name if model.role == "student" else ROLES.get(model.role, model.role), ""))
    charts = [Chart("quality", "Quality against cost", None, "the runs have different main metrics.")]
    if len(metrics) == 1:
        charts = cost_charts(models, metrics[0], "all-")
    data = {record.data.fingerprint for record in records}
    note = (
        "All runs have the same data." if len(data) == 1 else "The runs do NOT have the same data: compare with care."
    )
    measured = {tuple(definitions(record.problem, [record.metric], record.recipe)) for record in records}
    if len(metrics) == 1 and len(measured) > 1:
        note += f" Their {metrics[0]} is NOT measured alike: see below the table of each run."
    columns = ["model", *map(metric_name, metrics), "of the teacher's", "seed", "time of the run"]
    tables = [Table(columns, quality), Table(["model", *COST_COLUMNS], cost)]
    return {"tables": tables, "note": note, "charts": charts}


def _best_run(records: Sequence[RunRecord]) -> Verdict | None:
    """Which student is best, where all runs have one main metric."""
    metric = records[0].metric
    found = [(value, record) for record in records if (value := metric_of(record, "student")) is not None]
    if len(found) < 2 or any(record.metric != metric for record in records):
        return None
    pick = min if metric in LOWER_IS_BETTER else max
    best = pick(found, key=lambda pair: pair[0])[1]
    return Verdict("", best.name, f"has the best {metric_label(metric)} of {len(found)} students. {verdict(best)}")


def _side_row(record: RunRecord, model: ModelRecord, label: str, metrics: Sequence[str]) -> Row:
    is_student = model.role == "student"
    share = kept(record) if is_student else None
    cells = [
        *(shown(model.metrics.get(metric)) for metric in metrics),
        "" if share is None else f"{share:.1%}",
        str(record.seed) if is_student else "",
        duration(sum(record.seconds.values())) if is_student and record.seconds else "",
    ]
    return Row(label, cells, note=record.objective if is_student else "", mark=is_student)


def _distinct(names: Sequence[str]) -> list[str]:
    """Names with a number behind those that stand there more than once."""
    return [
        name if names.count(name) == 1 else f"{name} #{names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]


def _methods_table(record: CompareRecord) -> Table:
    columns = [
        "method",
        f"mean {metric_name(record.metric)}",
        "std",
        "difference",
        "95% interval",
        "p",
        "seeds",
        "time a cell",
    ]
    paired = {row.method: row for row in record.paired}
    models = {"teacher": record.teacher, **record.baselines}
    fixed = [Row(name, [shown(values.get(record.metric)), *[""] * 6]) for name, values in models.items()]
    return Table(columns, [*fixed, *(_method_row(record, method, paired[method]) for method in record.methods)])


def _method_row(record: CompareRecord, method: str, row: PairedDifference) -> Row:
    cells = [cell for cell in record.cells if cell.method == method]
    seconds = [cell.seconds for cell in cells]
    interval = "" if row.low is None or row.high is None else f"{row.low:+.3f} to {row.high:+.3f}"
    reference = method == record.reference
    values = [
        shown(row.mean),
        "" if row.std is None else shown(row.std),
        "" if row.difference is None or reference else f"{row.difference:+.3f}",
        "" if reference else interval,
        "" if row.p_value is None or reference else f"{row.p_value:.2g}",
        str(len(cells)),
        duration(sum(seconds) / len(seconds)) if seconds else "n/a",
    ]
    return Row(method, values, note="reference" if reference else "")


def _methods_note(record: CompareRecord) -> str:
    return (
        f"Mean and sample standard deviation over seeds {', '.join(map(str, record.seeds))}; difference to "
        f"{record.reference}, paired by seed, with its 95% confidence interval and p of scipy's t-test. "
        + " ".join(definitions(record.problem, [record.metric], record.recipe))
    ).rstrip()


def _compare_charts(record: CompareRecord) -> list[Chart]:
    seeds = Chart("seeds", "Every seed", None, f"no cell has a {record.metric} that is defined.")
    if any(cell.metrics.get(record.metric) is not None for cell in record.cells):
        svg = seeds_chart(record, name="seeds")
        seeds = Chart(
            "seeds",
            "Every seed",
            svg,
            "A point is one seed; the upright bar is the mean, the line below it one standard deviation each way.",
        )
    title = f"Difference to {record.reference}"
    forest = Chart("forest", title, None, "no other method has a difference that is defined.")
    if any(row.difference is not None and row.method != record.reference for row in record.paired):
        svg = forest_chart(record, name="forest")
        forest = Chart(
            "forest",
            title,
            svg,
            "Line: 95% confidence interval. One that crosses 0 may be chance.",
        )
    return [seeds, forest]


def _cells_table(record: CompareRecord) -> Table:
    names = list(dict.fromkeys([record.metric, *(name for cell in record.cells for name in cell.metrics)]))
    rows = [
        Row(cell.method, [str(cell.seed), *(shown(cell.metrics.get(name)) for name in names), duration(cell.seconds)])
        for cell in record.cells
    ]
    return Table(["method", "seed", *map(metric_name, names), "time"], rows)
