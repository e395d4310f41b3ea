"""A metric is one row: what evaluation computes has one, and everything else is read from it."""

import pytest
import torch

from flexkd.evaluate.classification import agreement, classification_metrics
from flexkd.facts.metrics import (
    CLASSIFIER_PROBLEMS,
    LOWER_IS_BETTER,
    METRIC_FACTS,
    METRIC_NAMES,
    PROBLEMS,
    ROUGE,
    definitions,
    deviations,
)


@pytest.mark.parametrize("problem", CLASSIFIER_PROBLEMS)
def test_what_a_classifier_is_measured_by_are_the_rows_of_its_problem(problem: str) -> None:
    logits = torch.randn(6, 1 if problem == "regression" else 3, generator=torch.Generator().manual_seed(0))
    labels = {"single_label": torch.arange(6) % 3, "multi_label": (logits > 0.1).long(), "regression": logits[:, 0]}
    assert tuple(classification_metrics(logits, labels[problem], problem)) == METRIC_NAMES[problem]
    beside = [row.name for row in METRIC_FACTS if problem in row.problems and not row.is_choice]
    assert list(agreement(logits, logits, problem)) == beside


def test_rows_of_one_name_agree_on_which_way_is_better() -> None:
    better = {(row.name, row.lower_is_better) for row in METRIC_FACTS}
    assert len(better) == len({row.name for row in METRIC_FACTS})
    names = [(row.name, problem) for row in METRIC_FACTS for problem in row.problems]
    assert len(names) == len(set(names))
    assert {problem for _, problem in names} == set(PROBLEMS)
    assert {"calibration_error", "cut_share", "kl", "mse", "nll", "perplexity", "teacher_mse"} == LOWER_IS_BETTER


def test_the_default_metric_of_each_problem_is_its_first_row() -> None:
    assert [names[0] for names in METRIC_NAMES.values()] == ["accuracy", "micro_f1", "pearson", "rougeL"]
    assert ROUGE == ("rougeL", "rouge1", "rouge2", "rougeLsum")


def test_definitions_come_once_each_and_those_of_one_problem_alone_come_first() -> None:
    found = definitions("single_label", METRIC_NAMES["single_label"], {})
    assert [text.split()[0] for text in found] == ["Accuracy", "Matthews", "Nll:", "Calibration"]
    assert [text.split()[0] for text in deviations("single_label", METRIC_NAMES["single_label"], {})] == [
        "Matthews",
        "Nll:",
    ]
    assert [text.split()[0] for text in definitions("generation", METRIC_NAMES["generation"], {})] == ["ROUGE:", "Nll:"]
