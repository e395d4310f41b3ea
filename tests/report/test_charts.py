"""Charts are well-formed SVG with readable labels, in the page's colours, and the same bytes every time."""

import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from flexkd.report import charts, compare_charts
from flexkd.report.canvas import PALETTE, chart_style, new_chart, place_labels, short_name, spread_labels
from flexkd.report.charts import Line, Point
from tests.report.records import compare_record

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in parsed(svg).iter(f"{SVG}text")]


def quality(points: list[Point], name: str = "q") -> str:
    return charts.quality_chart(points, x_label="parameters", y_label="accuracy", name=name)


POINTS = [
    Point("teacher $x_1$ <&>", 22.7e6, 0.841, "teacher"),
    Point("before", 7.3e6, 0.5, "before"),
    Point("\u4eca\u5929", 7.3e6, 0.803, "student", after="before"),
]


def every_chart() -> dict[str, str]:
    line = Line("total", [0, 10, 20], [3.0, 2.0, 1.0], "ink", strong=True)
    return {
        "quality": quality(POINTS, "quality"),
        "lines": charts.lines_chart([line], x_label="optimizer step", y_label="loss", name="lines"),
        "best": charts.best_chart(line, 2, y_label="accuracy", name="best"),
        "coverage": charts.coverage_chart([1.0, 4.0, 2.0, 3.0, 0.0], [1, 3], name="coverage"),
        "scores": charts.scores_chart([1.0, 4.0, 2.0, 3.0, 0.0], [1, 3], y_label="score", name="scores"),
        "band": charts.lines_chart(
            [Line("units", [0, 10], [2.5, 1.5], "student", band=([2, 1], [3, 2]))],
            x_label="optimizer step",
            y_label="nll",
            name="band",
            from_zero=False,
        ),
        "seeds": compare_charts.seeds_chart(compare_record(), name="seeds"),
        "forest": compare_charts.forest_chart(compare_record(), name="forest"),
    }


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    return every_chart()


def test_every_chart_is_svg_for_a_page(drawn):
    for name, svg in drawn.items():
        root = parsed(svg)
        assert root.get("viewBox"), name
        assert root.get("role") == "img", name
        assert len(root.get("aria-label")) > 15, name
        assert "width" not in root.attrib, f"{name}: a fixed width does not fit a phone"
        ids = [node.get("id") for node in root.iter() if node.get("id")]
        assert len(ids) == len(set(ids)), f"{name}: an id stands twice"
        assert all(identifier.startswith(f"{name}-") for identifier in ids), name
        used = re.findall(r'(?:url\(|href=")#([^)"]+)', svg)
        assert set(used) <= set(ids), f"{name}: refers to an id that is not there"
        assert not re.search("|".join(PALETTE.values()), svg), f"{name}: a fixed colour ignores dark mode"
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= {*PALETTE, "font"}, name
        assert "<metadata" not in svg, name
        assert "<style" not in svg, name


def test_the_same_numbers_give_the_same_bytes(drawn):
    assert every_chart() == drawn


def test_names_are_text_not_markup_nor_mathematics():
    svg = quality(POINTS)
    assert "teacher $x_1$ <&> 0.841" in texts(svg)
    assert "\u4eca\u5929 0.803" in texts(svg)
    assert parsed(svg).get("aria-label").startswith("accuracy against parameters. teacher $x_1$ <&>: 0.841 at 22.7M")


def test_axes_are_named_and_counts_are_short():
    words = texts(quality(POINTS))
    assert {"parameters", "accuracy", "0", "10M", "20M"} <= set(words)


@pytest.mark.parametrize(("largest", "logarithmic"), [(2.9e8, False), (3.1e8, True)])
def test_a_wide_range_of_sizes_gets_a_logarithmic_axis(largest, logarithmic):
    words = texts(quality([Point("a", 1e7, 0.8, "student"), Point("b", largest, 0.9, "teacher")]))
    assert ("0" not in words) == logarithmic
    assert ("100M" in words) == ("10M" in words) == logarithmic or not logarithmic


def boxes(axes, labels):
    axes.figure.draw_without_rendering()
    return [label.get_window_extent(axes.figure.canvas.get_renderer()) for label in labels]


def assert_apart(extents) -> None:
    for first, second in itertools.combinations(extents, 2):
        assert first.x1 <= second.x0 or second.x1 <= first.x0 or first.y1 <= second.y0 or second.y1 <= first.y0


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_near_points_do_not_cover_each_other_or_a_point(seed):
    generator = np.random.default_rng(seed)
    points = [(1 + 0.4 * x, 1 + 0.4 * y) for x, y in generator.uniform(size=(6, 2))]
    with chart_style():
        _, axes = new_chart()
        axes.set(xlim=(0, 2), ylim=(0, 2))
        labels = [
            axes.annotate(f"model {i} 0.8", at, xytext=(8, 0), textcoords="offset points")
            for i, at in enumerate(points)
        ]
        place_labels(axes, labels, points)
        extents = boxes(axes, labels)
        assert_apart(extents)
        assert not any(box.contains(*axes.transData.transform(point)) for box in extents for point in points)
        frame = axes.get_window_extent()
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 for box in extents)


