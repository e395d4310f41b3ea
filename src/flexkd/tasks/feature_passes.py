"""Positions of the feature term in each pass of a training, counted on the encoded rows before anything is loaded."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedConfig

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.errors import RecipeError
from flexkd.facts.families.table import FAMILIES
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.recipe import Recipe
from flexkd.training.arguments import num_steps
from flexkd.training.sampler import LengthGroupedOrder


def check_passes(recipe: Recipe, rows: Sequence[EncodedRow], student: PreTrainedConfig) -> list[str]:
    """Refuse a recipe in which no pass has enough positions for its feature loss; say how many passes have too few.

    A pass is one forward over the rows of one device: a step has several where it accumulates, and the last one of an
    epoch is short. A recipe runs in one process; a trainer in several counts the positions of all of them together.

    Args:
        recipe: Sets the rows of a pass and their order, the number of steps, and which positions count.
        rows: The training rows.
        student: Config of the student, or of the teacher that it is cut from.

    Returns:
        One note where some passes have too few positions, else none. With a limit in minutes it counts all planned
        passes.

    Raises:
        RecipeError: Every pass has too few positions, so that no features would be taught.
    """
    features = recipe.objective.features
    minimum = 0 if features is None or features.weight == 0 else FEATURE_LOSS_FACTS[features.loss].minimum_positions
    if features is None or minimum == 0 or not rows:
        return []
    positions = row_positions(recipe, rows, student)
    if _fewest(positions, recipe) >= minimum:
        return []
    counts = pass_positions(recipe, positions, [len(row["input_ids"]) for row in rows])
    num_short, fullest = int((counts < minimum).sum()), int(counts.max())
    key = "batch_size" if recipe.training.per_device_batch_size is None else "per_device_batch_size"
    if num_short == len(counts):
        tokens = "" if features.positions == "tokens" else "objective.features.positions: tokens, or "
        raise RecipeError(
            f"training.{key}: the fullest of {len(counts):,} passes has {fullest} positions ({features.positions}), "
            f"fewer than the {minimum} that {features.loss} needs, so that no features are taught. Use more rows, "
            f"{tokens}objective.features: null."
        )
    if num_short == 0:
        return []
    return [
        f"features: {num_short:,} of {len(counts):,} planned passes have fewer than the {minimum} positions "
        f"({features.positions}) that {features.loss} needs, and teach no features. More rows in a pass "
        f"(training.{key}), or a number that leaves no short pass at the end of an epoch, avoids it."
    ]


def row_positions(recipe: Recipe, rows: Sequence[EncodedRow], student: PreTrainedConfig) -> Int64[Tensor, " rows"]:
    """Positions of each row at which the states of teacher and student are compared.

    Args:
        recipe: Says which positions count: all tokens, or those that a label is predicted from.
        rows: The training rows.
        student: As in `check_passes`.
    """
    features = recipe.objective.features
    is_every_token = features is not None and features.positions == "tokens"
    if recipe.generation is not None:
        # The labels of a decoder are as long as its tokens; those of an encoder-decoder are its decoder's tokens.
        return torch.tensor([_num_labels(row, is_every_token) for row in rows])
    family = FAMILIES.get(student.model_type)
    # The head of a classifier reads one position of a row, or the mean of all tokens.
    is_every_token |= family is not None and family.read_positions(student) == "all"
    return torch.tensor([len(row["input_ids"]) if is_every_token else 1 for row in rows])


def _num_labels(row: EncodedRow, is_every_token: bool) -> int:
    return len(row["labels"]) if is_every_token else sum(label != IGNORE_INDEX for label in row["labels"])


def pass_positions(
    recipe: Recipe, positions: Int64[Tensor, " rows"], lengths: Sequence[int]
) -> Int64[Tensor, " passes"]:
    """Positions of every pass of the training, in the order in which they are taken.

    Args:
        recipe: Sets the rows of a step and of a pass, the number of steps and the seed of the order.
        positions: Of each training row.
        lengths: Tokens of each training row, by which the rows of a step are chosen.
    """
    section, size = recipe.training, _pass_size(recipe)
    passes_of_a_step = section.batch_size // size
    steps = num_steps(len(lengths), section.batch_size, section.epochs, section.max_steps)
    order = LengthGroupedOrder(lengths, section.batch_size, section.seed)
    epochs: list[Tensor] = []
    while steps > 0:
        order.set_epoch(len(epochs))
        in_order = positions[torch.tensor(list(order))]
        counts = torch.nn.functional.pad(in_order, (0, -len(in_order) % size)).view(-1, size).sum(1)
        epochs.append(counts[: steps * passes_of_a_step])
        steps -= math.ceil(len(epochs[-1]) / passes_of_a_step)
    return torch.cat(epochs)


def _pass_size(recipe: Recipe) -> int:
    return recipe.training.per_device_batch_size or recipe.training.batch_size


def _fewest(positions: Int64[Tensor, " rows"], recipe: Recipe) -> int:
    """Positions of the rows with fewest, as many as the smallest pass has: no pass has fewer."""
    size = _pass_size(recipe)
    return int(positions.sort().values[: len(positions) % size or size].sum())
