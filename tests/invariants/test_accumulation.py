"""One step is the same however it is split; a statistic is what the split says, and the log names its size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.losses import LOGIT_LOSSES, Projector
from flexkd.core.objective import Objective
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.data.encoding.collation import Collator
from flexkd.models.forward.hidden import hooked_states
from flexkd.training.trainer import DistillationTrainer
from tests.closeness import assert_close
from tests.tiny import tiny_model
from tests.training.test_distillation_trainer import UNITS, first_log, rows, student_model, teacher_model, trainer_of

SPLITS = ((16, 1), (4, 4), (1, 16))
PAIR = LayerPair.of_units(UNITS)


def goal_of(term: str) -> Objective:
    if term in LOGIT_LOSSES:
        return Objective(TaskTerm(weight=0.3), LogitTerm(term, temperature=2.0))
    torch.manual_seed(3)
    projectors = (Projector(16, 32),) if term == "projector" else ()
    pair = LayerPair() if term == "projector" else PAIR
    return Objective(TaskTerm(weight=0.3), features=FeatureTerm(term, layers=(pair,), projectors=projectors))


class Recording(Collator):
    """Keeps the rows of each batch that it makes."""

    made: list[list[int]]

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        self.made.append([int(row["id"].partition("-")[2]) for row in features])
        return super().__call__(features)


def one_step(
    folder: Path, goal: Objective, size: int, accumulation: int, **options: Any
) -> tuple[dict[str, float], list[list[int]], DistillationTrainer]:
    changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "learning_rate": 1e-9}
    trainer = trainer_of(folder, goal, options.pop("data", None) or rows(), arguments=changes, **options)
    collator = Recording(0)
    object.__setattr__(collator, "made", [])
    trainer.data_collator = collator
    trainer.train()
    return first_log(trainer), collator.made[:accumulation], trainer


@pytest.mark.parametrize("term", ["forward_kl", "jensen_shannon", "total_variation", "mse", "cosine", "projector"])
def test_M03_additive_terms_do_not_see_the_split(tmp_path: Path, term: str) -> None:
    """Rows of 3 to 11 tokens, so that micro-batches hold unequal numbers of them."""
    found = [one_step(tmp_path, goal_of(term), *split)[0] for split in SPLITS]
    names = [name for name in found[0] if name.endswith(("_raw", "_weighted"))] + ["loss", "grad_norm"]
    assert len(names) == 6
    for other in found[1:]:
        for name in names:
            assert_close(other[name], found[0][name], dtype=torch.float32)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_M03_other_problems_do_not_see_the_split(tmp_path: Path, problem: str) -> None:
    """Some rows without a label: NaN where labels are numbers."""
    labels = 1 if problem == "regression" else 3
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "problem_type": problem}
    loss, logits = ("mse", "mse") if problem == "regression" else ("binary_cross_entropy", "forward_kl")
    goal = Objective(TaskTerm(loss), LogitTerm(logits))
    targets: list[Any] = [float(i % 3) if labels == 1 else [float(i % 2), 1.0, float(i % 3 == 0)] for i in range(16)]
    for index in (2, 3, 9):
        targets[index] = float("nan") if labels == 1 else [float("nan")] * 3
    data = [{**row, "labels": target} for row, target in zip(rows(), targets, strict=True)]
    found = []
    for split in SPLITS:
        student = tiny_model("bert", seed=2, num_labels=labels, **quiet)
        teacher = teacher_model(num_labels=labels, problem_type=problem)
        found.append(one_step(tmp_path, goal, *split, data=data, model=student, teacher=teacher)[0])
    assert found[0]["task_raw"] > 0
    for other in found[1:]:
        for name in ("loss", "grad_norm", "task_raw", "logits_raw"):
            assert_close(other[name], found[0][name], dtype=torch.float32)


def states_of(model: PreTrainedModel, data: Sequence[Mapping[str, Any]]) -> list[npt.NDArray[np.float64]]:
    """Of each row alone, at the head's input."""
    found = []
    for row in data:
        with torch.no_grad(), hooked_states(model, {-1: None}) as states:
            model(torch.tensor([row["input_ids"]]))
        state: Tensor = states[-1]
        found.append(state[0].double().numpy())
    return found


def by_hand(batches: Sequence[Sequence[int]], ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """`sum_m (n_m / n) F_m` with numpy's own correlation."""
    total, value = sum(len(ours[i]) for batch in batches for i in batch), 0.0
    for batch in batches:
        x = np.concatenate([ours[i] for i in batch])
        y = np.concatenate([theirs[i] for i in batch])[:, UNITS.numpy()]
        coefficients = np.array([np.corrcoef(x[:, k], y[:, k])[0, 1] for k in range(16)])
        value += len(x) / total * np.square(1 - coefficients).mean()
    return float(value)


@pytest.mark.parametrize(("size", "accumulation"), [(16, 1), (8, 2), (4, 4)])
def test_F04_a_correlation_is_the_weighted_mean_over_micro_batches(
    tmp_path: Path, size: int, accumulation: int
) -> None:
    student, teacher = student_model(), teacher_model()
    ours, theirs = states_of(student, rows()), states_of(teacher, rows())
    entry, batches, _ = one_step(tmp_path, goal_of("correlation"), size, accumulation, model=student, teacher=teacher)
    assert sorted(index for batch in batches for index in batch) == list(range(16))
    assert_close(entry["features_raw"], by_hand(batches, ours, theirs), dtype=torch.float32)
    sizes = [sum(len(rows()[index]["input_ids"]) for index in batch) for batch in batches]
    assert entry["feature_positions"] == pytest.approx(np.mean(sizes))
    assert entry["dead_student_units"] == entry["dead_teacher_units"] == 0


def test_F02_single_rows_have_too_few_positions_and_only_those_are_skipped(tmp_path: Path) -> None:
    """Split into single rows, those of 8 tokens or more still count by their share of all tokens."""
    student, teacher = student_model(), teacher_model()
    ours, theirs = states_of(student, rows()), states_of(teacher, rows())
    entry, batches, _ = one_step(tmp_path, goal_of("correlation"), 1, 16, model=student, teacher=teacher)
    lengths = [len(row["input_ids"]) for row in rows()]
    kept = [batch for batch in batches if lengths[batch[0]] >= 8]
    assert 0 < len(kept) < 16
    assert entry["skipped_feature_terms"] == 16 - len(kept)
    share = sum(lengths[batch[0]] for batch in kept) / sum(lengths)
    assert_close(entry["features_raw"], share * by_hand(kept, ours, theirs), dtype=torch.float32)
    assert np.isfinite(entry["grad_norm"])
