"""Class by class on the page: figures, matrices that hold two and forty classes, rows both have wrong, intervals."""

import dataclasses

import pytest

from flexkd.record import RunRecord
from flexkd.report.card import model_card
from flexkd.report.verdicts import verdict
from flexkd.report.wording import kept
from tests.report.records import PLANTS, judged_record, run_record
from tests.report.test_page import NO_CURVES, assert_sound, page_of


def test_two_classes_have_their_figures_and_a_matrix_of_counts(tmp_path):
    record = judged_record(**NO_CURVES)
    record.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == record
    page = page_of(tmp_path, record)
    assert_sound(page)
    rows = page.words("tr")
    assert "F1 precision recall" in rows
    assert "class rows teacher student change teacher student teacher student" in rows
    assert "negative 40 0.800 0.759 -0.041 0.800 0.769 0.800 0.750" in rows
    assert rows.count("label negative positive") == 2, "teacher and student"
    assert {"negative 32 8", "negative 30 10", "positive 9 31"} <= set(rows)
    assert "Most frequent confusions" not in page.words("h3"), "of two classes the matrix says it"
    assert "student after student-name 0.760 0.731 to 0.788 0.123 0.520" in rows
    assert "Scroll the table sideways to see all of its 9 columns" in page.words("p")
    card = model_card(record)
    assert "| student after | 0.7600 | 0.731 to 0.788 | 0.1234 |" in card
    for text in (page.body, card):
        assert "95% intervals of accuracy over 859 test rows" in text


def test_forty_classes_are_shades_and_what_is_confused_most(tmp_path):
    page = page_of(tmp_path, judged_record(40, **NO_CURVES))
    assert_sound(page)
    assert "The 12 of 40 classes whose F1 falls most." in page.body
    assert "All 40 classes" in page.words("summary")
    rows = page.words("tr")
    assert rows.count(f"label {' '.join(str(number) for number in range(1, 41))}") == 2
    assert "3 class 2" in rows, "its row of the matrix has a shade in place of a number"
    assert page.source.count('<td class="hit" style="--share: 80%" title="32"></td>') == 40
    assert "negative positive 8 10" in rows
    assert page.words("h3").count("Most frequent confusions") == 1


def test_more_classes_than_fit_leave_the_matrix_out(tmp_path):
    page = page_of(tmp_path, judged_record(61, **NO_CURVES))
    assert "Confusion matrices: left out, 61 classes do not fit on a page." in page.words("p")
    assert page.count("table") < 12


def test_rows_are_lost_gained_or_wrong_in_both(tmp_path):
    page = page_of(tmp_path, judged_record(**NO_CURVES))
    headings = page.words("h3")
    start = headings.index("Lost: the teacher is right, the student wrong (87 of 859 rows)")
    assert headings[start + 1 : start + 3] == [
        "Both wrong (119 of 859 rows): hard rows, or wrong labels",
        "Different answers to rows without a label",
    ]
    assert "label negative teacher positive 97% student positive 93%" in page.words("div")


def test_names_of_classes_stay_text(tmp_path):
    record = judged_record(3, **NO_CURVES)
    classes = [dataclasses.replace(entry, name=plant) for entry, plant in zip(record.classes, PLANTS, strict=True)]
    page = page_of(tmp_path, dataclasses.replace(record, classes=classes))
    assert_sound(page)
    assert page.words("th").count(PLANTS[0]) == 6, "two tables, and row and column of two matrices"


def kept_over(rows: int, share: list[float], ends: list[float]) -> RunRecord:
    intervals = judged_record().intervals
    assert intervals is not None
    models = [dataclasses.replace(entry, metrics={"accuracy": 0.8}) for entry in run_record().models]
    return judged_record(
        models=models, intervals=dataclasses.replace(intervals, rows=rows, share=share, difference=ends), **NO_CURVES
    )


@pytest.mark.parametrize(
    ("rows", "share", "sentence"),
    [
        (58, [0.96, 1.04], "58 test rows are too few to say which share of the teacher's accuracy the student keeps"),
        (300, [0.85, 1.15], "300 test rows are too few to say which share"),
        (300, [0.93, 1.07], "The student keeps 100% of the teacher's accuracy (95% interval 93% to 107%; 0.800"),
        (9000, [0.985, 1.015], "The student keeps 100.0% of the teacher's accuracy (95% interval 98.5% to 101.5%;"),
        (9000, [], "The student reaches accuracy 0.800 against the teacher's 0.800 (difference: 95% interval -0.02"),
    ],
)
def test_the_headline_says_no_more_than_its_rows(tmp_path, rows, share, sentence):
    record = kept_over(rows, share, [-0.02, 0.02])
    if not share:
        record = dataclasses.replace(
            record, metric="nll", models=[dataclasses.replace(entry, metrics={"nll": 0.8}) for entry in record.models]
        )
        sentence = sentence.replace("accuracy", "nll")
    assert str(verdict(record)).startswith(sentence)
    page = page_of(tmp_path, record)
    assert sentence in " ".join(page.words("p"))
    assert sentence in model_card(record)
    tile = page.words("b")[0]
    share_of = kept(record)
    assert ("%" in tile) == (share_of is not None and not share_of.rows_are_few)
