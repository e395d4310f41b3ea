"""The pictures of the concept pages, drawn from made-up states by the functions that a run calls."""

import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Final

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from flexkd.core.geometry import class_geometry, leading_directions
from flexkd.core.scores import label_target
from flexkd.core.selection import coverage_curve, pair_units, select_units, units_for_coverage
from flexkd.report.canvas import PALETTE, chart_style
from website.links import DOCS

FOLDER: Final = DOCS / "images" / "concepts"
_MARKED, _PLAIN = PALETTE["student"], "#c9ced6"


def scores_picture() -> Figure:
    """Scores of the units of a made-up head, and the share that the best of them hold."""
    generator = torch.Generator().manual_seed(4)
    head = (
        torch.randn(5, 24, generator=generator) * torch.linspace(2.2, 0.15, 24)[torch.randperm(24, generator=generator)]
    )
    states = torch.randn(400, 24, generator=generator, requires_grad=True)
    labels = (states @ head.T).argmax(-1).detach()
    (gradient,) = torch.autograd.grad(label_target(states @ head.T, labels).sum(), states)
    scores = gradient.abs().mean(0).double()
    best, num_covering = set(select_units(scores, 8).tolist()), units_for_coverage(scores, 0.9)

    figure, (bars, curve) = _panels(2)
    bars.bar(range(24), scores.tolist(), color=[_MARKED if unit in best else _PLAIN for unit in range(24)])
    bars.set(xlabel="unit of the teacher", ylabel="mean |d log p(label) / d h|", title="Scores; the best 8 of 24")
    shares = [0.0, *coverage_curve(scores).tolist()]
    curve.plot(range(25), shares, color=PALETTE["teacher"])
    curve.axhline(0.9, color=PALETTE["muted"], linewidth=0.8, linestyle=":")
    curve.plot([num_covering], [shares[num_covering]], "o", color=PALETTE["teacher"])
    curve.annotate(
        f"{num_covering} units hold 90 %", (num_covering, shares[num_covering]), (11.5, 0.55), color=PALETTE["ink"]
    )
    curve.set(xlabel="the best k units", ylabel="share of the score", title="Coverage", ylim=(0, 1.03), xlim=(0, 24))
    return figure


def cut_picture() -> Figure:
    """States of two dimensions, and the one direction that each choice of a cut keeps."""
    generator = torch.Generator().manual_seed(1)
    turned = torch.tensor([[0.94, -0.34], [0.34, 0.94]])
    states = (torch.randn(500, 2, generator=generator) * torch.tensor([2.2, 0.75])) @ turned.T
    head = torch.tensor([[0.0, 0.0], [0.35, 1.35]])
    moment = (states.T @ states / len(states)).double()
    form = class_geometry(states @ head.T, head.expand(len(states), 2, 2)) / len(states)

    figure, (axes,) = _panels(1, height=3.9, width=6.4)
    classes = (states @ head.T).argmax(-1)
    for label, colour, name in ((0, "#b9c6da", "one class"), (1, "#e6c3a5", "the other")):
        axes.plot(*states[classes == label].T.tolist(), ".", color=colour, markersize=4, label=name)
    mixed = moment / moment.trace() + form / form.trace()
    arrows = (
        ("variance", moment, PALETTE["task"]),
        ("function", form, PALETTE["baseline"]),
        ("mixed", mixed, PALETTE["student"]),
    )
    for name, matrix, colour in arrows:
        x, y = (leading_directions(matrix, 1)[:, 0] * 2.7).tolist()
        axes.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2.6})
        axes.text(1.3 * x, 1.15 * y, name, color=colour, fontsize=12, fontweight="bold", ha="center", va="center")
    axes.set(xlabel="unit 1", ylabel="unit 2", xlim=(-5.5, 5.5), ylim=(-3.4, 3.6), aspect="equal")
    axes.legend(loc="lower right", frameon=False)
    return figure


def target_picture() -> Figure:
    """Four student units and six of a teacher, paired in each of the three ways."""
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(64, 6, generator=generator)
    units, scores = torch.tensor([0, 2, 3, 5]), torch.tensor([0.5, 0.1, 0.9, 0.7, 0.2, 0.8], dtype=torch.float64)
    student = teacher[:, [5, 3, 0, 2]] + 0.6 * torch.randn(64, 4, generator=generator)
    titles = {"index": "index: by number", "score": "score: the best first", "matched": "matched: by likeness"}

    figure, panels = _panels(3, height=3.0)
    for axes, (mapping, title) in zip(panels, titles.items(), strict=True):
        pairs = pair_units(
            units, 4, mapping=mapping, scores=scores, student_states=student, teacher_states=teacher[:, units]
        )
        for own, theirs in zip(pairs.student.tolist(), pairs.teacher.tolist(), strict=True):
            axes.plot([0, 1], [-own - 1, -theirs], color=PALETTE["muted"], linewidth=1.4, zorder=1)
        _dots(axes, 0, [-unit - 1 for unit in range(4)], range(4), [PALETTE["student"]] * 4)
        colours = [PALETTE["teacher"] if unit in units.tolist() else _PLAIN for unit in range(6)]
        _dots(axes, 1, [-unit for unit in range(6)], range(6), colours)
        axes.set(title=title, xlim=(-0.35, 1.35), ylim=(-5.7, 1.0))
        axes.text(0, 0.55, "student", ha="center", color=PALETTE["student"])
        axes.text(1, 0.55, "teacher", ha="center", color=PALETTE["teacher"])
        axes.axis("off")
    return figure


