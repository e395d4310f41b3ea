"""Pure, unreduced losses; weights, temperatures squared and means belong to the objective."""

from flexkd.core.losses.feature import (
    FEATURE_LOSSES,
    MINIMUM_POSITIONS,
    cka,
    correlation,
    cosine,
    cross_correlation,
    functional_cka,
    mse,
)
from flexkd.core.losses.logit import (
    BERNOULLI_LOSSES,
    LOGIT_LOSSES,
    REGRESSION_LOSSES,
    bernoulli_kl,
    forward_kl,
    jensen_shannon,
    mean_squared_error,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from flexkd.core.losses.projector import Projector

__all__ = [
    "BERNOULLI_LOSSES",
    "FEATURE_LOSSES",
    "LOGIT_LOSSES",
    "MINIMUM_POSITIONS",
    "REGRESSION_LOSSES",
    "Projector",
    "bernoulli_kl",
    "cka",
    "correlation",
    "cosine",
    "cross_correlation",
    "forward_kl",
    "functional_cka",
    "jensen_shannon",
    "mean_squared_error",
    "mse",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
]
