"""Intervals over test rows: of all rows a metric is the metric, few rows leave doubt, and pairs are drawn together."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional

from flexkd.evaluate.answers import Question, judged_answers
from flexkd.evaluate.classification import Predictions, classification_metrics
from flexkd.evaluate.generation import Answer
from flexkd.evaluate.likelihood import RowLikelihood
from flexkd.tasks.intervals import classifier_intervals, classifier_terms, text_intervals, text_terms

NO_SUMS = {"calibration_error", "spearman"}


def predictions(problem: str, seed: int, rows: int = 300) -> Predictions:
    """Predictions that are right more often than not; one of the four classes never occurs."""
    labels = torch.arange(rows) % 3
    noise = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    logits = noise + 1.5 * functional.one_hot(labels, 4)
    if problem == "multi_label":
        labels, logits = functional.one_hot(labels, 4).float(), logits - 0.8
    elif problem == "regression":
        labels, logits = labels.float(), noise[:, :1] + labels[:, None]
    return Predictions(tuple(map(str, range(rows))), logits, labels)


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_a_metric_of_sums_is_the_metric_and_lies_in_its_interval(problem):
    teacher, student = predictions(problem, 0), predictions(problem, 1)
    for metric, value in classification_metrics(student.logits, student.labels, problem).items():
        intervals = classifier_intervals({"teacher": teacher, "student": student}, problem, metric)
        assert (intervals is None) == (metric in NO_SUMS), metric
        if intervals is None:
            continue
        low, high = intervals.models["student"]
        assert low < value < high
        assert high - low < 0.4
        terms = classifier_terms(student, problem, metric)
        if terms is not None:
            assert float(terms.value(terms.terms.sum(0))) == pytest.approx(value, rel=1e-9)


def test_the_interval_of_an_accuracy_is_that_of_a_proportion():
    student = predictions("single_label", 1)
    right = int((student.logits.argmax(-1) == student.labels).sum())
    intervals = classifier_intervals({"teacher": student, "student": student}, "single_label", "accuracy")
    assert intervals is not None
    wilson = stats.binomtest(right, len(student.ids)).proportion_ci(method="wilson")
    assert intervals.models["student"] == pytest.approx([wilson.low, wilson.high], abs=0.01)


def test_models_that_agree_on_few_rows_are_not_sure_to_agree():
    few = predictions("single_label", 1, rows=58)
    shares = [
        classifier_intervals({"teacher": part, "student": part}, "single_label", "accuracy").share
        for part in (few, predictions("single_label", 1, rows=5800))
    ]
    assert shares[0][0] < 0.97
    assert shares[0][1] > 1.03
    assert shares[1] == pytest.approx([1, 1], abs=0.001)


def test_rows_without_a_label_do_not_count_and_undefined_outputs_have_no_interval():
    teacher, student = predictions("single_label", 0), predictions("single_label", 1)
    labels = torch.where(torch.arange(300) < 100, -100, student.labels)
    fewer = [Predictions(part.ids, part.logits, labels) for part in (teacher, student)]
    for metric in ("accuracy", "macro_f1"):
        intervals = classifier_intervals(dict(zip(("teacher", "student"), fewer, strict=True)), "single_label", metric)
        assert intervals is not None
        assert intervals.rows == 200
    broken = Predictions(student.ids, torch.full_like(student.logits, math.nan), student.labels)
    assert classifier_intervals({"teacher": teacher, "student": broken}, "single_label", "macro_f1") is None


def answers(scale: float, limit: int = 60):
    questions = [Question(str(row), "ask", ("one two three",)) for row in range(60)]
    said = [Answer(str(row), ["one", "one two", "four"][row % 3], 2, False) for row in range(limit)]
    likelihood = [RowLikelihood(str(row), 1 + row % 4, scale * (1 + row % 4), row % 2, 0.1) for row in range(60)]
    return judged_answers(questions, {0: said}, likelihood)


def test_texts_count_by_row_or_by_token_and_models_that_answer_fewer_rows_have_none():
    results = {"teacher": answers(1.0), "student": answers(2.0), "student_before": answers(2.0, limit=20)}
    for metric in ("rougeL", "nll", "perplexity", "token_agreement"):
        intervals = text_intervals(results, metric)
        assert intervals is not None
        assert intervals.rows == 60
        assert ("student_before" in intervals.models) == (metric != "rougeL")
        terms = text_terms(results["student"], metric)
        value = results["student"].metrics()[metric]
        assert float(terms.value(terms.terms.sum(0))) == pytest.approx(value)
        low, high = intervals.models["student"]
        assert low - 1e-9 <= value <= high + 1e-9
    assert text_intervals(results, "a_metric_of_the_user") is None
    assert np.diff(text_intervals(results, "nll").models["student"]) == pytest.approx(0, abs=1e-9)
