"""Steps that must not be taken, in words: a loss that is not finite, an adapter that no gradient reaches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flexkd.core.objective import ObjectiveValue, Signal
from flexkd.errors import TrainingError
from flexkd.models.adapters import without_gradient


class AdapterGradients(TrainerCallback):
    """Stops a run in its first step when an adapter got no gradient: it would end as it began, without a word."""

    def __init__(self) -> None:
        self.is_checked = False

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Before the first step of this process.

        Raises:
            TrainingError: Names the first adapter without a gradient.
        """
        # DeepSpeed keeps gradients where no parameter shows them.
        if self.is_checked or model is None or args.deepspeed is not None:
            return
        self.is_checked = True
        idle = without_gradient(model)
        if idle:
            raise TrainingError(
                f"step {state.global_step + 1}: {len(idle)} adapters got no gradient (first: '{idle[0]}'), so they "
                "would never be trained. Let the objective read a state above them, or name fewer target_modules; with "
                "gradient checkpointing, set use_reentrant to false."
            )


def not_finite(value: ObjectiveValue, student: Signal, inputs: Mapping[str, Any], step: int) -> str:
    """Which terms of a step are not finite, on which examples, and whether the student's outputs already were."""
    parts = [name for name, part in value.parts.items() if name.endswith("_raw") and not bool(torch.isfinite(part))]
    ids = ", ".join(map(str, inputs.get("example_id", ["not given"])[:8]))
    outputs = [output for output in (student.logits, *student.features) if isinstance(output, Tensor)]
    is_finite = all(bool(torch.isfinite(output).all()) for output in outputs)
    source = "the loss or the teacher" if is_finite else "the student's own outputs"
    return (
        f"step {step}: {', '.join(parts) or 'loss'} is not finite (from {source}; examples {ids}). No optimizer step "
        "was taken with it. Lower the learning rate, or train in float32."
    )
