"""Empty charts in the style of the report, labels that do not overlap, and figures as SVG for a page."""

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox, BboxBase

from flexkd.record import Number

PALETTE: Final = {
    "ink": "#1b1f24",
    "muted": "#626b76",
    "line": "#dfe3e8",
    "teacher": "#6d5bd0",
    "student": "#0e8468",
    "before": "#8e98a3",
    "baseline": "#c2620e",
    "rival": "#b3367f",
    "task": "#2f6fdb",
}
"""Colours by role. The SVG names them (`var(--student)`), so that the page's light and dark style decide."""

_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # real text: searchable, small, in the reader's own font
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": PALETTE["muted"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALETTE["line"],
    "grid.linewidth": 0.8,
    "text.color": PALETTE["ink"],
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_LABEL_GAP: Final = 13.0  # points between the middles of two labels that stand in a column
_OFFSETS: Final = tuple(
    (dx * reach, dy * reach)
    for reach in (1.0, 1.8, 2.8, 4.0)
    for dx, dy in ((8, 0), (-8, 0), (0, 11), (0, -11), (7, 9), (-7, 9), (7, -9), (-7, -9))
)


@contextmanager
def chart_style() -> Iterator[None]:
    """Style of the report for the charts that are drawn in the block; matplotlib's settings return after it."""
    with matplotlib.rc_context(rc=_STYLE), warnings.catch_warnings():
        # A name in a script that DejaVu lacks: the reader's browser has a font for it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_chart(width: float = 5.4, height: float = 3.5) -> tuple[Figure, Axes]:
    """Figure and axes, sizes in inches; made without pyplot, so that no figure stays open."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as SVG for the body of an HTML page: the same bytes for the same drawing.

    Args:
        figure: A drawn chart.
        name: Unique on the page; ids inside the SVG start with it.
        description: Text for a screen reader.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'url\(#|xlink:href="#', lambda match: f"{match[0]}{name}-", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would hold for the whole page
    text = re.sub(r'style="[^"]*"', _with_page_style, text)
    opening = re.match(r"<svg[^>]*>", text)
    assert opening is not None
    view_box = re.search(r'viewBox="[^"]*"', opening[0])
    assert view_box is not None
    label = html.escape(description, quote=True)
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {view_box[0]} role="img" aria-label="{label}">'
    return head + text[opening.end() :].strip() + "\n"


def _with_page_style(match: re.Match[str]) -> str:
    """A style attribute with the page's font and colours in place of the chart's."""
    style = match[0].replace("'DejaVu Sans'", "var(--font)")
    for role, colour in PALETTE.items():
        style = style.replace(colour, f"var(--{role})")
    return style


def short_name(text: str, limit: int = 26) -> str:
    """A name for a chart: printable, and of a long one both ends, where names differ."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= limit else f"{text[: limit - 13]}...{text[-10:]}"


def spread_labels(axes: Axes, labels: Sequence[Annotation]) -> None:
    """Move labels in a column, right of their points, up and down until none covers another."""
    figure = _figure(axes)
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    targets = [axes.transData.transform(label.xy)[1] * scale for label in labels]
    order = sorted(range(len(labels)), key=targets.__getitem__)
    box = axes.get_window_extent()
    placed: list[float] = []
    for index in order:
        placed.append(max(targets[index], placed[-1] + _LABEL_GAP if placed else targets[index]))
    excess = max(0.0, placed[-1] - box.y1 * scale) if placed else 0.0
    # What sticks out above goes down again, each label only as far as the one above it pushes.
    for position in range(len(placed) - 1, -1, -1):
        ceiling = placed[position + 1] - _LABEL_GAP if position + 1 < len(placed) else placed[position] - excess
        placed[position] = min(placed[position], ceiling)
    for position, index in enumerate(order):
        label = labels[index]
        x = label.get_position()[0]
        in_axes = (placed[position] - box.y0 * scale) / (box.height * scale)
        label.set_position((x, in_axes if label.arrow_patch else placed[position] - targets[index]))


def place_labels(
    axes: Axes,
    labels: Sequence[Annotation],
    obstacles: Sequence[tuple[Number, Number]],
    texts: Sequence[Annotation] = (),
    levels: Sequence[Number] = (),
) -> None:
    """Put each label beside its point, inside the axes, on no other label and on no point.

    Args:
        axes: With its final limits.
        labels: Annotations in offset points.
        obstacles: Points in data coordinates that must stay visible.
        texts: Labels that have their place.
        levels: Heights of lines across the axes that should not run through a label, in data coordinates.
    """
    figure = _figure(axes)
    for label in labels:
        label.set_in_layout(False)
    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    pixels = figure.dpi / 72
    occupied = [_around(axes.transData.transform(point).tolist(), 6 * pixels) for point in obstacles]
    occupied += [text.get_window_extent(figure.canvas.get_renderer()) for text in texts]  # type: ignore[attr-defined]
    for level in levels:
        height = axes.transData.transform((axes.get_xlim()[1], level))[1]
        occupied.append(Bbox([[inside.x0, height - 2 * pixels], [inside.x1, height + 2 * pixels]]))
    for label in labels:
        best: tuple[float, tuple[float, float], Bbox] | None = None
        for offset in _OFFSETS:
            _put(label, offset)
            # The reader's font may be wider than the one that is measured here.
            box = label.get_window_extent(figure.canvas.get_renderer()).padded(2 * pixels)  # type: ignore[attr-defined]
            covered = sum(_overlap(box, other) for other in occupied) + 4 * _outside(box, inside)
            if best is None or covered < best[0]:
                best = (covered, offset, box)
            if covered == 0:
                break
        assert best is not None
        _put(label, best[1])
        occupied.append(best[2])


def _put(label: Annotation, offset: tuple[float, float]) -> None:
    """Set a label at an offset from its point, in points, aligned on the side of the point."""
    label.set_position(offset)
    label.set_horizontalalignment("left" if offset[0] > 0 else "right" if offset[0] < 0 else "center")
    label.set_verticalalignment("bottom" if offset[1] > 0 else "top" if offset[1] < 0 else "center")


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _around(point: list[float], radius: float) -> Bbox:
    """The square around a point."""
    x, y = point
    return Bbox([[x - radius, y - radius], [x + radius, y + radius]])


def _overlap(first: BboxBase, second: BboxBase) -> float:
    """The area that two boxes share, in pixels."""
    common = Bbox.intersection(first, second)
    return 0.0 if common is None else common.width * common.height


def _outside(box: BboxBase, frame: BboxBase) -> float:
    """The area of a box outside a frame, in pixels."""
    return box.width * box.height - _overlap(box, frame)
