"""The pictures of a study: the metric of each method, and the gain of each contrast, a panel for each mismatch."""

import io
import statistics
from collections.abc import Sequence
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure

from benchmarks.study.plan import Plan
from benchmarks.study.results import Results
from benchmarks.study.rules import contrasts_of, judgements, values_of
from flexkd.facts.names import VALIDATION_PREFIX
from flexkd.report.canvas import chart_style, new_chart

_COLOUR: Final = "#0e8468"
_GREY: Final = "#626b76"
_LINEAR: Final = 0.05
"""Gains of this size are drawn to scale; larger ones, as of a random cut, by their logarithm."""
_TICKS: Final = (-10, -1, -0.2, -0.05, 0, 0.05, 0.2, 1, 10)
_REACH: Final = 4.0
_PANEL: Final = 2.4
_LABELS: Final = 2.6
_ROW: Final = 0.24
"""Inches: of a panel's width, of the names beside it, of a row's height."""


def metric_plot(plan: Plan, results: Results, name: str) -> str:
    """Mean metric of each method and its standard deviation over the seeds, and the teacher's, as SVG."""
    setting = plan.settings[name]
    teacher = results.settings[name].teacher.get(setting.metric)
    with chart_style():
        figure, panels = _panels(list(setting.widths), list(setting.methods))
        for axes, mismatch in zip(panels, setting.widths, strict=True):
            by_row = {
                row: list(values_of(plan, results, name, mismatch, method, setting.metric).values())
                for row, method in enumerate(setting.methods)
            }
            means = {row: statistics.fmean(values) for row, values in by_row.items() if values}
            edge = _edge(list(means.values()), setting.sign)
            for row, mean in means.items():
                if setting.sign * (mean - edge) < 0:
                    _draw_beyond(axes, edge, row, mean, setting.sign)
                else:
                    spread = statistics.stdev(by_row[row]) if len(by_row[row]) > 1 else 0.0
                    axes.errorbar(mean, row, xerr=spread, **_look())
            if teacher is not None:
                axes.axvline(teacher, color=_GREY, linestyle="--", linewidth=1)
        rows = "validation" if setting.metric.startswith(VALIDATION_PREFIX) else "test"
        direction = "smaller" if setting.sign < 0 else "larger"
        metric = setting.metric.removeprefix(VALIDATION_PREFIX)
        dashed = "" if teacher is None else " (dashed: teacher)"
        figure.supxlabel(
            f"{metric} on the {rows} rows, {direction} is better{dashed}; arrows: beyond the edge", fontsize=8.5
        )
        return _svg(figure, name)


def _edge(means: Sequence[float], sign: int) -> float:
    """The worst value that is drawn to scale: four times as far from the best one as the median is."""
    if not means:
        return 0.0
    best, median = (max if sign > 0 else min)(means), statistics.median(means)
    return best + _REACH * (median - best)


def _draw_beyond(axes: Any, edge: float, row: int, mean: float, sign: int) -> None:
    """A value that is much worse than the others, as an arrow and a number at the edge."""
    axes.plot(edge, row, color=_GREY, marker="<" if sign > 0 else ">", markersize=4)
    axes.annotate(
        f"{mean:.3g}", (edge, row), xytext=(5 * sign, 0), textcoords="offset points", color=_GREY, fontsize=7,
        ha="left" if sign > 0 else "right", va="center",
    )  # fmt: skip


def gain_plot(plan: Plan, results: Results, name: str) -> str:
    """Mean gain of each contrast with its 95 % interval, as SVG."""
    setting, contrasts = plan.settings[name], contrasts_of(plan, name)
    judged = {(entry.contrast.name, entry.mismatch): entry.paired for entry in judgements(plan, results, name)}
    with chart_style():
        figure, panels = _panels(list(setting.widths), [contrast.name for contrast in contrasts])
        for axes, mismatch in zip(panels, setting.widths, strict=True):
            axes.axvline(0, color=_GREY, linewidth=1)
            axes.set_xscale("symlog", linthresh=_LINEAR)
            for row, contrast in enumerate(contrasts):
                paired = judged[contrast.name, mismatch]
                if paired is not None:
                    # A gain that is the same for every seed has no interval.
                    ends = [paired.difference if end is None else end for end in (paired.low, paired.high)]
                    error = [[paired.difference - ends[0]], [ends[1] - paired.difference]]
                    axes.errorbar(paired.difference, row, xerr=error, **_look())
            low, high = axes.get_xlim()
            ticks = [tick for tick in _TICKS if low <= tick <= high]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
        figure.supxlabel(f"gain in {setting.metric}, above 0 is better", fontsize=8.5)
        return _svg(figure, name)


def _panels(mismatches: Sequence[int], names: Sequence[str]) -> tuple[Figure, list[Any]]:
    """A figure with a panel for each mismatch, whose rows have these names."""
    figure, axes = new_chart(_LABELS + _PANEL * len(mismatches), 1.2 + _ROW * len(names))
    axes.remove()
    panels = list(figure.subplots(1, len(mismatches), sharey=True, squeeze=False)[0])
    for panel, mismatch in zip(panels, mismatches, strict=True):
        panel.set_title(f"d/{mismatch}", fontsize=9)
        panel.set_yticks(range(len(names)), names, fontsize=7.5)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.tick_params(axis="x", labelsize=7.5)
        panel.grid(axis="y", linewidth=0.4)
    return figure, panels


def _look() -> dict[str, Any]:
    return {"color": _COLOUR, "marker": "o", "markersize": 4, "linewidth": 1.3, "capsize": 2}


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
