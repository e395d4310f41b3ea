"""Predictions on disk give every number back; the rows shown are those that tell most."""

import math

import pytest
import torch

from flexkd.data.examples.classification import Example
from flexkd.data.examples.labels import LabelSpace
from flexkd.evaluate.classification import Predictions, agreement, classification_metrics
from flexkd.evaluate.predictions import disagreements, write_predictions
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
