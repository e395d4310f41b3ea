"""The table of the architectures that can be cut, by model type."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from flexkd.facts.families.decoders import DECODERS
from flexkd.facts.families.encoder_decoders import ENCODER_DECODERS
from flexkd.facts.families.encoders import ENCODERS
from flexkd.facts.families.row import Family

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {family.model_type: family for family in (*ENCODERS, *DECODERS, *ENCODER_DECODERS)}
)
"""Every architecture that can be sliced, by its config's model_type."""
