"""Metrics against hand-made values and second derivations; predictions that leave the model as it was."""

import logging
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.dummy import DummyClassifier
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from flexkd.errors import RecipeError, ShapeError
from flexkd.evaluate.classification import (
    agreement,
    calibration_error,
    classification_metrics,
    constant_outputs,
    labelled,
    predict,
    undefined_metrics_expected,
)
from flexkd.facts.metrics import CLASSIFIER_PROBLEMS, METRIC_NAMES


def random_logits(rows: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * 2


# ---- single label


def test_single_label_metrics_by_hand():
    # Confusion (label, prediction): (0, 0) x 2, (0, 1), (1, 1), (2, 2): accuracy 4/5; F1 4/5, 2/3, 1.
    predicted = [0, 0, 1, 1, 2]
    logits = torch.full((5, 3), -10.0)
    logits[range(5), predicted] = 10.0
    found = classification_metrics(logits, torch.tensor([0, 0, 0, 1, 2]), "single_label")

    assert tuple(found) == METRIC_NAMES["single_label"]
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3 + 1) / 3)
    # Gorodkin's R_K: (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)) with c = 4, s = 5, t = 311, p = 221.
    assert found["matthews_correlation"] == pytest.approx((20 - 9) / math.sqrt((25 - 9) * (25 - 11)))
    assert found["calibration_error"] == pytest.approx(0.2, abs=1e-6)
    assert found["nll"] == pytest.approx(20 / 5, abs=1e-6)


def test_nll_is_torch_cross_entropy():
    logits, labels = random_logits(50, 4), torch.arange(50) % 4
    expected = nn.functional.cross_entropy(logits.double(), labels)
    assert classification_metrics(logits, labels, "single_label")["nll"] == pytest.approx(float(expected))


def loop_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    """Guo et al. 2017, eq. 2 and 3, written as they stand there."""
    total = 0.0
    for bin_ in range(1, bins + 1):
        members = [i for i in range(len(confidence)) if (bin_ - 1) / bins < confidence[i] <= bin_ / bins]
        if members:
            accuracy = sum(bool(correct[i]) for i in members) / len(members)
            mean_confidence = sum(float(confidence[i]) for i in members) / len(members)
            total += len(members) / len(confidence) * abs(accuracy - mean_confidence)
    return total


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_error_is_the_papers_sum(bins):
    generator = np.random.default_rng(3)
    confidence = generator.uniform(0.34, 1.0, size=300)
    correct = generator.uniform(size=300) < confidence**2
    assert calibration_error(confidence, correct, bins) == pytest.approx(
        loop_calibration_error(confidence, correct, bins), rel=1e-12
    )


def test_calibration_error_of_a_calibrated_model_is_zero():
    confidence = np.repeat([0.25, 0.75], 4)
    correct = np.array([True, False, False, False, True, True, True, False])
    assert calibration_error(confidence, correct) == pytest.approx(0.0)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    # 0.5 shares the lower of two bins with 0.4: |0.5 - 1 + 0.4| there and |0.9 - 1| above. In the upper one: 0.6 + 0.4.
    found = calibration_error(np.array([0.5, 0.4, 0.9]), np.array([True, False, True]), bins=2)
    assert found == pytest.approx((0.1 + 0.1) / 3)


def test_a_metric_is_the_same_for_any_row_order_and_repetition():
    logits, labels = random_logits(30, 3), torch.arange(30) % 3
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    plain = classification_metrics(logits, labels, "single_label")
    shuffled = classification_metrics(logits[order].repeat(2, 1), labels[order].repeat(2), "single_label")
    assert shuffled == pytest.approx(plain)


@pytest.mark.parametrize(
    ("logits", "labels", "what"),
    [
        ([[1.0, 0.0]] * 3, [0, 1, 1], "every prediction is the same"),
        ([[1.0, 0.0], [0.0, 1.0]], [1, 1], "every label is the same"),
    ],
)
def test_E13_constant_answers_have_no_matthews_correlation(logits, labels, what, caplog):
    found = classification_metrics(torch.tensor(logits), torch.tensor(labels), "single_label")
    assert found["matthews_correlation"] is None
    assert found["accuracy"] is not None
    assert f"matthews_correlation is not defined: {what}" in caplog.text


