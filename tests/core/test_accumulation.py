"""One optimizer step in one micro-batch or in several."""

import itertools

import pytest
import torch

from flexkd.core.losses import LOGIT_LOSSES
from flexkd.core.objective import Objective, StepCounts
from flexkd.core.terms import FeatureTerm, LogitTerm, TaskTerm
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from tests.closeness import assert_close
from tests.core.signals import feature_term, gradients, part_of, signals
from tests.references import correlation as reference
from tests.references.draws import classes

ADDITIVE_FEATURES = [name for name, facts in FEATURE_LOSS_FACTS.items() if not facts.is_statistic]
# Supervised tokens of 16 rows.
LENGTHS = [3, 11, 4, 7, 9, 5, 10, 3, 6, 8, 11, 3, 5, 4, 9, 7]


def additive(name: str) -> Objective:
    """One term that must not change with the split of a step."""
    if name in LOGIT_LOSSES:
        return Objective(logits=LogitTerm(name, temperature=2.0))
    return Objective(TaskTerm(label_smoothing=0.1)) if name == "task" else Objective(features=feature_term(name))


@pytest.mark.parametrize("rows_at_once", [4, 1])
@pytest.mark.parametrize("name", ["task", *sorted(LOGIT_LOSSES), *ADDITIVE_FEATURES])
def test_M03_additive_terms_do_not_change_with_the_split(name: str, rows_at_once: int) -> None:
    student, teacher, labels = signals(sum(LENGTHS))
    objective = additive(name)
    whole = objective(student, teacher, labels)
    loss, start = torch.zeros(()), 0
    for first in range(0, 16, rows_at_once):
        count = sum(LENGTHS[first : first + rows_at_once])
        rows = slice(start, start + count)
        counts = StepCounts(sum(LENGTHS), sum(LENGTHS), count)
        part = objective(part_of(student, rows), part_of(teacher, rows), labels[rows], counts)
        assert part.counts.get("skipped_feature_terms", 0) == 0
        loss, start = loss + part.loss, start + count
    assert_close(loss, whole.loss)
    wanted = gradients(whole.loss, student, objective)
    for actual, expected in zip(gradients(loss, student, objective), wanted, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mse"])
def test_M03_multi_label_and_regression_do_not_change_with_the_split(loss: str) -> None:
    student, teacher, _ = signals(16)
    labels = classes(16, 5, num_classes=2, seed=9).float()
    objective = Objective(TaskTerm(loss), LogitTerm("mse" if loss == "mse" else "forward_kl"))
    whole = objective(student, teacher, labels)
    parts = [
        objective(part_of(student, rows), part_of(teacher, rows), labels[rows], StepCounts(16, 16, 1))
        for rows in (slice(row, row + 1) for row in range(16))
    ]
    assert_close(torch.stack([part.loss for part in parts]).sum(), whole.loss)


def test_F04_a_correlation_is_a_statistic_of_its_micro_batch_weighed_by_its_positions() -> None:
    student, teacher, labels = signals(73)
    objective = Objective(features=FeatureTerm())
    bounds = [0, 32, 64, 73]
    pieces = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    parts = [
        objective(
            part_of(student, rows), part_of(teacher, rows), labels[rows], StepCounts(73, 73, rows.stop - rows.start)
        )
        for rows in pieces
    ]
    expected = sum(
        (rows.stop - rows.start)
        / 73
        * reference.correlation(student.features[0].detach()[rows], teacher.features[0][rows]).mean()
        for rows in pieces
    )
    assert_close(sum(part.loss for part in parts), torch.tensor(expected).float())
    whole = objective(student, teacher, labels).loss.detach()
    assert abs(float(whole) - expected) > 1e-3


def test_F02_positions_of_other_processes_and_not_of_other_micro_batches_count() -> None:
    student, teacher, labels = signals(8)
    objective = Objective(features=FeatureTerm())
    rows = slice(0, 5)
    few = objective(part_of(student, rows), part_of(teacher, rows), labels[rows], StepCounts(40, 40, 5))
    assert few.counts["skipped_feature_terms"] == 1
    enough = objective(part_of(student, rows), part_of(teacher, rows), labels[rows], StepCounts(40, 40, 8))
    assert "skipped_feature_terms" not in enough.counts
