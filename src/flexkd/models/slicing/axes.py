"""The indices in the teacher that each parameter of a student is cut from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Int64
from torch import Tensor

from flexkd.facts.families.row import Axis, Family, block_number, with_block_number


class BlockIndices(NamedTuple):
    """What is kept of one of the teacher's blocks: its number, from 0, and the indices on each of its axes."""

    block: int
    indices: Mapping[Axis, Int64[Tensor, " kept"]]


@dataclass(frozen=True)
class TeacherIndices:
    """Indices in the teacher, blocks by the student's order; those of heads count heads x head_dim."""

    family: Family
    residual: Int64[Tensor, " units"]
    pooled: Int64[Tensor, " units"]
    blocks: tuple[BlockIndices, ...]
    encoder_blocks: tuple[BlockIndices, ...]

    def block_of(self, name: str) -> BlockIndices | None:
        """What is kept of the block that a module or parameter of the student comes from; None outside the blocks."""
        encoder, number = self.family.encoder, block_number(name)
        if number is None:
            return None
        return (self.encoder_blocks if encoder is not None and encoder.holds(name) else self.blocks)[number]

    def along(self, axis: Axis, name: str) -> Int64[Tensor, " kept"] | None:
        """The teacher's indices on one axis of a module or parameter of the student; None keeps the axis whole."""
        if axis == "residual":
            return self.residual
        if axis == "pooled":
            return self.pooled
        block = self.block_of(name)
        return None if axis is None or block is None else block.indices[axis]

    def teacher_name(self, name: str) -> str:
        """Name, in the teacher, of a module or parameter of the student."""
        block = self.block_of(name)
        if block is None or self.family.is_for_all_blocks(name.rpartition(".")[0]):
            return name
        return with_block_number(name, block.block)

    def is_last_block(self, name: str) -> bool:
        """Whether a module or parameter of the student is in the block before its head."""
        return self.family.stack.holds(name) and block_number(name) == len(self.blocks) - 1