# ---- rows without a label, broken logits


@pytest.mark.parametrize("problem", CLASSIFIER_PROBLEMS)
def test_unlabelled_rows_are_left_out_and_counted(problem, caplog):
    caplog.set_level(logging.INFO)
    classes = 1 if problem == "regression" else 3
    logits = random_logits(20, classes)
    labels = {
        "single_label": torch.arange(20) % 3,
        "multi_label": (random_logits(20, 3, seed=5) > 0).float(),
        "regression": random_logits(20, 1, seed=6)[:, 0],
    }[problem]
    plain = classification_metrics(logits, labels, problem)
    missing = torch.full_like(labels[:2], -100 if problem == "single_label" else math.nan)
    more = classification_metrics(
        torch.cat([random_logits(2, classes, 9), logits]), torch.cat([missing, labels]), problem
    )
    assert more == plain
    assert "2 of 22 rows have no label" in caplog.text


def test_labelled_takes_minus_100_and_nan_anywhere_in_a_row():
    assert labelled(torch.tensor([1, -100, 0])).tolist() == [True, False, True]
    assert labelled(torch.tensor([0.5, math.nan, -100.0])).tolist() == [True, False, False]
    assert labelled(torch.tensor([[0.0, 1.0], [math.nan, 1.0]])).tolist() == [True, False]


@pytest.mark.parametrize("problem", CLASSIFIER_PROBLEMS)
def test_no_labels_at_all_gives_null_with_a_reason(problem, caplog):
    labels = torch.full((4,), -100) if problem == "single_label" else torch.full((4, 1), math.nan)
    assert classification_metrics(random_logits(4, 1), labels, problem) == dict.fromkeys(METRIC_NAMES[problem])
    assert "no rows are left" in caplog.text


def test_E13_broken_logits_give_null_with_a_reason(caplog):
    logits = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    assert set(classification_metrics(logits, torch.tensor([0, 1]), "single_label").values()) == {None}
    assert "1 of 2 rows have logits that are not finite" in caplog.text
    assert agreement(logits, logits, "single_label") == {"agreement": None, "kl": None}


# ---- several labels


