"""Steps in which the feature term has too few positions: said at the first one, refused where it is every one."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from flexkd.core.losses.feature import MINIMUM_POSITIONS, STATISTICS
from flexkd.core.objective import Objective
from flexkd.core.tensors import IGNORE_INDEX
from flexkd.errors import RecipeError, TrainingError
from flexkd.recipe import Recipe

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
        self._name = term.loss if term is not None and term.loss in STATISTICS else None
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


def check_pass_size(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a recipe in which no pass can have enough positions for its feature term.

    Args:
        recipe: Says how many rows go into one pass, and which positions count.
        rows: Features of the training rows.

    Raises:
        RecipeError: The longest rows together have too few positions.
    """
    features, training = recipe.objective.features, recipe.training
    if features is None or features.weight == 0 or features.loss not in STATISTICS or recipe.generation is None:
        return
    size = training.per_device_batch_size or training.batch_size
    counts = sorted((_positions(row, features.positions) for row in rows), reverse=True)[:size]
    if sum(counts) < MINIMUM_POSITIONS:
        key = "batch_size" if training.per_device_batch_size is None else "per_device_batch_size"
        raise RecipeError(
            f"training.{key}: even the longest {len(counts)} rows of one pass have {sum(counts)} positions "
            f"({features.positions}), fewer than the {MINIMUM_POSITIONS} that {features.loss} needs. Use more rows, "
            "objective.features.positions: tokens, or objective.features: null."
        )


def _positions(row: Mapping[str, Any], positions: str) -> int:
    if positions == "tokens":
        return len(row["input_ids"])
    return sum(label != IGNORE_INDEX for label in row["labels"])
