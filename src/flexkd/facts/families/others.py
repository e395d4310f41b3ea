"""What is known of architectures without a row: they can be teachers and students, but no student is cut from them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from flexkd.facts.families.encoder_decoders import T5_TRAITS
from flexkd.facts.families.row import Traits

_ENCODERS: Final = ("albert", "deberta", "ernie", "funnel", "layoutlm", "squeezebert", "xlm")
_ROBERTA_KIND: Final = (
    "camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
)  # fmt: skip
_BART_KIND: Final = ("bigbird_pegasus", "mvp", "plbart")
_T5_KIND: Final = ("mt5", "umt5")

OTHERS: Final[Mapping[str, Traits]] = MappingProxyType(
    {
        **dict.fromkeys(_ENCODERS, Traits("encoder")),
        **dict.fromkeys(_ROBERTA_KIND, Traits("encoder", positions="after_padding")),
        **dict.fromkeys(_BART_KIND, Traits("encoder_decoder", reads_row_end=True)),
        **dict.fromkeys(_T5_KIND, T5_TRAITS),
    }
)
"""Traits of architectures without a row in `FAMILIES`, by model_type; of those that are not here, nothing is known."""