def objective_picture() -> Figure:
    """The way of a row through both models into the three terms."""
    figure, (axes,) = _panels(1, height=3.3, width=8.6)
    axes.set(xlim=(0, 10.2), ylim=(0, 4))
    axes.axis("off")
    _box(axes, (0.1, 1.55), 1.3, 0.9, "row", PALETTE["muted"])
    _box(axes, (2.1, 2.7), 1.7, 0.9, "teacher", PALETTE["teacher"])
    _box(axes, (2.1, 0.4), 1.7, 0.9, "student", PALETTE["student"])
    terms = (
        ("features", "states", 3.15, PALETTE["ink"]),
        ("logits", "predictions", 2.0, PALETTE["ink"]),
        ("task", "predictions and labels", 0.85, PALETTE["ink"]),
    )
    for start, end in (((1.4, 2.2), (2.1, 3.0)), ((1.4, 1.8), (2.1, 1.0))):
        _arrow(axes, start, end)
    for name, what, middle, colour in terms:
        _box(axes, (5.3, middle - 0.42), 2.3, 0.84, f"{name}\n{what}", colour, size=10)
        _arrow(axes, (3.8, 0.85), (5.3, middle))
        if name != "task":
            _arrow(axes, (3.8, 3.15), (5.3, middle))
        _arrow(axes, (7.6, middle), (8.75, 2.0))
        side = 0.22 if middle >= 2 else -0.3
        axes.text(7.75, middle + (2.0 - middle) * 0.25 + side, "x weight", fontsize=8, color=PALETTE["muted"])
    _box(axes, (8.75, 1.58), 1.35, 0.84, "sum", PALETTE["task"])
    return figure


def temperature_picture() -> Figure:
    """One distribution at three temperatures."""
    logits = torch.tensor([5.0, 3.6, 3.1, 1.9, 1.2, 0.4, -0.5, -1.4])
    figure, panels = _panels(3, height=2.5)
    for axes, temperature in zip(panels, (1, 2, 4), strict=True):
        axes.bar(range(8), (logits / temperature).softmax(-1).tolist(), color=PALETTE["teacher"])
        axes.set(title=f"temperature {temperature}", ylim=(0, 0.8), xticks=[], xlabel="words")
    panels[0].set_ylabel("probability")
    return figure


PICTURES: Final[dict[str, Callable[[], Figure]]] = {
    "scores": scores_picture,
    "cut": cut_picture,
    "target": target_picture,
    "objective": objective_picture,
    "temperature": temperature_picture,
}


def draw(name: str) -> str:
    """A picture as SVG, the same text for the same drawing."""
    buffer = StringIO()
    with chart_style(), matplotlib.rc_context({"svg.hashsalt": name, "font.family": "sans-serif"}):
        PICTURES[name]().savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    return re.sub(r"<metadata>.*?</metadata>\n?", "", text, flags=re.DOTALL)


def _panels(count: int, *, height: float = 3.2, width: float = 8.6) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, count, index + 1) for index in range(count)]


def _dots(axes: Axes, x: float, heights: Sequence[float], names: Sequence[int], colours: Sequence[str]) -> None:
    axes.scatter([x] * len(heights), heights, s=230, c=colours, zorder=2)
    for height, name in zip(heights, names, strict=True):
        axes.text(x, height, str(name), ha="center", va="center", color="white", fontsize=9, zorder=3)


def _box(
    axes: Axes, corner: tuple[float, float], width: float, height: float, text: str, colour: str, size: int = 11
) -> None:
    shape = FancyBboxPatch(
        corner, width, height, boxstyle="round,pad=0,rounding_size=0.12", facecolor="white", edgecolor=colour
    )
    axes.add_patch(shape)
    axes.text(
        corner[0] + width / 2, corner[1] + height / 2, text, ha="center", va="center", fontsize=size, color=colour
    )


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=PALETTE["muted"], linewidth=1)
    )


def main() -> None:
    """Draw all pictures into the documents."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        (FOLDER / f"{name}.svg").write_text(draw(name), encoding="utf-8")


if __name__ == "__main__":
    main()
