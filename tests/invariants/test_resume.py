"""A run that was interrupted ends where the uninterrupted one ends: rows, order, weights, projectors, log."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import TrainerCallback

from flexkd.core.losses import Projector
from flexkd.core.objective import Objective
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.data.encoding.collation import Collator
from flexkd.training.trainer import DistillationTrainer
from tests.training.test_distillation_trainer import UNITS, arguments, rows, student_model, teacher_model


class Stop(TrainerCallback):
    """Ends a run after its first checkpoint, as an interruption would."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = True
        return control


def goal_of(loss: str, fade: float | None = None) -> Objective:
    torch.manual_seed(0)
    projectors = (Projector(16, 32),) if loss == "projector" else ()
    pair = LayerPair() if loss == "projector" else LayerPair.of_units(UNITS)
    rate = 3e-3 if projectors else None
    features = FeatureTerm(loss, layers=(pair,), projectors=projectors, fade=fade, projector_learning_rate=rate)
    return Objective(TaskTerm(), LogitTerm(temperature=2.0), features)


def trainer_of(
    folder: Path, goal: Objective, data: Any, *, interrupted: bool = False, **changes: Any
) -> tuple[DistillationTrainer, list[str]]:
    """A student with dropout, three epochs, and the ids of all rows that it gets to see."""
    order: list[str] = []

    class Recording(Collator):
        def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            order.extend(str(row["id"]) for row in features)
            return super().__call__(features)

    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": -1,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 11,
        "logging_steps": 1,
        "lr_scheduler_type": "linear",
        **changes,
    }
    trainer = DistillationTrainer(
        model=student_model(dropout=0.1),
        teacher=teacher_model(),
        objective=goal,
        args=arguments(folder, **settings),
        train_dataset=data,
        data_collator=Recording(0),
        callbacks=[Stop()] if interrupted else [],
    )
    return trainer, order


def history(trainer: DistillationTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def check_resume(
    folder: Path, data: Any, loss: str, step: int, left: int, *, fade: float | None = None, **changes: Any
) -> list[str]:
    """Stop after a step, when so many rows are left, and go on in a new trainer; gives the whole order of rows."""
    whole, order = trainer_of(folder / "whole", goal_of(loss, fade), data, **changes)
    whole.train()
    first, _ = trainer_of(folder / "parts", goal_of(loss, fade), data, interrupted=True, **changes)
    first.train()
    assert first.state.global_step == step
    second, rest = trainer_of(folder / "parts", goal_of(loss, fade), data, **changes)
    second.train(resume_from_checkpoint=str(folder / "parts" / f"checkpoint-{step}"))
    assert rest[-left:] == order[-left:]
    for (name, one), two in zip(whole.student.named_parameters(), second.student.parameters(), strict=True):
        assert torch.equal(one, two), name
    for one, two in zip(whole.objective.parameters(), second.objective.parameters(), strict=True):
        assert torch.equal(one, two)
    assert history(second) == history(whole)
    return order


def test_S01_a_resumed_run_repeats_no_row_and_no_number(tmp_path: Path) -> None:
    """With a projector of its own learning rate, whose weights and moments have to come back too."""
    order = check_resume(tmp_path, rows(), "projector", 11, 26)
    epochs = [order[start : start + 16] for start in (0, 16, 32)]
    assert all(sorted(epoch) == sorted(order[:16]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("fade", [0.3, 0.9])
def test_S01_a_feature_term_that_fades_goes_on_where_it_was(tmp_path: Path, fade: float) -> None:
    """Stopped at step 3 of 6: after the fade of a projector, or in the middle of it."""
    changes = {"gradient_accumulation_steps": 4, "save_steps": 3}
    check_resume(tmp_path, rows(), "projector", 3, 24, fade=fade, **changes)


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_S01_accumulated_steps_with_a_short_last_one_resume(tmp_path: Path, sampling: str) -> None:
    """14 rows of 2 with an accumulation of 4: steps of 8 and of 6 rows; stopped in the middle of an epoch."""
    changes = {"gradient_accumulation_steps": 4, "save_steps": 3, "train_sampling_strategy": sampling}
    check_resume(tmp_path, rows(14), "correlation", 3, 20, **changes)


def test_S01_a_table_of_datasets_grouped_by_length_resumes_too(tmp_path: Path) -> None:
    """The Trainer's own order by length is drawn from a generator that a resumed run finds in another state."""
    table = datasets.Dataset.from_list(rows())
    order = check_resume(tmp_path, table, "correlation", 11, 26, train_sampling_strategy="group_by_length")
    assert order[:16] != order[16:32]
