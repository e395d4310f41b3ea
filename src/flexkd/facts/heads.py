"""What a config says that a language model does to the output of its head: it multiplies it, and caps it."""

from dataclasses import dataclass
from typing import Any, Final

_FACTORS: Final = ("logit_scale", "lm_head_multiplier")
_DIVISORS: Final = ("logits_scaling",)
_CAP: Final = "final_logit_softcapping"


@dataclass(frozen=True)
class LogitChange:
    """What is done to the output of a head: multiplied by the factor, then bent by `cap * tanh(logits / cap)`.

    Attributes:
        cap: None: there is none, and the head is a linear map still.
    """

    factor: float = 1.0
    cap: float | None = None


def logit_change(config: Any) -> LogitChange:
    """What a config says of the logits of its language model; a key that it lacks changes nothing.

    Args:
        config: As transformers loads it, with the defaults of its architecture.
    """
    text_config = config.get_text_config(decoder=True)
    factor = 1.0
    for key in _FACTORS:
        factor *= _number(text_config, key) or 1.0
    for key in _DIVISORS:
        factor /= _number(text_config, key) or 1.0
    return LogitChange(factor, _number(text_config, _CAP) or None)


def _number(config: Any, key: str) -> float | None:
    value = getattr(config, key, None)
    return value if isinstance(value, int | float) else None
