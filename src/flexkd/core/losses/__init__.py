"""Pure, unreduced losses; weights, temperatures squared and means belong to the objective."""

from typing import TYPE_CHECKING

from flexkd.core.losses import alignment, correlations, distances, lens, logit
from flexkd.core.losses.alignment import *  # noqa: F403 (a loss is exported by the module that it stands in)
from flexkd.core.losses.correlations import *  # noqa: F403
from flexkd.core.losses.distances import *  # noqa: F403
from flexkd.core.losses.feature import FEATURE_LOSSES as FEATURE_LOSSES
from flexkd.core.losses.lens import *  # noqa: F403
from flexkd.core.losses.logit import *  # noqa: F403
from flexkd.core.losses.projector import Projector as Projector
from flexkd.facts.losses import MINIMUM_POSITIONS as MINIMUM_POSITIONS

# Type checkers read the names off the imports above.
if not TYPE_CHECKING:
    __all__ = [  # noqa: PLE0604 (lists of strings are joined)
        "FEATURE_LOSSES",
        "MINIMUM_POSITIONS",
        "Projector",
        *alignment.__all__,
        *correlations.__all__,
        *distances.__all__,
        *lens.__all__,
        *logit.__all__,
    ]
