"""The settings of a run, and the TrainingArguments made from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flexkd.facts.batches import device_batch
from flexkd.facts.metrics import LOWER_IS_BETTER


class _EvaluateLastStep(TrainerCallback):
    """Evaluates and saves the last step of a run too, so that it can be the best checkpoint.

    Each step that is saved is logged: means over steps before it would not be known to a run that goes on from there.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
            control.should_save = True
        if control.should_save:
            control.should_log = True
        return control


LAST_STEP: Final = _EvaluateLastStep

CHECKPOINTING: Final[dict[str, Any]] = {"use_reentrant": False}
"""Kind of gradient checkpointing; the reentrant kind passes no gradient to adapters and inner states."""


def _checkpointing() -> dict[str, Any]:
    """Switches gradient checkpointing on, under the name that this version of transformers has for it."""
    fields = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": CHECKPOINTING}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How one run trains; `batch_size` counts rows of one optimizer step over all processes."""

    epochs: float
    batch_size: int
    learning_rate: float
    weight_decay: float
    schedule: str
    warmup_ratio: float
    seed: int
    evaluations: int
    metric: str
    precision: str
    max_steps: int | None = None
    per_device_batch_size: int | None = None
    max_grad_norm: float = 1.0
    logging_steps: int = 20
    keep_checkpoints: int = 2
    report_to: Sequence[str] = ()
    dataloader_workers: int = 0
    gradient_checkpointing: bool = False
    max_minutes: float | int | None = None

    def device_batch(self, num_processes: int) -> tuple[int, int]:
        """Rows of one forward on one device, and how many of them accumulate to one step.

        Raises:
            RecipeError: The global batch does not divide into device batches and processes.
        """
        return device_batch(self.batch_size, self.per_device_batch_size, num_processes)

    def steps(self, num_rows: int) -> int:
        """Optimizer steps of the run; `training/time_limit.py` turns a limit in minutes into `max_steps`."""
        return num_steps(num_rows, self.batch_size, self.epochs, self.max_steps)

    def passes(self, num_rows: int) -> float:
        """How often the run goes over the rows."""
        return self.steps(num_rows) * self.batch_size / num_rows


def num_steps(num_rows: int, batch_size: int, epochs: float | int, max_steps: int | None) -> int:
    """Optimizer steps of a run: `max_steps`, else those of its epochs, whose last step may be short."""
    return max_steps or max(math.ceil(math.ceil(num_rows / batch_size) * epochs), 1)


def training_arguments(
    output_dir: Path, settings: RunSettings, *, num_rows: int, num_processes: int = 1
) -> TrainingArguments:
    """Arguments of a run whose global batch is fixed; accumulation follows from it.

    Raises:
        RecipeError: The global batch does not divide into device batches and processes.
    """
    device_batch, accumulation = settings.device_batch(num_processes)
    steps = settings.steps(num_rows)
    every = math.ceil(steps / settings.evaluations)
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=device_batch,
        per_device_eval_batch_size=max(device_batch, 32),
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        # The first step of a warm-up has rate 0: a run of one step would learn nothing.
        warmup_steps=min(math.ceil(steps * settings.warmup_ratio), steps - 1),
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=settings.keep_checkpoints,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{settings.metric}",
        greater_is_better=settings.metric not in LOWER_IS_BETTER,
        logging_steps=min(settings.logging_steps, steps),
        report_to=list(settings.report_to),
        dataloader_num_workers=settings.dataloader_workers,
        dataloader_persistent_workers=settings.dataloader_workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
        **(_checkpointing() if settings.gradient_checkpointing else {}),
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        log_level="warning",
        # Shown by `training/progress.py`.
        disable_tqdm=True,
    )
