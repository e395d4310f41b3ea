"""When a run ends before its last step: a validation metric has not improved for some evaluations."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flexkd.facts.metrics import LOSS, LOWER_IS_BETTER

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EarlyStopping:
    """A run ends at the evaluation after which `metric` has not improved for `patience` evaluations.

    The decision is a function of the run's log alone, which every checkpoint holds: a resumed run ends at the step at
    which the uninterrupted one does, also where it was killed right after its last checkpoint. EarlyStoppingCallback of
    transformers would train on there; it counts in itself, and watches only the metric that chooses the checkpoint.

    Attributes:
        patience: Evaluations without an improvement.
        metric: Name of a validation metric, without the prefix of the log.
        min_delta: An improvement is larger than this, over the best value that counted as one.
    """

    patience: int
    metric: str
    min_delta: float = 0.0

    def ends(self, log: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the run ends at the last evaluation of its log."""
        return self._progress(log)[1] >= self.patience

    def note(self, log: Sequence[Mapping[str, Any]]) -> str | None:
        """Why the run with this log ended, for its reader; None where it went on to its last step."""
        step, waited = self._progress(log)
        if waited < self.patience:
            return None
        last = max(int(entry["step"]) for entry in log)
        since = f"since step {step}" if step else "at all"
        return (
            f"training.early_stopping: ended after step {last}: {self.metric} had not improved {since}, for {waited} "
            f"evaluation{'s' * (waited != 1)}. The student is that of the best evaluation."
        )

    def tell(self, steps: int, every: int) -> None:
        """Log at which step a run of so many steps can end, which is evaluated `every` so many; warn if at none."""
        earliest = every * (self.patience + 1)
        if earliest >= steps:
            logger.warning(
                "training.early_stopping.patience: %d evaluations without an improvement end none of the %d steps, as "
                "step %d is the first that they can end. Lower it, or raise training.evaluations.",
                self.patience, steps, earliest,
            )  # fmt: skip
            return
        logger.info("early stopping: %d steps at most, on %s after step %d", steps, self.metric, earliest)

    def _progress(self, log: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
        """Step of the last improvement, 0 without one, and the number of evaluations after it."""
        name, sign = f"eval_{self.metric}", -1 if self.metric in (*LOWER_IS_BETTER, LOSS) else 1
        best, best_step, waited = -math.inf, 0, 0
        for entry in log:
            if name not in entry:
                continue
            # An undefined value (NaN) is not an improvement.
            if sign * float(entry[name]) > best + self.min_delta:
                best, best_step, waited = sign * float(entry[name]), int(entry["step"]), 0
            else:
                waited += 1
        return best_step, waited


class _StopEarly(TrainerCallback):
    """Ends a run where its rule says so."""

    def __init__(self, rule: EarlyStopping) -> None:
        self.rule = rule

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.rule.ends(state.log_history):
            control.should_training_stop = True
        return control


STOP_EARLY: Final = _StopEarly
