"""The units, heads, feed-forward units and blocks of a teacher that a student keeps: those of highest importance."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.selection import select_units
from flexkd.facts.families.row import PARTS, Axis, Family, Stack, with_block_number
from flexkd.models.forward.families import family_of
from flexkd.models.slicing.axes import BlockIndices, TeacherIndices
from flexkd.models.slicing.shape import StudentShape, axis_sizes, head_dim_of, shape_of

Means = Mapping[str, Float64[Tensor, "*shape"]]
"""Results of `calibration.measure` by module path; empty where nothing was measured."""


def choose_indices(
    teacher: PreTrainedModel,
    shape: StudentShape,
    units: Int64[Tensor, " units"],
    layers: Sequence[int] | None,
    means: Means,
) -> TeacherIndices:
    """Everything that a student of this shape keeps; each choice breaks ties towards the lower index.

    Args:
        units: Kept units of the residual stream; the importance of a head or feed-forward unit is what it writes there.
        layers: Kept blocks before the head, counted from 1; by default the most important ones.
        means: Measured statistics. Without any, importances come from the weights alone.
    """
    weights = _Weights(teacher, units)
    family, whole = weights.family, weights.shape
    blocks = [layer - 1 for layer in layers or ()]
    if layers is None:
        blocks = _select_blocks(family, family.stack, whole.num_layers, shape.num_layers, means)
    encoder_blocks: tuple[BlockIndices, ...] = ()
    if family.encoder is not None and whole.num_encoder_layers is not None and shape.num_encoder_layers is not None:
        numbers = _select_blocks(family, family.encoder, whole.num_encoder_layers, shape.num_encoder_layers, means)
        encoder_blocks = _select_in_blocks(weights, shape, family.encoder, numbers, means)
    return TeacherIndices(
        family=family,
        residual=units,
        pooled=_select_pooled(weights, shape, means),
        blocks=_select_in_blocks(weights, shape, family.stack, blocks, means),
        encoder_blocks=encoder_blocks,
    )


def _select_blocks(family: Family, stack: Stack, total: int, num_kept: int, means: Means) -> list[int]:
    if not means:
        return spaced_blocks(total, num_kept, keeps_first=family.keeps_first_block)
    changes = torch.stack([means[stack.block(block)] for block in range(total)])
    if family.keeps_first_block:
        changes[0] = 3.0  # more than any change, which is 2 at most
    blocks: list[int] = select_units(changes, num_kept).tolist()
    return blocks


def spaced_blocks(total: int, num_kept: int, *, keeps_first: bool = False) -> list[int]:
    """Blocks, counted from 0, evenly spaced, with the last among them, or the first and, if it can be, the last.

    Example:
        >>> spaced_blocks(6, 3), spaced_blocks(6, 4), spaced_blocks(6, 3, keeps_first=True)
        ([1, 3, 5], [0, 2, 3, 5], [0, 2, 5])
    """
    if keeps_first:
        return [0, *(1 + block for block in spaced_blocks(total - 1, num_kept - 1))]
    return [(number * total) // num_kept - 1 for number in range(1, num_kept + 1)]


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

    def module(self, *axes: Axis, stack: Stack | None = None, block: int | None = None) -> str:
        (pattern,) = self.family.modules_with(*axes, stack=stack)
        return pattern if block is None else with_block_number(pattern, block)

    def values(self, value: str, block: int) -> Float64[Tensor, "kv_heads head_dim units"]:
        """What each key-value head reads from the stream and passes to its queries."""
        rows = self.matrix(with_block_number(value, block))
        if self.family.modules[value][0] == "query_key_value_by_head":
            return torch.unflatten(rows, 0, (-1, 3, self.head_dim))[:, 2]
        # Alone, or the last part of a fused axis.
        return torch.unflatten(rows[-self.shape.num_key_value_heads * self.head_dim :], 0, (-1, self.head_dim))

    def incoming(self, stack: Stack, block: int) -> list[Float64[Tensor, "feed_forward units"]]:
        """The matrices that feed the feed-forward units: one, or two where one gates the other."""
        alone = self._present("feed_forward", stack, block)
        fused = self._present("gate_up", stack, block)
        return alone + [part for matrix in fused for part in matrix.chunk(2)]

    def _present(self, axis: Axis, stack: Stack, block: int) -> list[Tensor]:
        """T5 has one matrix or two by its config, and the table has all three."""
        names = [with_block_number(name, block) for name in self.family.modules_with(axis, "residual", stack=stack)]
        return [self.matrix(name) for name in names if f"{name}.weight" in self._parameters]


def _select_in_blocks(
    weights: _Weights, shape: StudentShape, stack: Stack, blocks: Sequence[int], means: Means
) -> tuple[BlockIndices, ...]:
    cut = partial(_select_in_block, weights, shape, stack, means=means)
    if shape.num_heads == weights.shape.num_heads:
        return tuple(cut(block, None) for block in blocks)
    importances = [head_importance(weights, stack, block, means) for block in blocks]
    if any("each_head" in axes and stack.holds(name) for name, axes in weights.family.modules.items()):
        # Every block adds the first one's bias to its heads, so that head i must be the same one in all.
        importances = [torch.stack(importances).sum(0)] * len(blocks)
    return tuple(cut(block, importance) for block, importance in zip(blocks, importances, strict=True))


def _select_in_block(
    weights: _Weights,
    shape: StudentShape,
    stack: Stack,
    block: int,
    importance: Float64[Tensor, " heads"] | None,
    *,
    means: Means,
) -> BlockIndices:
    teacher = weights.shape
    heads = cross_heads = torch.arange(teacher.num_heads)
    kv_heads = torch.arange(teacher.num_key_value_heads)
    feed_forward = torch.arange(teacher.intermediate_size)
    if importance is not None:
        heads, kv_heads = _select_heads(importance, teacher, shape)
        if weights.family.modules_with("residual", "cross_heads", stack=stack):
            cross = head_importance(weights, stack, block, means, axis="cross_heads")
            cross_heads = select_units(cross, shape.num_heads)
    if shape.intermediate_size < teacher.intermediate_size:
        output = weights.module("residual", "feed_forward", stack=stack, block=block)
        units = _unit_importance(weights, output, weights.incoming(stack, block), means)
        feed_forward = select_units(units, shape.intermediate_size)
    alone: dict[Axis, Tensor] = {
        "heads": _expand(heads, weights.head_dim),
        "kv_heads": _expand(kv_heads, weights.head_dim),
        "cross_heads": _expand(cross_heads, weights.head_dim),
        "each_head": heads,
        "feed_forward": feed_forward,
        "query_key_value_by_head": _expand(heads, 3 * weights.head_dim),
    }
    return BlockIndices(block, alone | _fused(alone, axis_sizes(weights.config, teacher)))


def _select_pooled(weights: _Weights, shape: StudentShape, means: Means) -> Int64[Tensor, " units"]:
    if shape.hidden_size == weights.shape.hidden_size or not weights.family.modules_with("pooled", "residual"):
        return torch.arange(shape.hidden_size)
    output = weights.module(None, "pooled")
    importance = _unit_importance(weights, output, [weights.matrix(weights.module("pooled", "residual"))], means)
    return select_units(importance, shape.hidden_size)


def head_importance(
    weights: _Weights, stack: Stack, block: int, means: Means, *, axis: Axis = "heads"
) -> Float64[Tensor, " heads"]:
    """Mean squared norm of what each head writes to the kept units: `E ||W_o c||^2 = tr(W_o^T W_o E[c c^T])`.

    `c` is what the head hands to the output projection. Without measured moments those of white noise stand in:
    `E[c c^T] = W_v W_v^T`, a head that looks at one token whose state is white; the importance is then the squared
    Frobenius norm of the head's value-output product.
    """
    name = weights.module("residual", axis, stack=stack, block=block)
    output = torch.unflatten(weights.matrix(name), 1, (-1, weights.head_dim))
    written = torch.einsum("uhi,uhj->hij", output, output)
    moments = means.get(name)
    if moments is None:
        pattern = stack.value if axis == "heads" else weights.family.cross_value
        assert pattern is not None, axis
        value = weights.values(pattern, block)
        queries = weights.shape.num_heads // len(value)
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


def _select_heads(
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
    indices: dict[Axis, Tensor] = {}
    for fused, parts in PARTS.items():
        offsets = [0, *itertools.accumulate(sizes[part] for part in parts)]
        indices[fused] = torch.cat([alone[part] + offset for part, offset in zip(parts, offsets, strict=False)])
    return indices