def test_multi_label_metrics_by_hand():
    truth = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    predicted = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    found = classification_metrics((predicted - 0.5) * 40, truth, "multi_label")
    # Label 0: F1 1. Label 1: 1 hit, 1 false alarm, 1 miss: 1/2. Label 2 never occurs: 0. All: 3 hits, 1 + 1 errors.
    assert tuple(found) == METRIC_NAMES["multi_label"]
    assert found["micro_f1"] == pytest.approx(6 / 8)
    assert found["macro_f1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["subset_accuracy"] == pytest.approx(0.5)
    assert found["calibration_error"] == pytest.approx(2 / 12, abs=1e-6)


def test_one_column_of_multi_label_is_not_read_as_a_binary_problem():
    # The class "0" must not enter the F1: 1 hit, 1 false alarm, 1 miss.
    logits = torch.tensor([[1.0], [1.0], [-1.0], [-1.0], [-1.0]])
    found = classification_metrics(logits, torch.tensor([[1.0], [0.0], [1.0], [0.0], [0.0]]), "multi_label")
    assert found["micro_f1"] == found["macro_f1"] == pytest.approx(0.5)


def test_multi_label_calibration_is_over_decisions():
    logits, truth = random_logits(40, 3), (random_logits(40, 3, seed=8) > 0).float()
    probability = 1 / (1 + np.exp(-logits.double().numpy()))
    confidence = np.maximum(probability, 1 - probability).ravel()
    correct = ((probability > 0.5) == truth.numpy().astype(bool)).ravel()
    found = classification_metrics(logits, truth, "multi_label")["calibration_error"]
    assert found == pytest.approx(loop_calibration_error(confidence, correct, 15))


def test_multi_label_shapes_are_checked():
    with pytest.raises(ShapeError, match=re.escape("multi-label labels are [4], the logits [4, 3]")):
        classification_metrics(random_logits(4, 3), torch.ones(4), "multi_label")


# ---- regression


def test_regression_metrics_are_those_of_numpy():
    logits, labels = random_logits(25, 1), random_logits(25, 1, seed=2)[:, 0]
    first, second = logits[:, 0].double().numpy(), labels.double().numpy()
    found = classification_metrics(logits, labels, "regression")
    assert tuple(found) == METRIC_NAMES["regression"]
    assert found["pearson"] == pytest.approx(np.corrcoef(first, second)[0, 1])
    ranks = np.corrcoef(stats.rankdata(first), stats.rankdata(second))[0, 1]
    assert found["spearman"] == pytest.approx(ranks)
    assert found["mse"] == pytest.approx(np.mean((first - second) ** 2))
    assert classification_metrics(logits, labels[:, None], "regression") == found


@pytest.mark.parametrize(("rows", "reason"), [(1, "it needs 2 rows, there is 1"), (3, "are constant")])
def test_E13_constant_predictions_have_no_correlation(rows, reason, caplog):
    found = classification_metrics(torch.full((rows, 1), 2.0), torch.arange(rows).float(), "regression")
    assert found["pearson"] is None
    assert found["spearman"] is None
    assert found["mse"] is not None
    assert "pearson is not defined: " in caplog.text
    assert reason in caplog.text


def test_regression_refuses_several_outputs():
    with pytest.raises(ShapeError, match="regression has 1 output, this model has 2"):
        classification_metrics(random_logits(4, 2), torch.ones(4), "regression")


def test_unknown_problems_are_named():
    with pytest.raises(RecipeError, match=r"unknown problem 'single_lable'.*Did you mean 'single_label'"):
        classification_metrics(random_logits(4, 2), torch.ones(4), "single_lable")
    with pytest.raises(RecipeError, match="unknown problem 'ranking'"):
        agreement(random_logits(4, 2), random_logits(4, 2), "ranking")


# ---- agreement


def test_agreement_with_oneself_is_full():
    logits = random_logits(10, 3)
    assert agreement(logits, logits, "single_label") == {"agreement": 1.0, "kl": 0.0}
    assert agreement(logits, logits, "multi_label") == {"agreement": 1.0, "kl": 0.0}
    found = agreement(logits[:, :1], logits[:, :1], "regression")
    assert found == {"teacher_pearson": pytest.approx(1.0), "teacher_mse": 0.0}


def test_agreement_and_kl_are_those_of_numpy():
    student, teacher = random_logits(40, 3), random_logits(40, 3, seed=1)
    p = stats.entropy(
        np.exp(teacher.double().numpy()), np.exp(student.double().numpy()), axis=1
    )  # scipy normalizes both: KL(teacher || student)
    found = agreement(student, teacher, "single_label")
    assert found["kl"] == pytest.approx(p.mean(), rel=1e-5)
    assert found["agreement"] == pytest.approx(np.mean(student.numpy().argmax(1) == teacher.numpy().argmax(1)))
    assert found["kl"] != pytest.approx(agreement(teacher, student, "single_label")["kl"], rel=1e-3)


def test_multi_label_kl_is_the_sum_over_labels():
    student, teacher = random_logits(20, 2), random_logits(20, 2, seed=1)
    p, q = (1 / (1 + np.exp(-logits.double().numpy())) for logits in (teacher, student))
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(1).mean()
    found = agreement(student, teacher, "multi_label")
    assert found["kl"] == pytest.approx(expected, rel=1e-5)
    assert found["agreement"] == pytest.approx(float(((student > 0) == (teacher > 0)).float().mean()))


# ---- predict


class Output:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Model(PreTrainedModel):
    """Says the sum of a row's ids; fails when it meets a key that it does not take."""

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.linear = nn.Linear(1, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: object) -> Output:
        assert labels is None, "a model must not see labels when it predicts"
        assert not kwargs, f"unknown keys {kwargs}"
        assert not torch.is_grad_enabled()
        return Output(self.dropout(self.linear(input_ids.float().sum(1, keepdim=True))))


def batches() -> list[dict[str, object]]:
    return [
        {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([0, 1]), "example_id": ["a", "b"]},
        {"input_ids": torch.tensor([[5]]), "labels": torch.tensor([-100]), "example_id": ["c"], "score": 3},
    ]


def test_predict_keeps_the_order_and_leaves_the_model_as_it_was():
    model = Model().train()
    model.linear.eval()
    found = predict(model, batches())

    assert found.ids == ("a", "b", "c")
    assert found.labels.tolist() == [0, 1, -100]
    expected = model.linear(torch.tensor([[3.0], [7.0], [5.0]]))
    torch.testing.assert_close(found.logits, expected.detach())
    assert (model.training, model.linear.training, model.dropout.training) == (True, False, True)


def test_predict_restores_the_mode_after_an_error():
    model = Model().train()
    with pytest.raises(RuntimeError):
        predict(model, [{"input_ids": torch.ones(2, 1, 3)}])
    assert model.dropout.training


def test_predict_numbers_rows_without_ids_and_marks_missing_labels():
    found = predict(Model(), [{"input_ids": torch.ones(2, 1)}, {"input_ids": torch.ones(1, 1)}])
    assert found.ids == ("0", "1", "2")
    assert found.labels.tolist() == [-100, -100, -100]


def test_D14_a_model_with_its_own_encoding_gets_only_its_own_keys():
    seen = {}

    class Teacher(Model):
        def forward(self, input_ids, token_type_ids=None):
            seen.update(input_ids=input_ids, token_type_ids=token_type_ids)
            return Output(torch.zeros(1, 2))

    batch = {
        "input_ids": torch.ones(1, 1),
        "token_type_ids": torch.ones(1, 1),
        "teacher_input_ids": torch.full((1, 2), 7),
        "labels": torch.tensor([0]),
    }
    predict(Teacher(), [batch], as_teacher=True)
    assert seen["input_ids"].tolist() == [[7, 7]]
    assert seen["token_type_ids"] is None
    # Without an encoding of its own it reads the common one, token types included.
    predict(Teacher(), [{key: value for key, value in batch.items() if key != "teacher_input_ids"}], as_teacher=True)
    assert seen["token_type_ids"].tolist() == [[1]]


def test_predict_takes_a_precision_by_name():
    found = predict(Model(), batches(), precision="bfloat16")
    assert found.logits.dtype == torch.float32
    with pytest.raises(RecipeError, match="unknown precision 'bf16'"):
        predict(Model(), batches(), precision="bf16")


# ---- one answer for every row


def test_R13_the_trivial_baseline_is_what_the_training_labels_alone_say() -> None:
    """Held against scikit-learn's dummies; a class that no training row has is not impossible."""
    train, test = torch.tensor([0, 2, 2, 2, 1, -100]), torch.tensor([2, 2, 0, 3])
    logits = constant_outputs(train, "single_label", num_outputs=4).expand(4, -1)
    assert_close = torch.testing.assert_close
    assert_close(logits[0].exp(), torch.tensor([2, 2, 4, 1]) / 9)
    dummy = DummyClassifier(strategy="most_frequent").fit(np.zeros((5, 1)), train[:5].numpy())
    metrics = classification_metrics(logits, test, "single_label")
    assert metrics["accuracy"] == dummy.score(np.zeros((4, 1)), test.numpy()) == 0.5

    flags = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [math.nan, math.nan]])
    assert_close(constant_outputs(flags, "multi_label", num_outputs=2).sigmoid(), torch.tensor([4 / 5, 2 / 5]))

    values = torch.tensor([1.0, 2.0, 6.0, math.nan])
    assert_close(constant_outputs(values, "regression", num_outputs=1), torch.tensor([3.0]))


def test_the_log_is_silent_where_a_metric_has_to_be_undefined(caplog: pytest.LogCaptureFixture) -> None:
    logits, labels = torch.zeros(3, 2), torch.tensor([0, 1, 0])
    with undefined_metrics_expected():
        assert classification_metrics(logits, labels, "single_label")["matthews_correlation"] is None
    assert not caplog.records
    classification_metrics(logits, labels, "single_label")
    assert len(caplog.records) == 1
