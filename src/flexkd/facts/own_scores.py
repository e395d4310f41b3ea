"""Attributions of users: what a unit's gradient and state count, registered by name."""

from collections.abc import Callable
from typing import Any, Final

OWN_SCORES: Final[dict[str, Callable[[Any, Any], Any]]] = {}
"""Functions of gradients and states by the name of their attribution, which `core.scores.register_score` fills."""
