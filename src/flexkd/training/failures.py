"""Runs that are stopped: a loss that is not finite, steps that teach nothing, adapters without a gradient."""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flexkd.core.objective import Objective, ObjectiveValue, Signal, StepCounts
from flexkd.core.tensors import IGNORE_INDEX
from flexkd.errors import TrainingError
from flexkd.facts.losses import FEATURE_LOSS_FACTS, LOGIT_LOSS_FACTS
from flexkd.models.loading.adapters import without_gradient
from flexkd.processes import gathered

logger = logging.getLogger(__name__)

PATIENCE: Final = 20
"""Number of steps that teach nothing after which a run is stopped, or the last step of a shorter run."""


class AdapterGradients(TrainerCallback):
    """Stops a run in its first step if an adapter got no gradient: it would silently never be trained."""

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


@dataclass(frozen=True)
class _CheckedBatch:
    """One micro-batch to be checked: small tensors on the device, not read yet."""

    loss: Tensor
    parts: dict[str, Tensor]
    outputs: Tensor
    example_ids: list[Any]
    reason: Callable[[Collection[str]], str]


class TaughtSteps:
    """Checks that the steps of a run teach anything: a step without labels and positions does not."""

    def __init__(self) -> None:
        self._steps = 0
        self._is_taught = False

    def see(self, counts: Sequence[StepCounts], *, max_steps: int) -> None:
        """Check one optimizer step before it is taken.

        Args:
            counts: Counts of each micro-batch.
            max_steps: Steps of the whole run.

        Raises:
            TrainingError: No step of this run has had a label or a position: after `PATIENCE` steps, or at the last.
        """
        if self._is_taught or not counts:
            return
        self._steps += 1
        self._is_taught = counts[0].predictions > 0 or counts[0].positions > 0
        if not self._is_taught and self._steps >= min(PATIENCE, max_steps):
            raise TrainingError(
                f"labels: all are {IGNORE_INDEX} in every one of {self._steps} steps, so that nothing is learnt. Let "
                f"the collator give the ids of each answer as labels, and {IGNORE_INDEX} to prompt and padding alone."
            )


class FeaturePositions:
    """Checks that the feature term has enough positions in the steps of a run.

    A statistic over fewer positions than its `minimum_positions` is left out of a step. Where that happens in every
    step, the run is not what its objective says.
    """

    def __init__(self, objective: Objective) -> None:
        term = objective.features
        self._name = "" if term is None else term.loss
        self._minimum = 0 if term is None else FEATURE_LOSS_FACTS[term.loss].minimum_positions
        self._steps = 0
        self._is_taught = False
        self._has_warned = False

    def see(self, positions: Sequence[int], *, max_steps: int) -> None:
        """Check one optimizer step before it is taken.

        Args:
            positions: Positions of each micro-batch, over all processes.
            max_steps: Steps of the whole run.

        Raises:
            TrainingError: No step of this run has had a feature term: after `PATIENCE` steps, or at the last one.
        """
        if self._is_taught or not positions or not self._minimum:
            return
        self._steps += 1
        self._is_taught = any(count >= self._minimum for count in positions)
        few = min(positions)
        if few < self._minimum and not self._has_warned:
            self._has_warned = True
            logger.warning("feature term skipped: %s", self._reason(few))
        if not self._is_taught and self._steps >= min(PATIENCE, max_steps):
            raise TrainingError(
                f"objective.features: skipped in every one of {self._steps} steps, so that no features are taught: "
                f"{self._reason(few)} Put more rows into one pass (training.per_device_batch_size), use "
                "objective.features.positions: tokens, or set objective.features: null."
            )

    def _reason(self, few: int) -> str:
        return f"{few} positions in one pass are fewer than the {self._minimum} that {self._name} needs."


def _unknown(terms: Collection[str]) -> str:
    return ""


class StepCheck:
    """Whether the losses and the gradient of one optimizer step are finite, read from the device once."""

    def __init__(self) -> None:
        self._seen: list[_CheckedBatch] = []

    def add(
        self,
        value: ObjectiveValue,
        student: Signal,
        inputs: Mapping[str, Any],
        reason: Callable[[Collection[str]], str] = _unknown,
    ) -> None:
        """Remember one micro-batch.

        Args:
            reason: Called with the terms (`task`, `logits`) that are infinite; says why, "" where it does not know.
        """
        # A sum is not finite if an entry is not, and is cheaper than a test of each entry.
        sums = [output.detach().float().sum() for output in student.features]
        if isinstance(student.logits, Tensor):
            # A sum of -inf comes from outputs that are ruled out, which is allowed.
            logits = student.logits.detach().float().sum()
            sums.append(torch.where(logits == -torch.inf, 0, logits))
        total = torch.stack(sums).sum() if sums else torch.zeros(())
        names = list(inputs.get("example_id", ["not given"]))[:8]
        self._seen.append(_CheckedBatch(value.loss.detach(), value.parts, total, names, reason))

    def read(self, step: int, norms: Sequence[Tensor | float] = ()) -> None:
        """Wait for the device, check the micro-batches added so far, and forget them.

        Args:
            step: Names the step, counted from 1.
            norms: Norms of gradients.

        Raises:
            TrainingError: A loss is not finite: names its terms and examples, and whether the student's outputs already
                were not; or a norm is not.
        """
        seen, self._seen = self._seen, []
        values = [micro_batch.loss for micro_batch in seen] + [norm for norm in norms if isinstance(norm, Tensor)]
        figures = torch.stack([_whole(value).float() for value in values]).tolist() if values else []
        losses = zip(seen, figures, strict=False)
        wrong = next((micro_batch for micro_batch, loss in losses if not math.isfinite(loss)), None)
        text = None if wrong is None else _not_finite(wrong, step)
        plain = [norm for norm in norms if not isinstance(norm, Tensor)]
        norm = next((value for value in (*figures[len(seen) :], *plain) if not math.isfinite(value)), None)
        if norm is not None:
            # It is so in every process, and the one whose loss it was knows more.
            text = next((text for text in gathered(text) if text is not None), None)
        if text is not None:
            raise TrainingError(text)
        if norm is not None:
            raise TrainingError(
                f"step {step}: the gradient norm is {norm}. No optimizer step was taken with it. Lower the learning "
                "rate, or train in float32."
            )


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _not_finite(seen: _CheckedBatch, step: int) -> str:
    parts = [name for name, part in seen.parts.items() if name.endswith("_raw") and not bool(torch.isfinite(part))]
    is_sound = bool(torch.isfinite(seen.outputs))
    reason = seen.reason([name.removesuffix("_raw") for name in parts]) if is_sound and parts else ""
    if reason:
        finite_losses = [name for name, facts in LOGIT_LOSS_FACTS.items() if facts.is_finite]
        return (
            f"step {step}: {', '.join(parts)} is infinite. {reason}. No optimizer step was taken with it. Rule out the "
            "same outputs in both models and in no label, cut those that only one model has (shared_outputs), or take "
            f"a loss that is finite there ({', '.join(finite_losses)})."
        )
    source = "the loss or the teacher" if is_sound else "the student's own outputs"
    return (
        f"step {step}: {', '.join(parts) or 'loss'} is not finite (from {source}; examples "
        f"{', '.join(map(str, seen.example_ids))}). No optimizer step was taken with it. Lower the learning rate, or "
        "train in float32."
    )
