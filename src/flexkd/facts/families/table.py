"""The table of the architectures that can be cut, by model type, and what is known of any other."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from flexkd.facts.families.decoders import DECODERS
from flexkd.facts.families.encoder_decoders import ENCODER_DECODERS
from flexkd.facts.families.encoders import ENCODERS
from flexkd.facts.families.others import OTHERS
from flexkd.facts.families.row import Family, Traits

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {family.model_type: family for family in (*ENCODERS, *DECODERS, *ENCODER_DECODERS)}
)
"""Every architecture that can be sliced, by its config's model_type."""

TRAITS: Final[Mapping[str, Traits]] = MappingProxyType(
    {**OTHERS, **{name: family.traits for name, family in FAMILIES.items()}}
)
"""What is true of every architecture of which something is known, by its config's model_type."""


_USUAL_SIZE_KEYS: Final = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "num_encoder_layers": "encoder_layers",
}
"""Config keys of the sizes of most architectures, by flexkd's names for them."""


def traits_of(config: Mapping[str, Any]) -> Traits:
    """What is true of the architecture of a config.json; the defaults where nothing is known of it."""
    return TRAITS.get(str(config.get("model_type")), Traits())


def family_can_rotate(model_type: str) -> bool:
    """Whether a teacher of this architecture can be turned into the basis of its own directions."""
    return model_type in FAMILIES and FAMILIES[model_type].can_rotate


def size_keys(model_type: str) -> dict[str, str]:
    """Config keys of the sizes of an architecture by flexkd's names for them, the usual ones where it has no row."""
    family = FAMILIES.get(model_type)
    if family is None:
        return dict(_USUAL_SIZE_KEYS)
    keys = {
        "hidden_size": family.hidden_key,
        "num_layers": family.layers_key,
        "num_heads": family.heads_key,
        "num_key_value_heads": family.kv_heads_key,
        "intermediate_size": family.intermediate_key,
        "num_encoder_layers": None if family.encoder is None else family.encoder.layers_key,
    }
    return _USUAL_SIZE_KEYS | {name: key for name, key in keys.items() if key is not None}
