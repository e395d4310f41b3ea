"""Classifiers whose head reads the last end of text of a row, and what their rows must hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from flexkd.errors import DataError, UnsupportedModelError
from flexkd.facts.families.table import traits_of


def row_end(config: Mapping[str, Any], *, where: str = "model") -> int | None:
    """The id at which the head of such a classifier reads; None for every other model.

    Args:
        config: Content of its config.json.
        where: Names the model in errors.

    Raises:
        UnsupportedModelError: The config names no end of text, or several.
    """
    if not traits_of(config).reads_row_end:
        return None
    end = config.get("eos_token_id")
    if isinstance(end, bool) or not isinstance(end, int):
        raise UnsupportedModelError(
            f"{where}: a classifier of kind {config['model_type']} reads its classes at one end of text, and "
            f"config.eos_token_id is {end!r}. Set it to the id that its tokenizer ends a row with."
        )
    return end


def check_row_ends(counts: Sequence[int], end: int, *, where: str, names: Sequence[str] | None = None) -> None:
    """Refuse rows that such a classifier cannot read together.

    Args:
        counts: How often each row holds the end of text.
        end: Its id.
        where: Names the model in errors.
        names: Names of the rows; None: they are numbered.

    Raises:
        DataError: A row holds none, or more than another row.
    """
    if not counts or (min(counts) == max(counts) and counts[0] > 0):
        return
    usual = max(set(counts), key=counts.count)
    odd = [index for index, count in enumerate(counts) if count == 0 or (0 not in counts and count != usual)]
    first = f"row {odd[0]} of the batch" if names is None else names[odd[0]]
    reads = f"{where}: its head reads each row at the last end of text (id {end})"
    share = f"{len(odd):,} of {len(counts):,} rows"
    if 0 in counts:
        raise DataError(
            f"{reads}, and {share} hold none (first {first}). Name a tokenizer that ends every row with it."
        )
    raise DataError(
        f"{reads}, of which all rows must hold as many: {share} do not hold {usual} (first {first}). Take the token "
        "out of the texts."
    )
