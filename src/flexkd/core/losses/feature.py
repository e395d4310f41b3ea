"""The function of each feature loss of `facts.losses`, by name."""

from collections.abc import Callable
from typing import Final

from torch import Tensor

from flexkd.core.losses import alignment, correlations, distances, lens
from flexkd.facts.losses import FEATURE_LOSS_FACTS

FeatureLoss = Callable[..., Tensor]

_FUNCTIONS: Final = {**correlations.LOSSES, **alignment.LOSSES, **distances.LOSSES, **lens.LOSSES}

FEATURE_LOSSES: Final[dict[str, FeatureLoss]] = {name: _FUNCTIONS[name] for name in FEATURE_LOSS_FACTS}
"""Every feature loss, in the order of its facts."""

UNIT_STATISTICS: Final[dict[str, FeatureLoss]] = {
    name: correlations.FROM_MOMENTS[name] for name, facts in FEATURE_LOSS_FACTS.items() if facts.has_live_units
}
"""Losses over units that can be dead, from `PairedMoments`; their mean is over live units."""
