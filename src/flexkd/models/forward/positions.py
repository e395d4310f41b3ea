"""How many tokens a model's positions hold, read from its config.json without transformers."""

from collections.abc import Mapping
from typing import Any, Final

_AFTER_PADDING: Final = (
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "ibert",
    "longformer", "mpnet", "xmod",
)  # fmt: skip
"""Architectures that number their positions from the padding id + 1 on."""

_ROTARY: Final = (
    "gemma2", "gemma3_text", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3",
)  # fmt: skip
"""Architectures whose older configs do not say that their positions are rotary."""

_RELATIVE: Final = ("t5", "mt5", "umt5")
"""Architectures with distances in buckets, the last of which has no end."""


def position_limit(config: Mapping[str, Any]) -> int | None:
    """Tokens that the positions hold; None where nothing is said. RoBERTa's first ones are never used."""
    limit = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(limit, int):
        return None
    unused = int(config.get("pad_token_id") or 0) + 1 if config.get("model_type") in _AFTER_PADDING else 0
    return limit - unused


def is_rotary(config: Mapping[str, Any]) -> bool:
    """Whether a longer row runs, and is read badly; with learned positions it fails deep inside training."""
    # DeBERTa has distances in buckets, too, and learned positions beside them only where it says so.
    is_relative = config.get("position_biased_input") is False or config.get("model_type") in _RELATIVE
    return is_relative or config.get("model_type") in _ROTARY or any(key.startswith("rope_") for key in config)
