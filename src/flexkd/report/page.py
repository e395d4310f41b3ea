"""Records to one self-contained HTML page: a run, several side by side, a comparison, or sizes; or to a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import jinja2

from flexkd.compare_record import CompareRecord
from flexkd.errors import RecipeError, unknown_name
from flexkd.facts.metrics import LOWER_IS_BETTER, definitions, metric_label
from flexkd.facts.own_metrics import declare_direction
from flexkd.files import written_whole
from flexkd.record import ModelRecord, RunRecord
from flexkd.report.compare_view import compare_view
from flexkd.report.result_tables import compare_table, runs_table, sizes_table
from flexkd.report.run_charts import Chart, cost_charts
from flexkd.report.run_view import COST_COLUMNS, cost_cells, run_view
from flexkd.report.size_view import size_view
from flexkd.report.table_formats import FORMATS
from flexkd.report.verdicts import Verdict, verdict
from flexkd.report.wording import (
    ROLES,
    Row,
    Table,
    distinct_names,
    duration,
    kept_text,
    main_metric,
    metric_heading,
    metric_text,
    model_label,
)
from flexkd.run_files import COMPARISON_FILE, RECORD_FILE, REPORT_FILE, SIZES_FILE
from flexkd.sizes_record import SizesRecord

_TEMPLATES: Final = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


AnyRecord = RunRecord | CompareRecord | SizesRecord

_KINDS: Final[Mapping[str, type[RunRecord] | type[CompareRecord] | type[SizesRecord]]] = {
    RECORD_FILE: RunRecord,
    COMPARISON_FILE: CompareRecord,
    SIZES_FILE: SizesRecord,
}
_WORDS: Final[Mapping[type, str]] = {RunRecord: "a run", CompareRecord: "a comparison", SizesRecord: "several sizes"}


def read_records(files: Sequence[Path]) -> list[AnyRecord]:
    """The records in files, all of one kind, which the name of a file says; another name is that of a run.

    Raises:
        RecipeError: They are of several kinds, which no page and no table holds together.
        ArtifactError: A file cannot be read.
    """
    kinds = [_KINDS.get(file.name, RunRecord) for file in files]
    if len(set(kinds)) > 1:
        listed = ", ".join(f"{file} is {_WORDS[kind]}" for file, kind in zip(files, kinds, strict=True))
        raise RecipeError(f"RUN: {listed}. These do not stand side by side: call `flexkd report` for each kind.")
    return [kind.read(file) for file, kind in zip(files, kinds, strict=True)]


def draw(files: Sequence[Path], target: Path | None, form: str | None) -> str:
    """Draw the page of records, or write a table of them; what to print of it.

    Args:
        files: Of one kind.
        target: The file that is written; None: a page in the folder of the only record or here, a table nowhere.
        form: csv, latex or markdown; None: a page.

    Returns:
        Where it lies, or the table.

    Raises:
        RecipeError: As `read_records`, `write_page` and `results_as`.
        ArtifactError: A file cannot be read.
    """
    records = read_records(files)
    if form is None:
        page = target or (files[0].parent if len(files) == 1 else Path()) / REPORT_FILE
        write_page(records, page)
        return f"page: {page}"
    # A lone surrogate out of the data has no UTF-8 form.
    table = results_as(form, records).encode("utf-8", errors="replace")
    if target is None:
        return table.decode("utf-8").removesuffix("\n")
    with written_whole(target) as partial:
        partial.write_bytes(table)
    return f"table: {target}"


def write_page(records: Sequence[AnyRecord], path: str | Path) -> None:
    """Write the page of records of one kind.

    Raises:
        RecipeError: There are several comparisons, or several records of sizes.
    """
    first = records[0]
    if isinstance(first, RunRecord):
        write_report([record for record in records if isinstance(record, RunRecord)], path)
        return
    if len(records) > 1:
        raise RecipeError(
            f"RUN: {len(records)} records, each of {_WORDS[type(first)]}; a page shows one of them, or runs side by "
            "side. Give one, or --format csv, latex or markdown for a table of all."
        )
    if isinstance(first, CompareRecord):
        write_compare_report(first, path)
    else:
        write_sizes_report(first, path)


def results_as(form: str, records: Sequence[AnyRecord]) -> str:
    """A table of the results of records of one kind.

    Args:
        form: csv, latex or markdown.

    Raises:
        RecipeError: There is no such format.
    """
    if form not in FORMATS:
        raise RecipeError(unknown_name("--format", "format", form, FORMATS))
    for record in records:
        declare_direction(record.recipe)
    runs = [record for record in records if isinstance(record, RunRecord)]
    comparisons = [record for record in records if isinstance(record, CompareRecord)]
    sizes = [record for record in records if isinstance(record, SizesRecord)]
    table = runs_table(runs) if runs else compare_table(comparisons) if comparisons else sizes_table(sizes)
    return FORMATS[form](table)


def write_report(records: Sequence[RunRecord], path: str | Path) -> None:
    """Write the page of one run, or of several side by side; a pure function of the records."""
    assert records, "a report needs a record"
    for record in records:
        declare_direction(record.recipe)
    first = records[0]
    several = len(records) > 1
    title = f"{len(records)} runs side by side" if several else first.name
    page = _TEMPLATES.get_template("report.html").render(
        title=title,
        subtitle=", ".join(record.name for record in records) if several else f"{first.task}, {first.created}",
        verdict=_best_run(records),
        side_by_side=_side_by_side(records) if several else None,
        runs=[run_view(record, f"run{index}-" if several else "") for index, record in enumerate(records, start=1)],
        source=RECORD_FILE,
    )
    _write(page, path)


def write_compare_report(record: CompareRecord, path: str | Path) -> None:
    """Write the page of a comparison of methods over seeds; a pure function of the record."""
    declare_direction(record.recipe)
    page = _TEMPLATES.get_template("compare.html").render(source=COMPARISON_FILE, **compare_view(record))
    _write(page, path)


def write_sizes_report(record: SizesRecord, path: str | Path) -> None:
    """Write the page of a recipe at several sizes; a pure function of the record."""
    declare_direction(record.recipe)
    page = _TEMPLATES.get_template("sizes.html").render(source=SIZES_FILE, **size_view(record))
    _write(page, path)


def _write(page: str, path: str | Path) -> None:
    # A lone surrogate out of the data has no UTF-8 form; as a character reference it shows as a replacement sign.
    with written_whole(path) as partial:
        partial.write_bytes(page.encode("utf-8", errors="xmlcharrefreplace"))


def _side_by_side(records: Sequence[RunRecord]) -> dict[str, object]:
    """Tables, a note and charts over all models of several runs, a teacher or baseline that they share once."""
    metrics = list(dict.fromkeys(record.metric for record in records))
    names = distinct_names([record.name for record in records])
    quality: list[Row] = []
    cost: list[Row] = []
    models: list[tuple[ModelRecord, str, str]] = []
    shared: set[tuple[object, ...]] = set()
    for record, name in zip(records, names, strict=True):
        for model in record.models:
            key = (model.role, model.name, model.parameters, model.metrics.get(record.metric))
            if model.role == "student_before" or (model.role != "student" and key in shared):
                continue
            shared.add(key)
            role = ROLES.get(model.role, model.role)
            label = name if model.role == "student" else f"{role} {model.name}"
            quality.append(_side_row(record, model, label, metrics))
            cost.append(Row(label, cost_cells(model), mark=model.role == "student"))
            shown = model_label(model) if model.role == "rival" else role
            models.append((model, name if model.role == "student" else shown, ""))
    charts = [Chart("quality", "Quality against cost", None, "the runs have different main metrics.")]
    if len(metrics) == 1:
        charts = cost_charts(models, metrics[0], "all-")
    data = {record.data.fingerprint for record in records}
    note = (
        "All runs have the same data." if len(data) == 1 else "The runs do NOT have the same data: compare with care."
    )
    metric_definitions = {tuple(definitions(record.problem, [record.metric], record.recipe)) for record in records}
    if len(metrics) == 1 and len(metric_definitions) > 1:
        note += f" Their {metrics[0]} is NOT measured alike: see below the table of each run."
    columns = ["model", *map(metric_heading, metrics), "of the teacher's", "seed", "time of the run"]
    tables = [Table(columns, quality), Table(["model", *COST_COLUMNS], cost)]
    return {"tables": tables, "note": note, "charts": charts}


def _best_run(records: Sequence[RunRecord]) -> Verdict | None:
    """Which student is best, where all runs have one main metric."""
    metric = records[0].metric
    students = [(value, record) for record in records if (value := main_metric(record, "student")) is not None]
    if len(students) < 2 or any(record.metric != metric for record in records):
        return None
    pick = min if metric in LOWER_IS_BETTER else max
    best = pick(students, key=lambda pair: pair[0])[1]
    return Verdict("", best.name, f"has the best {metric_label(metric)} of {len(students)} students. {verdict(best)}")


def _side_row(record: RunRecord, model: ModelRecord, label: str, metrics: Sequence[str]) -> Row:
    """The metrics of one model; of a student also its share of the teacher, its seed and the time of its run."""
    is_student = model.role == "student"
    cells = [
        *(metric_text(model.metrics.get(metric)) for metric in metrics),
        kept_text(record) if is_student else "",
        str(record.seed) if is_student else "",
        duration(sum(record.seconds.values())) if is_student and record.seconds else "",
    ]
    return Row(label, cells, note=record.objective if is_student else "", mark=is_student)
