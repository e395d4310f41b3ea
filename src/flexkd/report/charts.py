"""The kinds of chart: plain numbers in, SVG for an HTML page out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator

from flexkd.record import Number
from flexkd.report.canvas import PALETTE, chart_style, new_chart, place_labels, short_name, spread_labels, to_svg
from flexkd.report.wording import compact

_MOST_POINTS: Final = 200
_MOST_NAMES: Final = 6
_LOG_RATIO: Final = 30.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Point:
    """One model.

    Attributes:
        role: A colour of the palette.
        after: Label of the point where this model started.
        interval: Of y.
        ring: Whether a ring around the point marks it.
    """

    label: str
    x: Number
    y: Number
    role: str
    after: str | None = None
    interval: tuple[Number, Number] | None = None
    ring: bool = False


@dataclass(frozen=True)
class Line:
    """One curve; `role` is a colour of the palette, a `strong` one is drawn thicker, `band` is its range at each x."""

    label: str
    x: Sequence[Number]
    y: Sequence[Number]
    role: str
    strong: bool = False
    band: tuple[Sequence[Number], Sequence[Number]] | None = None


def quality_chart(
    points: Sequence[Point], *, x_label: str, y_label: str, name: str, levels: Sequence[tuple[str, Number]] = ()
) -> str:
    """Quality over size or speed: one labelled point a model, an arrow from where a student started.

    Args:
        points: Models with a cost.
        x_label: Name of the cost.
        y_label: Name of the quality.
        name: Unique on the page; ids inside the SVG start with it.
        levels: Names and qualities of baselines that cost nothing, drawn as dotted lines.
    """
    with chart_style():
        figure, axes = new_chart(height=max(3.5, 1.0 + 0.2 * len(points)))
        xs, ys = [point.x for point in points], [*(point.y for point in points), *(level for _, level in levels)]
        _show_costs(axes, xs, x_label)
        _show_qualities(axes, min(ys), max(ys), y_label)
        texts = [_level(axes, f"{short_name(text)} {level:.3f}", level, xs) for text, level in levels]
        by_label = {point.label: point for point in points}
        for point in points:
            start = by_label.get(point.after or "")
            if start is not None:
                _arrow(axes, (start.x, start.y), (point.x, point.y))
        for point in points:
            _draw_point(axes, point)
        _name_points(axes, points, texts, [level for _, level in levels])
        return to_svg(figure, name, _described(points, levels, x_label, y_label))


def curve_chart(
    curve: Sequence[Point],
    others: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    name: str,
    levels: Sequence[tuple[str, Number]] = (),
    goal: tuple[str, Number] | None = None,
) -> str:
    """Quality over size or speed along one curve.

    The axis of quality shows the curve and the other points: where levels lie far from them, a note at the edge says.

    Args:
        curve: Points that are joined by a line, in their order.
        others: Points beside it, such as the teacher.
        x_label: Name of the cost.
        y_label: Name of the quality.
        name: Unique on the page; ids inside the SVG start with it.
        levels: Names and qualities of baselines that cost nothing, drawn as dotted lines.
        goal: Name and quality of what is wanted, drawn as a dotted line in the colour of the teacher.
    """
    points = [*curve, *others]
    ys = [y for point in points for y in (point.y, *(point.interval or ()))] + ([] if goal is None else [goal[1]])
    span = max(max(ys) - min(ys), 1e-3)
    near = [level for _, level in levels if min(ys) - span <= level <= max(ys) + span]
    with chart_style():
        figure, axes = new_chart()
        xs = [point.x for point in points]
        _show_costs(axes, xs, x_label)
        _show_qualities(axes, min([*ys, *near]), max([*ys, *near]), y_label)
        texts = []
        for text, level in levels:
            words = f"{short_name(text)} {level:.3f}"
            is_near = level in near
            texts.append(_level(axes, words, level, xs) if is_near else _edge_note(axes, words, level < min(ys)))
        if goal is not None:
            texts.append(_level(axes, f"{goal[0]} {goal[1]:.3f}", goal[1], xs, role="teacher", at_edge=True))
        axes.plot(xs[: len(curve)], [point.y for point in curve], color=PALETTE["student"], linewidth=1.6)
        for point in points:
            _draw_point(axes, point)
        lines = near if goal is None else [*near, goal[1]]
        _name_points(axes, points, texts, lines, curve)
        return to_svg(figure, name, _described(points, levels, x_label, y_label))


def _show_costs(axes: Axes, xs: Sequence[Number], x_label: str) -> None:
    """The axis of costs, from 0 on or logarithmic."""
    if min(xs) > 0 and max(xs) / min(xs) > _LOG_RATIO:
        axes.set_xscale("log")
        axes.set_xlim(min(xs) / 2, max(xs) * 2)
    else:
        axes.set_xlim(0, max(xs) * 1.18)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_xlabel(x_label)


def _show_qualities(axes: Axes, low: Number, high: Number, y_label: str) -> None:
    """The axis of qualities, with room for labels."""
    margin = max((high - low) * 0.22, abs(high) * 0.02, 1e-3)
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel(y_label)


def _described(points: Sequence[Point], levels: Sequence[tuple[str, Number]], x_label: str, y_label: str) -> str:
    """The figures of a chart for a screen reader."""
    described = [f"{point.label}: {point.y:.3f} at {compact(point.x)}" for point in points]
    described += [f"{text}: {level:.3f}" for text, level in levels]
    return f"{y_label} against {x_label}. {'; '.join(described)}"


def _draw_point(axes: Axes, point: Point) -> None:
    """Draw a point, its interval, and the ring around it."""
    colour = PALETTE[point.role]
    axes.plot(point.x, point.y, "o", color=colour, markersize=9, clip_on=False)
    if point.interval is not None:
        axes.plot([point.x, point.x], point.interval, color=colour, linewidth=1.2, alpha=0.6)
    if point.ring:
        axes.plot(point.x, point.y, "o", color=colour, markersize=14, markerfacecolor="none", markeredgewidth=2)


def _level(
    axes: Axes, text: str, level: Number, xs: Sequence[Number], *, role: str = "baseline", at_edge: bool = False
) -> Annotation:
    """Draw a dotted line; its name, which is returned, stands in the widest gap between the points, or at the right."""
    axes.axhline(level, linestyle=":", color=PALETTE[role], linewidth=1.4, zorder=1)
    places = axes.transAxes.inverted().transform(axes.transData.transform([(x, level) for x in xs]))
    edges = np.sort([0.0, *places[:, 0], 1.0])
    widest = int(np.diff(edges).argmax())
    at = (0.995 if at_edge else float(edges[widest : widest + 2].mean()), level)
    return axes.annotate(
        text, xy=at, xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
        color=PALETTE[role], fontsize=9, ha="right" if at_edge else "center", va="bottom",
    )  # fmt: skip


def _edge_note(axes: Axes, text: str, is_below: bool) -> Annotation:
    """Say at the lower or the upper edge what lies far beyond it."""
    return axes.annotate(
        f"{chr(0x2193 if is_below else 0x2191)} {text}", xy=(0.995, 0.0 if is_below else 1.0),
        xycoords="axes fraction", xytext=(0, 3 if is_below else -3), textcoords="offset points",
        color=PALETTE["baseline"], fontsize=9, ha="right", va="bottom" if is_below else "top",
    )  # fmt: skip


def _name_points(
    axes: Axes,
    points: Sequence[Point],
    texts: Sequence[Annotation],
    levels: Sequence[Number],
    curve: Sequence[Point] = (),
) -> None:
    """Write a name beside each point; many names stand in a column at the right, with thin lines to the points."""
    crowded = len(points) > _MOST_NAMES
    # The values of a curve are read off its axis.
    names = [short_name(point.label) + ("" if curve else f" {point.y:.3f}") for point in points]
    labels = [
        _label(axes, text, (point.x, point.y), point.role, leader=crowded)
        for text, point in zip(names, points, strict=True)
    ]
    if crowded:
        spread_labels(axes, labels)
        return
    starts = {point.label: point for point in points}
    obstacles = [(point.x, point.y) for point in points]
    if curve:
        obstacles += _along(Line("", [point.x for point in curve], [point.y for point in curve], "student"))
    for point in points:
        if point.after in starts:
            start = starts[point.after]
            obstacles += zip(np.linspace(start.x, point.x, 20), np.linspace(start.y, point.y, 20), strict=True)
        if point.interval is not None:
            obstacles += [(point.x, float(y)) for y in np.linspace(*point.interval, 20)]
    place_labels(axes, labels, obstacles, texts, levels)


def _arrow(axes: Axes, start: tuple[Number, Number], end: tuple[Number, Number]) -> None:
    style = {"arrowstyle": "-|>", "color": PALETTE["before"], "shrinkA": 7, "shrinkB": 7, "linewidth": 1.2}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def _label(
    axes: Axes, text: str, at: tuple[Number, Number], role: str, weight: str = "normal", *, leader: bool = False
) -> Annotation:
    """A label to be placed: beside its point, or with a leader in the column right of the axes."""
    return axes.annotate(
        text,
        xy=at,
        xytext=(1.04, 0.5) if leader else (8, 0),
        textcoords="axes fraction" if leader else "offset points",
        color=PALETTE[role],
        va="center",
        fontsize=9.5,
        fontweight=weight,
        annotation_clip=False,
        arrowprops=_leader(role) if leader else None,
    )


def _leader(role: str) -> dict[str, object]:
    """A thin line that ends at the left edge of its label."""
    return {"arrowstyle": "-", "color": PALETTE[role], "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 2}


def lines_chart(
    lines: Sequence[Line], *, x_label: str, y_label: str, name: str, from_zero: bool = True, height: float = 3.5
) -> str:
    """Curves with their names at their right ends; long ones are shown as means of neighbouring points.

    Args:
        from_zero: The axis of values begins at 0, unless values are below it or the axis is logarithmic.
        height: Inches.
    """
    with chart_style():
        figure, axes = new_chart(height=height)
        labels = []
        for line in lines:
            if line.band is not None:
                axes.fill_between(line.x, *line.band, color=PALETTE[line.role], alpha=0.12, linewidth=0)
            x, y = _thinned(line.x, line.y)
            axes.plot(x, y, color=PALETTE[line.role], linewidth=2.4 if line.strong else 1.7, zorder=3 - line.strong)
            labels.append(
                _label(axes, short_name(line.label), (x[-1], y[-1]), line.role, "bold" if line.strong else "normal")
            )
        values = [value for line in lines for value in line.y]
        if min(values) > 0 and max(values) / min(values) > _LOG_RATIO:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        elif from_zero and min(values) >= 0:
            axes.set_ylim(bottom=0)
        axes.set(xlabel=x_label, ylabel=y_label)
        _step_axis(axes)
        spread_labels(axes, labels)
        described = "; ".join(f"{line.label} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines)
        return to_svg(figure, name, f"{y_label} against {x_label}. {described}")


def _step_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _thinned(x: Sequence[Number], y: Sequence[Number]) -> tuple[list[Number], list[Number]]:
    """At most 200 points, each the mean of neighbouring ones."""
    if len(x) <= _MOST_POINTS:
        return list(x), list(y)
    parts = zip(
        np.array_split(np.asarray(x, float), _MOST_POINTS),
        np.array_split(np.asarray(y, float), _MOST_POINTS),
        strict=True,
    )
    means = [(float(xs.mean()), float(ys.mean())) for xs, ys in parts]
    return [mean[0] for mean in means], [mean[1] for mean in means]


def best_chart(line: Line, best: int, *, y_label: str, name: str) -> str:
    """A metric over training steps; a ring marks the best checkpoint, which is the one that was kept."""
    with chart_style():
        figure, axes = new_chart()
        colour = PALETTE[line.role]
        axes.plot(line.x, line.y, "-o", color=colour, markersize=4, linewidth=1.7)
        at = (line.x[best], line.y[best])
        axes.plot(*at, "o", color=colour, markersize=11, markerfacecolor="none", markeredgewidth=2)
        low, high = min(line.y), max(line.y)
        margin = max((high - low) * 0.25, 1e-3)
        axes.set_ylim(low - margin, high + margin)
        axes.margins(x=0.06)
        axes.set(xlabel="optimizer step", ylabel=y_label)
        _step_axis(axes)
        text = f"best {line.y[best]:.3f} at step {line.x[best]:,.0f}"
        place_labels(axes, [_label(axes, text, at, "ink", "bold")], _along(line))
        return to_svg(figure, name, f"{y_label} over training: {text}")


def _along(line: Line) -> list[tuple[Number, Number]]:
    """Points along the whole polyline, so that no label lies on it."""
    count = 12 * len(line.x)
    places = np.linspace(0, len(line.x) - 1, count)
    index = np.arange(len(line.x))
    return list(zip(np.interp(places, index, line.x).tolist(), np.interp(places, index, line.y).tolist(), strict=True))


def coverage_chart(values: Sequence[Number], units: Sequence[int], *, name: str, of: str = "units") -> str:
    """Share of the total score that the n best units hold; marked are the selected units or, without any, 90 %.

    Args:
        values: One score each.
        units: Those that were selected.
        name: Of the chart.
        of: What has a score, in the plural.
    """
    scores = np.asarray(values, float)
    shares = np.concatenate([[0.0], np.cumsum(np.sort(scores)[::-1])]) / scores.sum() * 100
    count = len(units) or int(np.searchsorted(shares, 90 - 1e-9))
    share = float(scores[list(units)].sum() / scores.sum() * 100) if units else float(shares[count])
    with chart_style():
        figure, axes = new_chart()
        axes.plot(range(len(shares)), shares, color=PALETTE["ink"])
        axes.set_xlim(0, len(scores))
        axes.set_ylim(0, 104)
        axes.plot([count, count], [0, share], ":", color=PALETTE["student"], linewidth=1.4)
        axes.plot([0, count], [share, share], ":", color=PALETTE["student"], linewidth=1.4)
        axes.plot(count, share, "o", color=PALETTE["student"], markersize=9, clip_on=False)
        axes.set(xlabel=f"number of teacher {of}, best first", ylabel="share of the total score (%)")
        text = f"{count} {'chosen' if units else 'best'} {of}\nhold {share:.0f}%"
        curve = list(enumerate(shares.tolist()))[:: max(1, len(shares) // 60)]
        place_labels(axes, [_label(axes, text, (count, share), "student", "bold")], curve)
        return to_svg(figure, name, f"Cumulative share of the score: {text}".replace("\n", " "))


def scores_chart(values: Sequence[Number], units: Sequence[int], *, y_label: str, name: str, of: str = "units") -> str:
    """Scores of all units, or of what `of` names, in descending order; the selected ones in colour."""
    scores = np.asarray(values, float)
    order = np.argsort(-scores, kind="stable")
    is_selected = np.isin(order, list(units))
    groups = min(len(scores), 2 * _MOST_POINTS)
    heights = np.array([part.mean() for part in np.array_split(scores[order], groups)])
    shares = np.array([part.mean() for part in np.array_split(is_selected.astype(float), groups)])
    edges = np.linspace(0, len(scores), groups + 1)
    with chart_style():
        figure, axes = new_chart()
        axes.stairs(heights, edges, fill=True, color=PALETTE["before"], alpha=0.55, linewidth=0)
        axes.stairs(heights * shares, edges, fill=True, color=PALETTE["student"], linewidth=0)
        axes.set_xlim(0, len(scores))
        axes.set_ylim(0, float(scores.max()) * 1.08)
        axes.set(xlabel=f"teacher {of.removesuffix('s')}, by descending score", ylabel=y_label)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        keys = [(f"{len(units)} chosen", "student"), (f"{len(scores) - len(units)} not chosen", "before")]
        for index, (text, role) in enumerate(keys if units else []):
            axes.text(
                0.98, 0.96 - 0.1 * index, text, color=PALETTE[role], transform=axes.transAxes, ha="right", va="top"
            )
        return to_svg(figure, name, f"Sorted scores of {len(scores)} {of}, {len(units)} of them chosen")
