"""How many tokens a model's positions hold, read from its config.json without transformers."""

from collections.abc import Mapping
from typing import Any

from flexkd.facts.families.table import traits_of


def position_limit(config: Mapping[str, Any]) -> int | None:
    """Tokens that the positions hold; None where the config does not say. RoBERTa's first ones are never used."""
    limit = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(limit, int):
        return None
    is_after_padding = traits_of(config).positions == "after_padding"
    return limit - (int(config.get("pad_token_id") or 0) + 1 if is_after_padding else 0)


def has_soft_limit(config: Mapping[str, Any]) -> bool:
    """Whether longer rows run, though badly, as with rotary positions; with learned ones they fail inside training."""
    if traits_of(config).positions in ("rotary", "relative"):
        return True
    # DeBERTa has distances in buckets, too, and learned positions beside them only where it says so.
    return config.get("position_biased_input") is False or any(key.startswith("rope_") for key in config)