def test_a_line_across_the_axes_runs_through_no_label():
    with chart_style():
        figure, axes = new_chart()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        place = {"textcoords": "offset points", "xytext": (0, 0), "fontsize": 9}
        labels = [axes.annotate(f"student {x}", (x, 0.5), **place) for x in (0.1, 0.5, 0.9)]
        place_labels(axes, labels, [], levels=[0.5])
        line = axes.transData.transform((0, 0.5))[1]
        for label in labels:
            box = label.get_window_extent(figure.canvas.get_renderer())
            assert not box.y0 <= line <= box.y1


@pytest.mark.parametrize("ends", [[0.5] * 5, [0.0, 0.01, 0.02, 1.0], [0.99, 1.0, 1.0, 0.98], [0.3]])
def test_labels_at_the_ends_of_lines_keep_apart_and_in_order(ends):
    with chart_style():
        _, axes = new_chart()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        labels = [
            axes.annotate(f"term {i}", (1, y), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9.5)
            for i, y in enumerate(ends)
        ]
        spread_labels(axes, labels)
        extents = boxes(axes, labels)
        assert_apart(extents)
        middles = [(box.y0 + box.y1) / 2 for box in extents]
        assert [y for _, y in sorted(zip(middles, ends, strict=True))] == sorted(ends)
        assert max(middles) <= axes.get_window_extent().y1 + 1


def test_many_models_are_named_in_a_column():
    points = [Point(f"model {number}", 7e6, 0.8 + number / 1e4, "baseline") for number in range(12)]
    svg = quality(points)
    named = [node for node in parsed(svg).iter(f"{SVG}text") if "".join(node.itertext()).startswith("model ")]
    assert len(named) == 12
    assert len({node.get("x") for node in named}) == 1
    heights = sorted(float(node.get("y")) for node in named)
    assert min(np.diff(heights)) > 12


def test_lines_end_in_their_names_and_long_ones_are_means_of_neighbours():
    steps = list(range(1, 20_001))
    values = [float(step) for step in steps]
    x, y = charts._thinned(steps, values)
    assert len(x) == len(y) == 200
    assert np.mean(y) == pytest.approx(np.mean(values))
    assert y == x

    svg = charts.lines_chart([Line("logits", steps, values, "teacher")], x_label="step", y_label="loss", name="l")
    assert "logits" in texts(svg)
    assert len(svg) < 40_000


@pytest.mark.parametrize(("top", "logarithmic"), [(29.0, False), (31.0, True)])
def test_losses_far_apart_get_a_logarithmic_axis(top, logarithmic):
    svg = charts.lines_chart([Line("a", [5, 6], [1.0, top], "task")], x_label="step", y_label="loss", name="l")
    assert ("0" in texts(svg)) != logarithmic


def test_the_best_evaluation_is_named():
    line = Line("accuracy", [100, 200, 1300], [0.7, 0.71, 0.805], "student")
    assert "best 0.805 at step 1,300" in texts(charts.best_chart(line, 2, y_label="accuracy", name="b"))


def test_the_coverage_curve_says_what_the_chosen_units_hold():
    words = texts(charts.coverage_chart([1.0, 4.0, 2.0, 3.0, 0.0], [1, 3], name="c"))
    assert {"2 chosen units", "hold 70%", "number of teacher units, best first"} <= set(words)
    # Chosen by chance they hold less than the curve at the same number.
    assert "hold 10%" in texts(charts.coverage_chart([1.0, 4.0, 2.0, 3.0, 0.0], [0, 4], name="c"))


def test_without_chosen_units_the_curve_marks_90_percent():
    assert {"3 best units", "hold 90%"} <= set(texts(charts.coverage_chart([1.0, 4.0, 2.0, 3.0, 0.0], [], name="c")))


def test_sorted_scores_name_chosen_and_other_units():
    assert {"2 chosen", "3 not chosen"} <= set(
        texts(charts.scores_chart([1.0, 4.0, 2.0, 3.0, 0.0], [1, 3], y_label="score", name="s"))
    )
    words = texts(charts.scores_chart([1.0, 2.0], [], y_label="score (mean |gradient|)", name="s"))
    assert "score (mean |gradient|)" in words
    assert not any("chosen" in text for text in words)


def test_seeds_and_differences_show_every_method_with_its_numbers():
    seeds = texts(compare_charts.seeds_chart(compare_record(), name="s"))
    assert {"plain", "logits", "units", "0.760 \u00b1 0.014", "teacher 0.800 "} <= {*seeds, *(f"{t} " for t in seeds)}
    forest = texts(compare_charts.forest_chart(compare_record(), name="f"))
    assert {"logits", "units", "+0.060, paired t p = 0.03", "paired difference in accuracy"} <= set(forest)
    assert "plain" not in forest


def test_a_long_name_keeps_its_two_ends():
    assert short_name("a" * 30 + "-end-12345") == "a" * 13 + "..." + "-end-12345"
    assert short_name("tab\there\x00") == "tab?here?"
    assert short_name("short") == "short"


def test_charts_leave_no_open_figure_and_need_no_display_or_torch():
    code = (
        "import sys, flexkd; assert 'matplotlib' not in sys.modules, 'import flexkd is not light'\n"
        "import flexkd.report.page\n"
        "heavy = [name for name in ('torch', 'transformers', 'matplotlib.pyplot') if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
