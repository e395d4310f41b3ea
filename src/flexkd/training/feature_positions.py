"""Steps in which the feature term has too few positions: said at the first one, refused where it is every one."""

import logging
from collections.abc import Sequence
from typing import Final

from flexkd.core.objective import Objective
from flexkd.errors import TrainingError
from flexkd.facts.losses import FEATURE_LOSS_FACTS, MINIMUM_POSITIONS

logger = logging.getLogger(__name__)

PATIENCE: Final = 20
"""Steps without a feature term after which a run ends; a shorter run ends with its last step."""


class FeaturePositions:
    """Watches how many positions the feature term of each optimizer step has.

    A statistic over fewer than `MINIMUM_POSITIONS` positions is left out of a step. Where that happens in every step,
    the run is not what its objective says.
    """

    def __init__(self, objective: Objective) -> None:
        term = objective.features
        self._name = term.loss if term is not None and FEATURE_LOSS_FACTS[term.loss].is_statistic else None
        self._steps = 0
        self._is_taught = False
        self._has_warned = False

    def see(self, positions: Sequence[int], *, max_steps: int) -> None:
        """Look at one optimizer step before it is taken.

        Args:
            positions: Of each micro-batch, over all processes.
            max_steps: Steps of the whole run.

        Raises:
            TrainingError: No step of this run has had a feature term: after `PATIENCE` steps, or at the last one.
        """
        if self._name is None or self._is_taught or not positions:
            return
        self._steps += 1
        self._is_taught = any(count >= MINIMUM_POSITIONS for count in positions)
        few = min(positions)
        if few < MINIMUM_POSITIONS and not self._has_warned:
            self._has_warned = True
            logger.warning("feature term skipped: %s", self._reason(few))
        if not self._is_taught and self._steps >= min(PATIENCE, max_steps):
            raise TrainingError(
                f"objective.features: skipped in every one of {self._steps} steps, so that no features are taught: "
                f"{self._reason(few)} Put more rows into one pass (training.per_device_batch_size), use "
                "objective.features.positions: tokens, or set objective.features: null."
            )

    def _reason(self, few: int) -> str:
        return f"{few} positions in one pass are fewer than the {MINIMUM_POSITIONS} that {self._name} needs."
