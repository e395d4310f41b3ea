"""The curves of the study over the mismatch: the metric of each method, and the gain of each contrast."""

import io
import statistics
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.plan import Plan
from benchmarks.study.results import Results
from benchmarks.study.rules import contrasts_of, judgements, values_of
from flexkd.report.canvas import chart_style, new_chart

_COLOURS: Final = ("#0e8468", "#c2620e", "#6d5bd0", "#2f6fdb", "#b0306a", "#6b7a1e", "#1b1f24", "#8e98a3")
_MARKERS: Final = "osD^vP*X"
_SHIFT: Final = 0.03
"""Between the points of two curves at one mismatch, as a share of it, so that intervals do not cover each other."""


def metric_plot(plan: Plan, results: Results, name: str) -> str:
    """Mean metric of each method against the mismatch, and the teacher's, as SVG."""
    setting = plan.settings[name]
    with chart_style():
        figure, axes = new_chart(7.2, 4.2)
        for index, method in enumerate(setting.methods):
            by_mismatch = {m: values_of(plan, results, name, m, method, setting.metric) for m in setting.widths}
            points = {m: statistics.fmean(values.values()) for m, values in by_mismatch.items() if values}
            axes.plot(list(points), list(points.values()), label=method, **_look(index))
        teacher = results.settings[name].teacher.get(setting.metric)
        if teacher is not None:
            axes.axhline(teacher, color="#626b76", linestyle="--", linewidth=1, label="teacher")
        return _finished(figure, axes, plan, name, f"{setting.metric} on the test rows")


def gain_plot(plan: Plan, results: Results, name: str) -> str:
    """Mean gain of each contrast against the mismatch with its 95 % interval, as SVG."""
    setting = plan.settings[name]
    judged = judgements(plan, results, name)
    with chart_style():
        figure, axes = new_chart(7.2, 4.2)
        axes.axhline(0, color="#626b76", linewidth=1)
        for index, contrast in enumerate(contrasts_of(plan, name)):
            points = [
                (entry.mismatch * (1 + _SHIFT * index), entry.paired)
                for entry in judged
                if entry.contrast == contrast and entry.paired is not None
            ]
            means = [paired.difference for _, paired in points]
            below = [paired.difference - paired.low for _, paired in points]
            above = [paired.high - paired.difference for _, paired in points]
            axes.errorbar(
                [x for x, _ in points], means, yerr=[below, above], label=contrast.name, capsize=2, **_look(index)
            )
        return _finished(figure, axes, plan, name, f"gain in {setting.metric} (above 0: better)")


def _look(index: int) -> dict[str, Any]:
    """Colour, marker and line of a curve; the second round of colours is dashed."""
    round_, place = divmod(index, len(_COLOURS))
    return {
        "color": _COLOURS[place],
        "marker": _MARKERS[place],
        "markersize": 4.5,
        "linewidth": 1.4,
        "linestyle": "--" if round_ else "-",
    }


def _finished(figure: Figure, axes: Axes, plan: Plan, name: str, label: str) -> str:
    mismatches = list(plan.settings[name].widths)
    axes.set_xscale("log")
    axes.set_xticks(mismatches, [f"d/{mismatch}" for mismatch in mismatches])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("width of the student")
    axes.set_ylabel(label)
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside right upper", fontsize=7.5, frameon=False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
