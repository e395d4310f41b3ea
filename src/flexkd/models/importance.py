"""Which units, heads, feed-forward units and blocks of a teacher a student keeps, each by a written importance."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.selection import select_units
from flexkd.models.families import family_of
from flexkd.models.family import PARTS, Axis, Family, block_number, with_block_number
from flexkd.models.shape import StudentShape, axis_sizes, head_dim_of, shape_of

Means = Mapping[str, Float64[Tensor, "*shape"]]
"""What `calibration.measure` found, by module path; empty where nothing was measured."""


class KeptInBlock(NamedTuple):
    """What is kept of one of the teacher's blocks: its number, from 0, and the indices on each of its axes."""

    block: int
    indices: Mapping[Axis, Int64[Tensor, " kept"]]


@dataclass(frozen=True)
class Kept:
    """Where in the teacher everything of a student comes from; head indices count heads x head_dim."""

    residual: Int64[Tensor, " units"]
    pooled: Int64[Tensor, " units"]
    blocks: tuple[KeptInBlock, ...]

    def along(self, axis: Axis, block: int | None) -> Int64[Tensor, " kept"] | None:
        """The teacher's indices on one axis in the student's block; None keeps the axis whole."""
        if axis == "residual":
            return self.residual
        if axis == "pooled":
            return self.pooled
        if axis is None or block is None:
            return None
        return self.blocks[block].indices[axis]


def choose_kept(
    teacher: PreTrainedModel,
    shape: StudentShape,
    units: Int64[Tensor, " units"],
    layers: Sequence[int] | None,
    means: Means,
) -> Kept:
    """Everything that a student of this shape keeps; each choice breaks ties towards the lower index.

    Args:
        units: Kept units of the residual stream; the importance of a head or feed-forward unit is what it writes there.
        layers: Kept blocks, counted from 1; by default the most important ones.
        means: Measured statistics. Without any, importances come from the weights alone.
    """
    weights = _Weights(teacher, units)
    total = shape_of(teacher.config).num_layers
    if layers is not None:
        blocks = [layer - 1 for layer in layers]
    elif means:
        changes = torch.stack([means[weights.family.block_path(block)] for block in range(total)])
        blocks = select_units(changes, shape.num_layers).tolist()
    else:
        blocks = spaced_blocks(total, shape.num_layers)
    return Kept(
        residual=units,
        pooled=_kept_pooled(weights, shape, means),
        blocks=tuple(_kept_in_block(weights, shape, block, means) for block in blocks),
    )


