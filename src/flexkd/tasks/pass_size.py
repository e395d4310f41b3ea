"""Whether a pass over the training rows has enough positions for the feature term of a recipe."""

from collections.abc import Mapping, Sequence
from typing import Any

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.errors import RecipeError
from flexkd.facts.losses import FEATURE_LOSS_FACTS, MINIMUM_POSITIONS
from flexkd.recipe import Recipe


def check_pass_size(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a recipe in which no pass can have enough positions for its feature term.

    Args:
        recipe: Says how many rows go into one pass, and which positions count.
        rows: Features of the training rows.

    Raises:
        RecipeError: The longest rows together have too few positions.
    """
    features, training = recipe.objective.features, recipe.training
    if features is None or features.weight == 0 or recipe.generation is None:
        return
    if not FEATURE_LOSS_FACTS[features.loss].is_statistic:
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
