"""Predictions on disk give every number back; the rows shown are those that tell most."""

import math

import pytest
import torch
from torch.nn import functional

from flexkd.data.examples.classification import Example
from flexkd.data.examples.labels import LabelSpace
from flexkd.evaluate.classification import Predictions, agreement, classification_metrics
from flexkd.evaluate.predictions import (
    both_wrong,
    class_records,
    confusion_counts,
    disagreements,
    outcomes,
    write_predictions,
)
from tests.evaluate.stored import stored_predictions


def predictions(problem: str, seed: int, rows: int = 12) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    labels = {
        "single_label": torch.where(torch.arange(rows) % 5 == 4, -100, torch.arange(rows) % 3),
        "multi_label": (torch.arange(rows * 3).reshape(rows, 3) % 4 == 0).float(),
        "regression": torch.arange(rows).float() / 7,
    }[problem]
    if problem != "single_label":
        labels[2] = math.nan
    logits = torch.randn(rows, 1 if problem == "regression" else 3, generator=generator)
    return Predictions(tuple(f"row {number}\u2028\U0001f600" for number in range(rows)), logits, labels)


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_invariant_8_every_number_is_recomputed_from_the_saved_predictions(tmp_path, problem):
    teacher, student = predictions(problem, 0), predictions(problem, 1)
    path = tmp_path / "run" / "predictions.jsonl"
    write_predictions(path, {"teacher": teacher, "student": student})
    back = stored_predictions(path)

    assert [file.name for file in path.parent.iterdir()] == ["predictions.jsonl"]
    for name, one in (("teacher", teacher), ("student", student)):
        assert back[name].ids == one.ids
        assert torch.equal(back[name].logits, one.logits)
        assert back[name].labels.dtype == one.labels.dtype
        assert torch.equal(back[name].labels.nan_to_num(-1), one.labels.nan_to_num(-1))
        expected = classification_metrics(one.logits, one.labels, problem)
        assert classification_metrics(back[name].logits, back[name].labels, problem) == expected
    expected = agreement(student.logits, teacher.logits, problem)
    assert agreement(back["student"].logits, back["teacher"].logits, problem) == expected


def test_E13_a_logit_that_is_not_finite_becomes_null(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, {"student": Predictions(("a",), torch.tensor([[math.nan, 1.0]]), torch.tensor([0]))})
    assert path.read_text(encoding="utf-8") == '{"id": "a", "label": 0, "logits": {"student": [null, 1.0]}}\n'
    assert stored_predictions(path)["student"].logits[0, 0].isnan()


# ---- rows on which two models differ

SPACE = LabelSpace("single_label", ("no", "yes"))


def answers(yes: dict[str, float]) -> Predictions:
    """Two-class predictions with a given probability of "yes"."""
    logits = torch.tensor([[0.0, math.log(p / (1 - p))] for p in yes.values()])
    return Predictions(tuple(yes), logits, torch.zeros(len(yes), dtype=torch.long))


def test_teacher_right_comes_first_by_the_gap_then_student_right():
    examples = [
        Example(id_, (f"text {id_}",), label) for id_, label in zip("abcdef", [1, 1, 0, 0, 1, None], strict=True)
    ]
    teacher = answers({"a": 0.7, "b": 0.9, "c": 0.8, "d": 0.6, "e": 0.9, "f": 0.9})
    student = answers({"a": 0.4, "b": 0.2, "c": 0.1, "d": 0.4, "e": 0.8, "f": 0.1})
    found = disagreements(examples, teacher, student, SPACE, limit=10)

    assert [one.id for one in found] == ["b", "a", "c", "d", "f"]
    assert found[0].texts == ["text b"]
    assert (found[0].label, found[0].teacher, found[0].student) == ("yes", "yes", "no")
    assert found[0].teacher_confidence == pytest.approx(0.9)
    assert found[0].student_confidence == pytest.approx(0.8)
    assert found[-1].label is None


