"""Which architectures cannot run in float16, known from their config.json alone."""

from collections.abc import Mapping
from typing import Any

from flexkd.errors import UnsupportedModelError
from flexkd.facts.families.table import traits_of


def check_half_precision(config: Mapping[str, Any], precision: str, where: str) -> None:
    """Refuse a model whose states overflow in the precision that it is to run in.

    Args:
        config: Content of its config.json.
        precision: `float32`, `bfloat16`, `float16` or `auto`; only float16 overflows.
        where: Names the setting in errors.

    Raises:
        UnsupportedModelError: T5, mT5 or umT5 in float16.
    """
    if precision == "float16" and traits_of(config).overflows_in_float16:
        raise UnsupportedModelError(
            f"{where}: a {config['model_type']} model overflows in float16. Use bfloat16 or float32."
        )
