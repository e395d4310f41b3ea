"""What is shown of a training while it runs: loss and parts, validation, learning rate, pace and time left."""

import math
from collections.abc import Mapping
from typing import Any, Final, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flexkd.display.progress import Progress
from flexkd.facts.metrics import metric_label

_WEIGHTED: Final = "_weighted"
_EVALUATED: Final = "eval_"


class TrainingProgress(TrainerCallback):
    """Shows the progress of a training, in place of the figures that the Trainer prints; a context around it.

    In a terminal there is a bar, with the latest loss behind it, and a line for each evaluation; elsewhere a line for
    each entry of the trainer's log that is due. All entries are details of the log.

    Args:
        description: Names what is trained.
    """

    def __init__(self, description: str):
        self._description = description
        self._progress: Progress | None = None
        self._loss = ""
        self._batches = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.__exit__(*error)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin at the step of the checkpoint that the run is resumed from."""
        self._progress = Progress(self._description, state.max_steps, "steps", done=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Count the step; where the log has nothing to say for long, say at least how far it is."""
        if self._progress is not None:
            self._progress.advance(is_silent=control.should_log or control.should_evaluate)
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Say what the trainer has logged: of the steps since the last entry, or of an evaluation."""
        if self._progress is None or not state.is_world_process_zero or logs is None:
            return
        step = f"step {state.global_step:,} of {state.max_steps:,}"
        if "loss" in logs:
            self._loss = f"loss {_figure(logs['loss'])}"
            self._progress.note(self._loss)
            rate = f"lr {logs['learning_rate']:.2e}" if "learning_rate" in logs else ""
            text = ", ".join(filter(None, (step, f"loss {loss_text(logs)}", rate, self._progress.pace())))
            self._progress.say(text, is_detail=self._progress.has_bar or not self._progress.is_due())
        elif f"{_EVALUATED}loss" in logs:
            self._progress.say(f"{step}, validation: {_evaluation_text(logs, args)}", is_detail=False)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Behind the bar, which batch of the validation rows is read."""
        if self._progress is not None and eval_dataloader is not None:
            self._batches += 1
            self._progress.note(f"validating {self._batches:,}/{len(eval_dataloader):,}", at_once=True)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Behind the bar is the loss again; the next evaluation begins at its first batch."""
        self._batches = 0
        if self._progress is not None:
            self._progress.note(self._loss)


def loss_text(logs: Mapping[str, Any], prefix: str = "") -> str:
    """A loss as the sum of its weighted parts.

    Args:
        logs: An entry of a trainer's log.
        prefix: Of its names: `eval_` of an evaluation.

    Example:
        >>> loss_text({"loss": 1.5, "task_weighted": 0.5, "logits_weighted": 1.0, "task_raw": 0.5})
        '1.5 = task 0.5 + logits 1'
    """
    parts = {
        name.removeprefix(prefix).removesuffix(_WEIGHTED): value
        for name, value in logs.items()
        if name.startswith(prefix) and name.endswith(_WEIGHTED)
    }
    total = _figure(logs[f"{prefix}loss"])
    if len(parts) < 2:
        return total
    return f"{total} = {' + '.join(f'{metric_label(name)} {_figure(value)}' for name, value in parts.items())}"


def _evaluation_text(logs: Mapping[str, Any], args: TrainingArguments) -> str:
    """The metric by which the best checkpoint is chosen, and the loss."""
    metric = str(args.metric_for_best_model or "")
    loss = f"loss {loss_text(logs, _EVALUATED)}"
    if metric not in logs or metric == f"{_EVALUATED}loss":
        return loss
    return f"{metric_label(metric.removeprefix(_EVALUATED))} {_figure(logs[metric])}, {loss}"


def _figure(value: float) -> str:
    """Four digits, or that there is no number."""
    return f"{float(value):.4g}" if math.isfinite(float(value)) else "undefined"
