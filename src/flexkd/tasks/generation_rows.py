"""Notes on the encoded rows of a text task, and a check that one pass over them has enough positions."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.data.encoding.encoded import EncodedRow, EncodedSplit
from flexkd.data.encoding.prompts import PromptFormat
from flexkd.data.examples.row_checks import count_reasons
from flexkd.errors import RecipeError
from flexkd.facts.losses import FEATURE_LOSS_FACTS, MINIMUM_POSITIONS
from flexkd.recipe import Recipe


def shown_row(
    row: EncodedRow, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, *, seq2seq: bool
) -> str:
    """One training row as the models read it, with its special tokens, for the log."""
    answer = [token for token in row["labels"] if token >= 0]
    prompt = row["input_ids"] if seq2seq else row["input_ids"][: -len(answer)]
    is_chat = prompt_format.kind == "chat"
    how = f"with the chat template of the {prompt_format.owner}" if is_chat else "in a plain layout"
    text = f"{tokenizer.decode(prompt)!r}, and the answer {tokenizer.decode(answer)!r}"
    return f"prompts are written {how}; row {row['id']}: {text}"


def notes_on_rows(encoded: Mapping[str, EncodedSplit]) -> list[str]:
    """Notes on the rows of each split: unusual ones, and those that are left out."""
    notes = [f"{name}: {text}" for name, split in encoded.items() for text in split.notes]
    for name, split in encoded.items():
        if split.dropped:
            reasons = ", ".join(f"{reason}: {number:,}" for reason, number in count_reasons(split.dropped).items())
            notes.append(f"{name}: {len(split.dropped):,} rows do not fit and are left out ({reasons}).")
    return notes


def check_pass_size(recipe: Recipe, rows: Sequence[EncodedRow]) -> None:
    """Refuse a recipe in which no pass can have enough positions for its feature term.

    Args:
        recipe: Sets the number of rows of one pass, and which positions count.
        rows: The training rows.

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


def _positions(row: EncodedRow, positions: str) -> int:
    if positions == "tokens":
        return len(row["input_ids"])
    return sum(label != IGNORE_INDEX for label in row["labels"])
