"""What only the first backward of a run can show: whether every adapter takes part in it."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
