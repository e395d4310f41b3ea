"""Which architectures cannot run in float16, known from their config.json alone."""

from collections.abc import Mapping
from typing import Any, Final

from flexkd.errors import UnsupportedModelError

_OVERFLOWING: Final = ("t5", "mt5", "umt5")
"""Trained in bfloat16: their feed-forward states pass float16's largest number, 65504, and the logits become NaN."""


def check_half_precision(config: Mapping[str, Any], precision: str, where: str) -> None:
    """Refuse a model whose states overflow in the precision that it is to run in.

    Args:
        config: Content of its config.json.
        precision: `float32`, `bfloat16`, `float16` or `auto`; only float16 overflows.
        where: Names the setting in errors.

    Raises:
        UnsupportedModelError: T5, mT5 or umT5 in float16.
    """
    if precision == "float16" and config.get("model_type") in _OVERFLOWING:
        raise UnsupportedModelError(
            f"{where}: a {config['model_type']} model overflows in float16. Use bfloat16 or float32."
        )
