"""The charts of a comparison: methods over seeds, and their paired differences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flexkd.compare_record import CompareRecord
from flexkd.evaluate.learning_curves import CURVE_REFERENCE, curve_metric, mean_curves
from flexkd.facts.metrics import metric_label
from flexkd.record import Number
from flexkd.report.canvas import PALETTE, chart_style, new_chart, short_name, to_svg
from flexkd.report.charts import Line, lines_chart
from flexkd.report.run_charts import Chart

_REFERENCE_ROLE: Final = "ink"
_CURVE_ROLES: Final = ("student", "teacher", "baseline", "task", "before")
"""Colours of the learning curves of methods, in the order of the methods."""


@dataclass(frozen=True)
class _Difference:
    """One row of the chart of differences."""

    label: str
    difference: Number
    low: Number | None
    high: Number | None
    p_text: str


def compare_charts(record: CompareRecord) -> list[Chart]:
    """Every seed of each method, and the differences to the reference."""
    seeds = Chart("seeds", "Every seed", None, f"no cell has a {record.metric} that is defined.")
    if any(cell.metrics.get(record.metric) is not None for cell in record.cells):
        svg = seeds_chart(record, name="seeds")
        seeds = Chart(
            "seeds",
            "Every seed",
            svg,
            "A point is one seed; the upright bar is the mean, the line below it one standard deviation each way.",
        )
    title = _forest_title(record)
    forest = Chart("forest", title, None, "no other method has a difference that is defined.")
    if _differences(record):
        svg = forest_chart(record, name="forest")
        caption = "Line: 95% confidence interval by Student's t. One that crosses 0 may be chance."
        if record.contrasts:
            exploratory = ", exploratory" if record.named_after_results else ""
            caption += f" p: of the exact test, after Holm's correction{exploratory}."
        forest = Chart("forest", title, svg, caption)
    return [seeds, forest, _curves(record)]


def _curves(record: CompareRecord) -> Chart:
    """The mean learning curve of each method on the validation rows, and the range of its seeds."""
    metric = curve_metric(record)
    title = f"Validation {metric_label(metric or record.metric)} while training"
    curves = [] if metric is None else [curve for curve in mean_curves(record, metric) if len(curve.steps) > 1]
    if metric is None or not curves:
        return Chart("curves", title, None, "not every cell has two evaluations or more.")
    lines = [
        Line(curve.method, curve.steps, curve.means, role, role == _REFERENCE_ROLE, (curve.lows, curve.highs))
        for curve, role in zip(curves, _curve_roles(record, [curve.method for curve in curves]), strict=True)
    ]
    height = max(3.5, 1.0 + 0.2 * len(lines))
    y_label = f"validation {metric_label(metric)}"
    svg = lines_chart(lines, x_label="optimizer step", y_label=y_label, name="curves", from_zero=False, height=height)
    return Chart(
        "curves", title, svg, "A line is the mean over seeds, its band the range from the smallest to the largest."
    )


def _curve_roles(record: CompareRecord, methods: Sequence[str]) -> list[str]:
    """A colour for each method: that of the reference, the other ones in turn, and one for all that are left."""
    reference = CURVE_REFERENCE if CURVE_REFERENCE in methods else record.reference
    colours = iter(_CURVE_ROLES)
    return [_REFERENCE_ROLE if method == reference else next(colours, "muted") for method in methods]


def seeds_chart(record: CompareRecord, *, name: str) -> str:
    """One row a method: a point for each seed, and mean and standard deviation beside it."""
    paired = {row.method: row for row in record.paired}
    with chart_style():
        figure, axes = new_chart(height=1.1 + 0.5 * len(record.methods))
        for row, method in enumerate(record.methods):
            metrics = [cell.metrics.get(record.metric) for cell in record.cells if cell.method == method]
            values = [value for value in metrics if value is not None]
            role = "ink" if method == record.reference else "student"
            axes.plot(
                values, [row] * len(values), "o", color=PALETTE[role], alpha=0.55, markersize=7, markeredgewidth=0
            )
            mean, std = paired[method].mean, paired[method].std
            if mean is not None and std is not None:
                axes.plot([mean - std, mean + std], [row + 0.2, row + 0.2], color=PALETTE[role], linewidth=1.6)
            if mean is not None:
                axes.plot([mean, mean], [row - 0.28, row + 0.28], color=PALETTE[role], linewidth=2.2)
                text = f"{mean:.3f}" if std is None else f"{mean:.3f} \u00b1 {std:.3f}"
                _right_text(axes, row, text, role)
        teacher = record.teacher.get(record.metric)
        if teacher is not None:
            axes.axvline(teacher, linestyle=":", color=PALETTE["teacher"], linewidth=1.5)
            axes.text(
                teacher, -0.62, f"teacher {teacher:.3f} ", color=PALETTE["teacher"], ha="right", va="bottom", fontsize=9
            )
        _rows(axes, [short_name(method) for method in record.methods])
        axes.set_xlabel(metric_label(record.metric))
        return to_svg(figure, name, f"{record.metric} of each seed by method")


def _references(record: CompareRecord) -> set[str]:
    """The methods that others are compared with."""
    return {contrast.reference for contrast in record.contrasts} or {record.reference}


def _forest_title(record: CompareRecord) -> str:
    references = _references(record)
    return f"Difference to {references.pop()}" if len(references) == 1 else "Differences of the contrasts"


def _differences(record: CompareRecord) -> list[_Difference]:
    """The differences of all contrasts that are defined; without contrasts those of all methods to the reference."""
    if not record.contrasts:
        return [
            _Difference(short_name(row.method), row.difference, row.low, row.high, _p_text("paired t p", row.p_value))
            for row in record.paired
            if row.method != record.reference and row.difference is not None
        ]
    has_many_references = len(_references(record)) > 1
    rows = []
    for contrast in record.contrasts:
        if contrast.difference is not None:
            against = f"\nagainst {short_name(contrast.reference)}" if has_many_references else ""
            label, p_text = f"{short_name(contrast.method)}{against}", _p_text("p", contrast.holm_p_value)
            rows.append(_Difference(label, contrast.difference, contrast.low, contrast.high, p_text))
    return rows


def _p_text(name: str, p_value: Number | None) -> str:
    return "" if p_value is None else f", {name} = {p_value:.2g}"


def forest_chart(record: CompareRecord, *, name: str) -> str:
    """One row a contrast: its mean paired difference with the interval around it."""
    rows = _differences(record)
    with chart_style():
        figure, axes = new_chart(height=1.1 + 0.5 * len(rows))
        axes.axvline(0, color=PALETTE["muted"], linewidth=1.2)
        for index, row in enumerate(rows):
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [index, index], color=PALETTE["student"], linewidth=2)
            axes.plot(row.difference, index, "o", color=PALETTE["student"], markersize=8)
            _right_text(axes, index, f"{row.difference:+.3f}{row.p_text}", "ink")
        _rows(axes, [row.label for row in rows])
        axes.set_xlabel(f"paired difference in {metric_label(record.metric)}")
        return to_svg(
            figure, name, f"Paired differences in {record.metric} to {', '.join(sorted(_references(record)))}"
        )


def _right_text(axes: Axes, row: int, text: str, role: str) -> None:
    axes.annotate(
        text, xy=(1.02, row), xycoords=("axes fraction", "data"), color=PALETTE[role], va="center", fontsize=9.5
    )


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """The first row on top, one tick a row."""
    axes.set_ylim(len(names) - 0.4, -0.65)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=PALETTE["ink"])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.08)
