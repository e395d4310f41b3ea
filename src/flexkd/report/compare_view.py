"""What the page of a comparison shows: its tables, charts and sentences, ready for the template."""

from typing import Final

from flexkd.compare_record import CompareRecord, Contrast, PairedDifference
from flexkd.evaluate.learning_curves import CURVE_REFERENCE, curve_metric, curves_note, steps_to_reference
from flexkd.evaluate.row_contrasts import better_and_worse, row_contrasts_note
from flexkd.evaluate.significance import changed_seeds_text, contrast_notes, seed_notes
from flexkd.facts.metrics import definitions
from flexkd.record import Number, proper_interval
from flexkd.report.compare_charts import compare_charts
from flexkd.report.run_view import recipe_text
from flexkd.report.verdicts import compare_verdict
from flexkd.report.wording import Row, Table, duration, metric_heading, metric_text

_EQUAL: Final = "Where the difference is the same for every seed, no spread is left to estimate an interval from. "


def compare_view(record: CompareRecord) -> dict[str, object]:
    """All values for the template of a comparison."""
    subtitle = ("methods x seeds", record.problem.replace("_", " "), record.created)
    return {
        "title": record.name,
        "subtitle": ", ".join(part for part in subtitle if part),
        "verdict": compare_verdict(record),
        "methods": _methods_table(record),
        "methods_note": _methods_note(record),
        "seeds_words": seed_notes(record),
        "contrasts": _contrasts_table(record),
        "contrasts_words": contrast_notes(record),
        "contrasts_note": _contrasts_note(record),
        "rows": _rows_table(record),
        "rows_note": row_contrasts_note(record),
        "charts": compare_charts(record),
        "steps": _steps_table(record),
        "steps_note": curves_note(record),
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
        "paired t p",
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
    interval = _interval(row.low, row.high)
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
    has_equal = any(row.difference is not None and _interval(row.low, row.high) == "" for row in record.paired)
    return (
        f"Mean and sample standard deviation over seeds {', '.join(map(str, record.seeds))}; difference to "
        f"{record.reference}, paired by seed, with its 95% confidence interval. The p of scipy's paired t-test is not "
        "corrected for the number of methods, and judges none of them. "
        f"{_EQUAL if has_equal else ''}" + " ".join(definitions(record.problem, [record.metric], record.recipe))
    ).rstrip()


def _interval(low: Number | None, high: Number | None) -> str:
    ends = proper_interval(low, high)
    return "" if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}"


def _contrasts_table(record: CompareRecord) -> Table:
    """Every contrast with its tests and the size of its effect."""
    columns = [
        "contrast",
        "reading",
        "difference",
        "95% interval",
        "paired t p",
        "exact p",
        "Holm p",
        "effect size",
        "seeds needed",
    ]
    return Table(columns, [_contrast_row(record, contrast) for contrast in record.contrasts])


def _contrast_row(record: CompareRecord, contrast: Contrast) -> Row:
    """The statistics of two methods; empty where a value of theirs is not defined."""
    is_significant, seeds_needed = record.is_significant(contrast), record.seeds_needed(contrast)
    p_values = (contrast.p_value, contrast.exact_p_value, contrast.holm_p_value)
    chance = "exploratory" if record.named_after_results else "may be chance"
    significant = "significant, seeds changed" if changed_seeds_text(record) else "significant"
    reading = "not defined" if contrast.difference is None else chance
    cells = [
        # First, so that a narrow window cuts off a statistic and not what it says.
        significant if is_significant else reading,
        "" if contrast.difference is None else f"{contrast.difference:+.3f}",
        _interval(contrast.low, contrast.high),
        *("" if value is None else f"{value:.2g}" for value in p_values),
        "" if contrast.effect_size is None else f"{contrast.effect_size:+.2f}",
        "" if seeds_needed is None else f"{seeds_needed:,}",
    ]
    return Row(contrast.method, cells, note=f"against {contrast.reference}", mark=is_significant)


def _contrasts_note(record: CompareRecord) -> str:
    """How the numbers of the contrasts were computed."""
    return (
        "Exact p: share of all patterns of signs of the differences whose mean is as far from 0. Holm p, by which "
        f"alone a contrast is judged: the exact one, corrected for {len(record.contrasts)} contrast"
        f"{'s' * (len(record.contrasts) != 1)}. "
        "Effect size: Cohen's d_z, the mean difference in standard deviations of the differences."
    )


def _rows_table(record: CompareRecord) -> Table:
    """Every pair of methods on the same test rows."""
    columns = ["contrast", *better_and_worse(record), "p over rows", "difference", "95% interval over rows"]
    rows = [
        Row(
            contrast.method,
            [
                f"{contrast.better:,.1f}",
                f"{contrast.worse:,.1f}",
                f"{contrast.p_value:.2g}",
                f"{contrast.difference:+.3f}",
                _interval(contrast.low, contrast.high),
            ],
            note=f"against {contrast.reference}",
        )
        for contrast in record.row_contrasts
    ]
    return Table(columns, rows)


def _steps_table(record: CompareRecord) -> Table:
    """Steps of each method, and of each seed, to the final value of logit KD; without rows where there are none."""
    columns = ["method", f"steps to {CURVE_REFERENCE}'s final {curve_metric(record)}", "seed by seed"]
    rows = [
        Row(
            steps.method,
            [steps.describe(), ", ".join("not reached" if step is None else f"{step:,.0f}" for step in steps.steps)],
        )
        for steps in steps_to_reference(record)
    ]
    return Table(columns, rows)


def _cells_table(record: CompareRecord) -> Table:
    """All metrics of each student."""
    names = list(dict.fromkeys([record.metric, *(name for cell in record.cells for name in cell.metrics)]))
    rows = [
        Row(
            cell.method,
            [
                f"{cell.seed}{', added after results' * (cell.seed in record.late_seeds)}",
                *(metric_text(cell.metrics.get(name)) for name in names),
                duration(cell.seconds),
            ],
        )
        for cell in record.cells
    ]
    return Table(["method", "seed", *map(metric_heading, names), "time"], rows)
