"""The page and the table of a recipe at several sizes: its curve, its knee, its figures, and room for 80 columns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexkd.report.page import write_sizes_report
from flexkd.report.size_table import print_sizes
from flexkd.sizes_record import Knee, SizesRecord
from tests.report.records import PLANTS, sizes_record
from tests.report.test_page import Page, assert_sound

ADVICE = "Size 0.35 is the smallest that keeps 95% of the teacher's accuracy: 96.5%, 95% interval 95.3% to 97.7%."
KNEE = "Knee: size 0.2 (4,540,000 parameters). The curves of single seeds have it there in 3 of 3 cases."


def page_of(folder: Path, record: SizesRecord) -> Page:
    write_sizes_report(record, folder / "report.html")
    return Page(folder / "report.html")


def charts(page: Page) -> list[str]:
    return [str(attributes.get("aria-label")) for tag, attributes in page.tags if tag == "svg"]


def test_the_page_shows_the_curve_with_teacher_and_baseline_and_what_each_size_keeps(tmp_path: Path) -> None:
    page = page_of(tmp_path, sizes_record(notes=PLANTS))
    assert_sound(page)
    assert page.words("li") == PLANTS
    assert page.words("p")[:2] == [ADVICE, KNEE]
    size, speed = charts(page)
    points = "0.1: 0.620 at 2.27M; 0.2 (knee): 0.750 at 4.54M; 0.35: 0.772 at 7.95M; 0.5: 0.780 at 11.3M"
    assert size == f"accuracy against parameters. {points}; teacher: 0.800 at 22.7M; most frequent class: 0.484"
    assert "0.2 (knee): 0.750 at 1.13k" in speed
    assert "The ring marks the knee." in page.words("figcaption")[0]
    rows = page.words("tr")
    assert "most frequent class 0.484 60.5%" in rows
    assert "size 0.2 knee 0.750 93.8% 0.740 to 0.760 92.5% to 95.0%" in rows
    assert "size 0.2 4.54M 192 x 2 18.2 MB float32 1,130 n/a 70.0 MB" in rows
    assert "teacher 0.800 100.0%" in rows
    assert "size 0.2 0 0.746 90.0 s sizes/size_0.2-0/student" in rows
    assert "size 0.2 1 0.750 90.0 s" in rows
    assert "The knee is determined by Kneedle (Satopaa et al., 2011; sensitivity 1, no smoothing)" in page.body


def test_without_a_knee_nothing_is_marked(tmp_path: Path) -> None:
    page = page_of(tmp_path, sizes_record({"0.1": 0.70, "0.2": 0.72, "0.35": 0.74, "0.5": 0.76}))
    assert "No knee: the curve bends too little, or the other way." in page.words("p")
    assert not any("ring" in caption for caption in page.words("figcaption"))
    assert not any("knee" in label for label in charts(page))
    assert not any(attributes.get("class") == "mark" for _, attributes in page.tags)


def test_a_baseline_far_below_the_curve_is_named_at_the_edge_of_the_chart(tmp_path: Path) -> None:
    record = sizes_record()
    near = page_of(tmp_path, record)
    assert "\u2193" not in near.source
    far = replace(record.baselines[0], metrics={"accuracy": 0.2})
    page = page_of(tmp_path, replace(record, baselines=[far]))
    assert page.source.count("\u2193 most frequent class 0.200") == 2
    assert all("most frequent class: 0.200" in label for label in charts(page))


def test_a_size_without_a_value_is_left_out_of_the_charts(tmp_path: Path) -> None:
    page = page_of(tmp_path, sizes_record({"0.1": 0.70, "0.2": None}))
    assert "Quality against size: left out, fewer than two sizes have both accuracy and parameters." in page.body
    assert "size 0.2 n/a" in page.words("tr")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_holds_at_80_columns(capsys: Any, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    record = sizes_record()
    large = [replace(r, model=replace(r.model, bytes_on_disk=26_950_000_000)) for r in record.sizes]
    for shown in (record, replace(record, key="hidden_size", sizes=large)):
        print_sizes(shown)
        lines = capsys.readouterr().out.splitlines()
        assert all(len(line) <= width for line in lines)
        assert any(line.split()[:6] == ["0.2", "*", "2", "x", "192", "4.54M"] for line in lines), "no cell is broken"
        assert any(line.split()[:5] == ["teacher", "6", "x", "384", "22.7M"] for line in lines)
    print_sizes(record)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"most frequent class: 0.484 * {KNEE} {ADVICE}" in printed


def test_the_table_says_why_there_is_no_knee(capsys: Any) -> None:
    print_sizes(replace(sizes_record(), knee=Knee(None, "a knee shows from 4 sizes on")))
    printed = capsys.readouterr().out
    assert "\nNo knee: a knee shows from 4 sizes on.\n" in printed
    assert "*" not in printed