def spaced_blocks(total: int, kept: int) -> list[int]:
    """Blocks, counted from 0, evenly spaced, with the last among them.

    Example:
        >>> spaced_blocks(6, 3), spaced_blocks(6, 4)
        ([1, 3, 5], [0, 2, 3, 5])
    """
    return [(number * total) // kept - 1 for number in range(1, kept + 1)]


def unit_weights(teacher: PreTrainedModel) -> Float64[Tensor, " hidden"]:
    """Importance of the residual stream's units without any data: the sum of the squares of all weights on each unit.

    Over every matrix that reads from the stream or writes to it, embeddings included. Norm scales and biases do not
    count. A stand-in for scores (`select_units`), which know the task.
    """
    family = family_of(teacher)
    total = torch.zeros(shape_of(teacher.config).hidden_size, dtype=torch.float64)
    for name, parameter in teacher.named_parameters():
        axes = family.parameter_axes(name, teacher.config)
        if len(axes) == 2 and "residual" in axes:
            across = 1 - axes.index("residual")
            total += (
                torch.linalg.vector_norm(parameter.detach(), dim=across, dtype=torch.float32).double().square().cpu()
            )
    return total


class _Weights:
    """The teacher's matrices in float64, cut to the kept units of the residual stream."""

    def __init__(self, teacher: PreTrainedModel, units: Int64[Tensor, " units"]) -> None:
        self.family: Family = family_of(teacher)
        self.config = teacher.config
        self.head_dim = head_dim_of(teacher.config)
        self.shape = shape_of(teacher.config)
        self._parameters = dict(teacher.named_parameters(remove_duplicate=False))
        self._units = units

    def matrix(self, module: str) -> Float64[Tensor, "outputs inputs"]:
        weight = self._parameters[f"{module}.weight"].detach()
        weight = weight.T if self.family.is_transposed(module) else weight
        for axis, kind in enumerate(self.family.module_axes(module, self.config) or ()):
            if kind == "residual":
                weight = weight.index_select(axis, self._units.to(weight.device))
        return weight.double().cpu()

    def module(self, *axes: Axis, block: int | None = None) -> str:
        (pattern,) = self.family.modules_with(*axes)
        return pattern if block is None else with_block_number(pattern, block)

    def values(self, block: int) -> Float64[Tensor, "kv_heads head_dim units"]:
        """What each key-value head reads from the stream and hands to its queries."""
        name = with_block_number(self.family.value, block)
        rows = self.matrix(name)
        if self.family.modules[self.family.value][0] == "query_key_value_by_head":
            return torch.unflatten(rows, 0, (-1, 3, self.head_dim))[:, 2]
        # Alone, or the last part of a fused axis.
        return torch.unflatten(rows[-self.shape.num_key_value_heads * self.head_dim :], 0, (-1, self.head_dim))

    def incoming(self, block: int) -> list[Float64[Tensor, "feed_forward units"]]:
        """The matrices that feed the feed-forward units: one, or two where one gates the other."""
        alone = [
            self.matrix(with_block_number(name, block)) for name in self.family.modules_with("feed_forward", "residual")
        ]
        fused = [
            self.matrix(with_block_number(name, block)) for name in self.family.modules_with("gate_up", "residual")
        ]
        return alone + [part for both in fused for part in both.chunk(2)]


def _kept_in_block(weights: _Weights, shape: StudentShape, block: int, means: Means) -> KeptInBlock:
    teacher = weights.shape
    heads = torch.arange(teacher.num_heads)
    kv_heads = torch.arange(teacher.num_key_value_heads)
    feed_forward = torch.arange(teacher.intermediate_size)
    if shape.num_heads < teacher.num_heads:
        heads, kv_heads = _kept_heads(head_importance(weights, block, means), teacher, shape)
    if shape.intermediate_size < teacher.intermediate_size:
        output = weights.module("residual", "feed_forward", block=block)
        importance = _unit_importance(weights, output, weights.incoming(block), means)
        feed_forward = select_units(importance, shape.intermediate_size)
    alone: dict[Axis, Tensor] = {
        "heads": _expand(heads, weights.head_dim),
        "kv_heads": _expand(kv_heads, weights.head_dim),
        "feed_forward": feed_forward,
        "query_key_value_by_head": _expand(heads, 3 * weights.head_dim),
    }
    return KeptInBlock(block, alone | _fused(alone, axis_sizes(weights.config, teacher)))


def _kept_pooled(weights: _Weights, shape: StudentShape, means: Means) -> Int64[Tensor, " units"]:
    if shape.hidden_size == weights.shape.hidden_size or not weights.family.modules_with("pooled", "residual"):
        return torch.arange(shape.hidden_size)
    output = weights.module(None, "pooled")
    importance = _unit_importance(weights, output, [weights.matrix(weights.module("pooled", "residual"))], means)
    return select_units(importance, shape.hidden_size)


def head_importance(weights: _Weights, block: int, means: Means) -> Float64[Tensor, " heads"]:
    """Mean squared norm of what each head writes to the kept units: `E ||W_o c||^2 = tr(W_o^T W_o E[c c^T])`.

    `c` is what the head hands to the output projection. Without measured moments those of white noise stand in:
    `E[c c^T] = W_v W_v^T`, a head that looks at one token whose state is white; the importance is then the squared
    Frobenius norm of the head's value-output product.
    """
    name = weights.module("residual", "heads", block=block)
    output = torch.unflatten(weights.matrix(name), 1, (-1, weights.head_dim))
    written = torch.einsum("uhi,uhj->hij", output, output)
    moments = means.get(name)
    if moments is None:
        value = weights.values(block)
        queries = weights.shape.num_heads // weights.shape.num_key_value_heads
        moments = torch.einsum("hiu,hju->hij", value, value).repeat_interleave(queries, 0)
    return (written * moments).sum((1, 2))


def _unit_importance(
    weights: _Weights, output: str, inputs: Sequence[Float64[Tensor, "units read"]], means: Means
) -> Float64[Tensor, " units"]:
    """Mean absolute activation of each unit times the norm of the weights that carry it on.

    Without a measured activation the product of the norms of the unit's incoming weights stands in.
    """
    outgoing: Tensor = weights.matrix(output).norm(dim=0)
    if output in means:
        return means[output] * outgoing
    return torch.stack([matrix.norm(dim=1) for matrix in inputs]).prod(0) * outgoing


def _kept_heads(
    importance: Float64[Tensor, " heads"], teacher: StudentShape, shape: StudentShape
) -> tuple[Int64[Tensor, " kept_heads"], Int64[Tensor, " kept_kv_heads"]]:
    """Key-value heads by the sum of their best queries that can stay, and those queries of each, in order."""
    groups = importance.reshape(teacher.num_key_value_heads, -1)
    queries = shape.num_heads // shape.num_key_value_heads
    kv_heads = select_units(groups.topk(queries, dim=1).values.sum(1), shape.num_key_value_heads)
    heads = [group * groups.shape[1] + select_units(groups[group], queries) for group in kv_heads.tolist()]
    return torch.cat(heads), kv_heads


def _expand(heads: Int64[Tensor, " heads"], head_dim: int) -> Int64[Tensor, " rows"]:
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _fused(alone: Mapping[Axis, Tensor], sizes: Mapping[Axis, int]) -> dict[Axis, Tensor]:
    """Indices on the fused axes of a block, from those on its plain ones."""
    found: dict[Axis, Tensor] = {}
    for fused, parts in PARTS.items():
        offsets = [0, *itertools.accumulate(sizes[part] for part in parts)]
        found[fused] = torch.cat([alone[part] + offset for part, offset in zip(parts, offsets, strict=False)])
    return found


def teacher_name(name: str, kept: Kept) -> str:
    """Name, in the teacher, of a student's parameter."""
    block = block_number(name)
    return name if block is None else with_block_number(name, kept.blocks[block].block)