@pytest.mark.parametrize(("limit", "ids"), [(0, ""), (1, "b"), (2, "bc"), (3, "bac"), (4, "bacd"), (5, "bacdf")])
def test_the_places_are_shared(limit, ids):
    examples = [Example(id_, ("t",), label) for id_, label in zip("abcdf", [1, 1, 0, 0, None], strict=True)]
    teacher = answers({"a": 0.7, "b": 0.9, "c": 0.8, "d": 0.6, "f": 0.9})
    student = answers({"a": 0.4, "b": 0.2, "c": 0.1, "d": 0.4, "f": 0.1})
    # The student's predictions may come in another order.
    student = Predictions(student.ids[::-1], student.logits.flip(0), student.labels)
    assert "".join(one.id for one in disagreements(examples, teacher, student, SPACE, limit=limit)) == ids


def test_several_labels_are_named_together():
    space = LabelSpace("multi_label", ("x", "y"))
    example = Example("a", ("one", "two"), (1.0, 0.0))
    teacher = Predictions(("a",), torch.tensor([[3.0, -3.0]]), torch.zeros(1, 2))
    student = Predictions(("a",), torch.tensor([[-3.0, -3.0]]), torch.zeros(1, 2))
    (found,) = disagreements([example], teacher, student, space, limit=3)
    assert (found.label, found.teacher, found.student) == ("x", "x", "(none)")
    assert found.texts == ["one", "two"]
    assert found.teacher_confidence == pytest.approx(1 / (1 + math.exp(-3)))


def test_regression_shows_values_and_no_confidence():
    space = LabelSpace("regression", ("score",))
    examples = [Example("a", ("t",), 1.0), Example("b", ("t",), 4.0)]
    teacher = Predictions(("a", "b"), torch.tensor([[1.1], [2.0]]), torch.zeros(2))
    student = Predictions(("a", "b"), torch.tensor([[2.5], [3.9]]), torch.zeros(2))
    first, second = disagreements(examples, teacher, student, space, limit=3)
    assert (first.label, first.teacher, first.student) == ("1.00", "1.10", "2.50")
    assert first.teacher_confidence is None
    assert second.id == "b"


def test_rows_that_both_have_wrong_come_by_how_sure_the_two_are():
    examples = [Example(id_, ("t",), label) for id_, label in zip("abcde", [0, 0, 1, 0, 0], strict=True)]
    labels = torch.tensor([0, 0, 1, -100, 0])
    teacher = answers({"a": 0.6, "b": 0.9, "c": 0.1, "d": 0.9, "e": 0.2})
    student = answers({"a": 0.7, "b": 0.8, "c": 0.2, "d": 0.9, "e": 0.8})
    teacher, student = (Predictions(part.ids, part.logits, labels) for part in (teacher, student))
    rows = both_wrong(examples, teacher, student, SPACE, limit=2)
    assert [(row.id, row.label, row.teacher) for row in rows] == [("b", "no", "yes"), ("c", "yes", "no")]
    assert rows[0].teacher_confidence == pytest.approx(0.9)
    counts = outcomes(teacher, student, "single_label")
    assert counts == {"both_right": 0, "lost": 1, "gained": 0, "both_wrong": 3}


def test_figures_of_classes_are_those_of_the_counts():
    space = LabelSpace("single_label", ("a", "b", "c", "never"))
    labels = torch.tensor([0, 0, 0, 1, 1, 2, -100])
    said = functional.one_hot(torch.tensor([0, 0, 1, 1, 1, 1, 3]), 4).float()
    student = Predictions(tuple("1234567"), said, labels)
    records = class_records({"student": student}, space)
    figures = [
        (entry.support, *(part["student"] for part in (entry.precision, entry.recall, entry.f1))) for entry in records
    ]
    assert figures[0] == (3, 1.0, pytest.approx(2 / 3), 0.8)
    assert figures[1] == (2, 0.5, 1.0, pytest.approx(2 / 3))
    assert figures[2] == (1, None, 0.0, 0.0)
    assert figures[3] == (0, None, None, None)
    assert confusion_counts(student, space) == [[0, 0, 2], [0, 1, 1], [1, 1, 2], [2, 1, 1]]


def test_one_label_among_several_is_a_decision_and_no_binary_problem():
    space = LabelSpace("multi_label", ("x",))
    student = Predictions(("a", "b"), torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [0.0]]))
    (entry,) = class_records({"student": student}, space)
    assert (entry.support, entry.precision["student"], entry.recall["student"]) == (1, 0.5, 1.0)
    assert confusion_counts(student, space) == []
    assert outcomes(student, student, "multi_label") == {"both_right": 1, "lost": 0, "gained": 0, "both_wrong": 1}
