"""A section of a recipe, and the names that its keys may hold."""

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

TaskType = Literal["classification", "instruction", "summarization"]
Problem = Literal["single_label", "multi_label", "regression", "generation"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal["linear", "cosine", "constant"]
LogitLoss = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation", "mse"
]
FeatureLoss = Literal["correlation", "cross_correlation", "projector", "cka", "mse", "cosine", "functional_cka"]
Attribution = Literal["gradient", "gradient_x_activation", "fisher", "activation", "variance", "random"]

UNIT_WISE_LOSSES: Final = ("correlation", "cross_correlation", "mse", "cosine")
"""Feature losses that compare unit i with unit i, and so need pairs."""

GENERATION_TASKS: Final = ("instruction", "summarization")
"""Tasks in which a model writes text; their problem is `generation`."""

# evaluate/ computes these; it stands on a higher floor and imports torch, so a test compares the two.
METRIC_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "single_label": ("accuracy", "macro_f1", "matthews_correlation", "calibration_error", "nll"),
    "multi_label": ("micro_f1", "macro_f1", "subset_accuracy", "calibration_error"),
    "regression": ("pearson", "spearman", "mse"),
    "generation": ("rougeL", "rouge1", "rouge2", "rougeLsum", "nll", "perplexity", "token_agreement"),
}
"""Metrics of each problem; the first is the default."""

_DISTRIBUTIONS: Final = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation")

LOGIT_LOSSES_OF: Final[dict[str, tuple[str, ...]]] = {
    "single_label": _DISTRIBUTIONS,
    "multi_label": ("forward_kl",),
    "regression": ("mse",),
    "generation": _DISTRIBUTIONS,
}
"""Logit losses that fit each problem."""


class Section(BaseModel):
    """A frozen group of keys that refuses unknown ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
