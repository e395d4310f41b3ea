"""The base class of all sections of a recipe, and the names that their keys accept."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, WrapValidator

from flexkd.facts.losses import FEATURE_LOSS_FACTS, LOGIT_LOSS_FACTS
from flexkd.facts.own_scores import OWN_SCORES

TaskType = Literal["classification", "instruction", "summarization"]
Problem = Literal["single_label", "multi_label", "regression", "generation"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal["linear", "cosine", "constant"]
Attribution = Annotated[
    Literal["gradient", "gradient_x_activation", "fisher"],
    # Attributions that are registered are accepted too.
    WrapValidator(lambda value, handler: value if isinstance(value, str) and value in OWN_SCORES else handler(value)),
]
ChosenBy = Literal["scores", "variance", "activation", "random", "lowest"]

# The choices come from the tables of losses, so a type checker sees only text.
if TYPE_CHECKING:
    LogitLoss = str
    FeatureLoss = str
else:
    LogitLoss = Literal[tuple(LOGIT_LOSS_FACTS)]
    # Losses that are registered later are accepted too.
    FeatureLoss = Annotated[
        Literal[tuple(FEATURE_LOSS_FACTS)],
        WrapValidator(
            lambda value, handler: value if isinstance(value, str) and value in FEATURE_LOSS_FACTS else handler(value)
        ),
    ]


class Section(BaseModel):
    """A frozen section of a recipe, which refuses unknown keys; field docstrings become field descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
