"""From a recipe's settings to TrainingArguments: the global batch, the steps, the evaluations, the number type."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from flexkd.errors import RecipeError
from flexkd.facts.metrics import LOWER_IS_BETTER
from flexkd.models.forward.attention import prefer_short_rows_attention
from flexkd.training.arguments import LAST_STEP, RunSettings, training_arguments
from tests.tiny import tiny_model


def settings(**changes: Any) -> RunSettings:
    given: dict[str, Any] = {
        "epochs": 3.0,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "schedule": "linear",
        "warmup_ratio": 0.06,
        "seed": 7,
        "evaluations": 5,
        "metric": "accuracy",
        "precision": "float32",
    }
    return RunSettings(**{**given, **changes})


def built(folder: Path, rows: int = 1000, processes: int = 1, **changes: Any) -> Any:
    return training_arguments(folder, settings(**changes), num_rows=rows, num_processes=processes)


@pytest.mark.parametrize(
    ("batch", "own", "processes", "expected"),
    [
        (32, None, 1, (32, 1)),
        (32, 8, 1, (8, 4)),
        (32, None, 4, (8, 1)),
        (32, 4, 4, (4, 2)),
        (1, None, 1, (1, 1)),
        (12, 3, 2, (3, 2)),
    ],
)
def test_E07_the_global_batch_is_kept_for_any_number_of_processes(
    batch: int, own: int | None, processes: int, expected: tuple[int, int]
) -> None:
    rows, accumulation = settings(batch_size=batch, per_device_batch_size=own).device_batch(processes)
    assert (rows, accumulation) == expected
    assert rows * accumulation * processes == batch


@pytest.mark.parametrize(("batch", "own", "processes"), [(10, None, 3), (32, 5, 1), (8, 8, 2), (2, None, 4)])
def test_E07_a_global_batch_that_does_not_divide_is_refused_with_a_multiple(
    batch: int, own: int | None, processes: int
) -> None:
    with pytest.raises(RecipeError, match=rf"batch_size: {batch} does not divide .* Choose a multiple of \d+"):
        settings(batch_size=batch, per_device_batch_size=own).device_batch(processes)


@pytest.mark.parametrize(
    ("rows", "epochs", "maximum", "expected"),
    [(64, 3.0, None, 6), (65, 3.0, None, 9), (10, 0.1, None, 1), (100, 0.5, None, 2), (64, 3.0, 50, 50)],
)
def test_the_steps_count_the_short_last_batch_of_each_epoch(
    rows: int, epochs: float, maximum: int | None, expected: int
) -> None:
    assert settings(epochs=epochs, max_steps=maximum).steps(rows) == expected


def evaluated_steps(folder: Path, **changes: Any) -> list[int]:
    made = built(folder, **changes)
    found = []
    for step in range(1, made.max_steps + 1):
        state, control = TrainerState(global_step=step, max_steps=made.max_steps), TrainerControl()
        control.should_evaluate = control.should_save = step % made.eval_steps == 0
        control = LAST_STEP().on_step_end(made, state, control)
        assert control.should_save == control.should_evaluate
        if control.should_evaluate:
            found.append(step)
    return found


@pytest.mark.parametrize("asked", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("steps", [1, 2, 5, 6, 9, 19, 40])
def test_there_are_as_many_evaluations_as_asked_at_most_and_the_last_step_is_one(
    tmp_path: Path, steps: int, asked: int
) -> None:
    found = evaluated_steps(tmp_path, max_steps=steps, evaluations=asked)
    assert found[-1] == steps
    assert math.ceil(min(asked, steps) / 2) <= len(found) <= asked
    gaps = {later - earlier for earlier, later in zip([0, *found[:-1]][:-1], found[:-1], strict=True)}
    assert len(gaps) <= 1


def test_a_run_of_one_step_learns_and_longer_ones_warm_up(tmp_path: Path) -> None:
    assert built(tmp_path, max_steps=1).warmup_steps == 0
    assert built(tmp_path, max_steps=100).warmup_steps == 6
    assert built(tmp_path, max_steps=101).warmup_steps == 7
    assert built(tmp_path, max_steps=100, warmup_ratio=0.0).warmup_steps == 0


def test_settings_reach_the_trainer_by_their_meaning(tmp_path: Path) -> None:
    made = built(tmp_path, per_device_batch_size=8, learning_rate=2e-4, max_grad_norm=0.5, keep_checkpoints=4)
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (8, 4)
    assert (made.learning_rate, made.max_grad_norm, made.save_total_limit) == (2e-4, 0.5, 4)
    assert (made.seed, made.data_seed) == (7, 7)
    assert made.save_steps == made.eval_steps
    assert made.load_best_model_at_end
    assert not made.remove_unused_columns
    assert made.report_to == []


@pytest.mark.parametrize(("schedule", "name"), [("linear", "linear"), ("cosine", "cosine")])
def test_schedules_keep_their_names(tmp_path: Path, schedule: str, name: str) -> None:
    assert built(tmp_path, schedule=schedule).lr_scheduler_type == name


def test_a_constant_schedule_still_warms_up(tmp_path: Path) -> None:
    assert built(tmp_path, schedule="constant").lr_scheduler_type == "constant_with_warmup"


@pytest.mark.parametrize("metric", ["accuracy", "pearson", *sorted(LOWER_IS_BETTER)])
def test_the_best_checkpoint_is_chosen_in_the_direction_of_the_metric(tmp_path: Path, metric: str) -> None:
    made = built(tmp_path, metric=metric)
    assert made.metric_for_best_model == f"eval_{metric}"
    assert made.greater_is_better == (metric in ("accuracy", "pearson"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])  # the Trainer takes float16 on an accelerator alone
def test_a_given_precision_is_taken(tmp_path: Path, precision: str) -> None:
    assert built(tmp_path, precision=precision).bf16 == (precision == "bfloat16")


def test_short_rows_on_a_cpu_take_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = tiny_model("bert")
    before = model.config._attn_implementation
    assert before != "eager"
    prefer_short_rows_attention([model], 257)
    assert model.config._attn_implementation == before
    prefer_short_rows_attention([model], 256)
    assert model.config._attn_implementation == "eager"
