"""The sizes of a student: what a teacher has, what can be asked of it, and what follows from a number of parameters."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from flexkd.errors import ShapeError
from flexkd.models.families import (
    CLASS_SUFFIXES,
    Axis,
    Family,
    Task,
    block_number,
    family_of,
    is_residual_embedding,
)

_BUILDERS: Final = {"classification": AutoModelForSequenceClassification, "causal": AutoModelForCausalLM}


@dataclass(frozen=True)
class StudentShape:
    """Sizes of a transformer. Without grouped-query attention num_key_value_heads equals num_heads."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int


def shape_of(config: PreTrainedConfig) -> StudentShape:
    """The sizes that a config describes."""
    family = family_of(config)
    heads = getattr(config, family.heads_key)
    kv_heads = None if family.kv_heads_key is None else getattr(config, family.kv_heads_key)
    return StudentShape(
        hidden_size=getattr(config, family.hidden_key),
        num_layers=getattr(config, family.layers_key),
        num_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        intermediate_size=getattr(config, family.intermediate_key),
    )


def head_dim_of(config: PreTrainedConfig) -> int:
    """Width of one attention head. A sliced student keeps its teacher's."""
    family = family_of(config)
    explicit = None if family.head_dim_key is None else getattr(config, family.head_dim_key, None)
    shape = shape_of(config)
    return shape.hidden_size // shape.num_heads if explicit is None else int(explicit)


def axis_sizes(config: PreTrainedConfig, shape: StudentShape) -> dict[Axis, int]:
    """Length of every kind of axis in a model of this shape with the config's head_dim."""
    head_dim = head_dim_of(config)
    return {
        "residual": shape.hidden_size,
        "pooled": shape.hidden_size,
        "heads": shape.num_heads * head_dim,
        "kv_heads": shape.num_key_value_heads * head_dim,
        "feed_forward": shape.intermediate_size,
    }


def resolve_shape(
    config: PreTrainedConfig,
    *,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    num_key_value_heads: int | None = None,
    intermediate_size: int | None = None,
) -> StudentShape:
    """The shape of a student cut from a teacher with this config; what is not asked for follows from the width.

    A head keeps the teacher's head_dim. Where the config cannot say so (BERT kind), the width must be a multiple of it
    and num_heads follows. Else the heads scale with the width: among all numbers that can be cut (and that divide the
    width where the config demands it) those that keep the queries of each key-value head come first, then those
    nearest to the proportion. Feed-forward units scale with the width, to the nearest multiple of 8 above 64. Layers
    stay.

    Raises:
        ShapeError: A size is larger than the teacher's, below 1, or cannot be cut.
    """
    teacher = shape_of(config)
    asked = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "intermediate_size": intermediate_size,
    }
    for name, value in asked.items():
        _check_range(name, value, getattr(teacher, name))
    width = teacher.hidden_size if hidden_size is None else hidden_size
    _check_embeddings(config, width)
    fixed = replace(
        teacher,
        hidden_size=width,
        num_layers=teacher.num_layers if num_layers is None else num_layers,
        intermediate_size=_scaled_feed_forward(teacher, width) if intermediate_size is None else intermediate_size,
    )
    if family_of(config).head_dim_key is None:
        heads, kv_heads = _derived_heads(config, width, num_heads, num_key_value_heads)
    else:
        heads, kv_heads = _free_heads(config, width, num_heads, num_key_value_heads)
    return replace(fixed, num_heads=heads, num_key_value_heads=kv_heads)


def derive_shape(
    config: PreTrainedConfig,
    *,
    size: float | None = None,
    max_parameters: int | None = None,
    task: Task | None = None,
) -> StudentShape:
    """The largest student in its teacher's proportions that has no more than a number of parameters.

    The rule: widths are the multiples of the teacher's head_dim, or, where any width can be cut, those multiples of 16
    that let each key-value head keep its queries; a width of w in d has `layers * w / d` layers, rounded down or up,
    at least one; heads and feed-forward units follow as in `resolve_shape`. Of all these shapes the one with most
    parameters that fits is taken, the wider of two equals. Every parameter counts, embeddings and head too, tied ones
    once.

    Args:
        size: Share of the teacher's parameters, above 0 and up to 1.
        max_parameters: Number of parameters. One above the teacher's gives the teacher's shape.
        task: Decides which head is counted; by default what the config's `architectures` say, else the family's first.

    Raises:
        ShapeError: Not exactly one of size and max_parameters, or even the smallest shape does not fit.

    Example:
        >>> from transformers import BertConfig
        >>> derive_shape(BertConfig(), size=0.25)
        StudentShape(hidden_size=384, num_layers=6, num_heads=6, num_key_value_heads=6, intermediate_size=1536)
    """
    if (size is None) == (max_parameters is None):
        raise ShapeError(
            f"derive_shape: needs exactly one of size and max_parameters, got {size} and {max_parameters}. "
            "Leave one of them out."
        )
    if size is not None and not 0 < size <= 1:
        raise ShapeError(f"derive_shape: size {size} is no share of the teacher. Give a number above 0 and up to 1.")
    parameters = _parameter_axes(config, task)
    whole = shape_of(config)
    limit = max_parameters if size is None else math.floor(size * _count(config, whole, parameters))
    counted = {shape: _count(config, shape, parameters) for shape in _proportional_shapes(config)}
    fitting = [shape for shape, count in counted.items() if limit is not None and count <= limit]
    if not fitting:
        smallest = min(counted, key=lambda shape: counted[shape])
        raise ShapeError(
            f"derive_shape: no student of this {config.model_type} has {limit:,} parameters or fewer: the smallest "
            f"(hidden_size {smallest.hidden_size}, num_layers {smallest.num_layers}) has {counted[smallest]:,}. "
            "Ask for at least that many."
        )
    return max(fitting, key=lambda shape: (counted[shape], shape.hidden_size))


def count_parameters(config: PreTrainedConfig, shape: StudentShape, *, task: Task | None = None) -> int:
    """Number of parameters of a model of this shape, tied ones once; no weight is made."""
    return _count(config, shape, _parameter_axes(config, task))


def _check_range(name: str, value: int | None, teacher: int) -> None:
    if value is not None and value > teacher:
        raise ShapeError(
            f"slice_student.{name}: {value} is larger than the teacher's {teacher}. Ask for at most {teacher}, or "
            "start the student from a model or a config (student.start: pretrained or config)."
        )
    if value is not None and value < 1:
        raise ShapeError(f"slice_student.{name}: {value} is too small. Ask for 1 to {teacher}.")


def _check_embeddings(config: PreTrainedConfig, width: int) -> None:
    """A projection between embeddings and stream exists only where their widths differ, so it cannot be cut away."""
    family = family_of(config)
    if family.embedding_key is None or is_residual_embedding(family, config):
        return
    if width == getattr(config, family.embedding_key):
        raise ShapeError(
            f"slice_student.hidden_size: {width} equals the teacher's {family.embedding_key} = {width}, and a "
            f"{family.model_type} model of equal widths has no projection between the two. Ask for another width."
        )


def _scaled_feed_forward(teacher: StudentShape, width: int) -> int:
    if width == teacher.hidden_size:
        return teacher.intermediate_size
    scaled = teacher.intermediate_size * width / teacher.hidden_size
    rounded = 8 * round(scaled / 8) if scaled > 64 else max(1, round(scaled))
    return min(rounded, teacher.intermediate_size)


def _derived_heads(
    config: PreTrainedConfig, width: int, num_heads: int | None, num_key_value_heads: int | None
) -> tuple[int, int]:
    """Heads where head_dim = hidden_size / heads always holds."""
    teacher, head_dim = shape_of(config), head_dim_of(config)
    heads, rest = divmod(width, head_dim)
    if rest or not heads:
        low = max(1, min(heads, teacher.num_heads - 1)) * head_dim
        nearest = f"{low} or {low + head_dim}" if teacher.num_heads > 1 else f"{head_dim}"
        raise ShapeError(
            f"slice_student.hidden_size: {width} is not a multiple of the teacher's head_dim = {head_dim}. "
            f"Nearest: {nearest}."
        )
    for name, value in (("num_heads", num_heads), ("num_key_value_heads", num_key_value_heads)):
        if value is not None and value != heads:
            raise ShapeError(
                f"slice_student.{name}: {value} does not fit hidden_size {width}: heads keep the teacher's head_dim = "
                f"{head_dim}, which makes {heads}. Leave it out, or ask for hidden_size {value * head_dim}."
            )
    return heads, heads


def _free_heads(
    config: PreTrainedConfig, width: int, num_heads: int | None, num_key_value_heads: int | None
) -> tuple[int, int]:
    """Heads where the config gives head_dim: some key-value heads, each with some of its queries."""
    teacher = shape_of(config)
    queries = teacher.num_heads // teacher.num_key_value_heads
    must_divide = family_of(config).heads_divide_width
    cuts = [
        (kv_heads * kept, kv_heads)
        for kv_heads in range(1, teacher.num_key_value_heads + 1)
        for kept in range(1, queries + 1)
        if not must_divide or width % (kv_heads * kept) == 0
    ]
    possible = [
        (heads, kv_heads)
        for heads, kv_heads in cuts
        if num_heads in (None, heads) and num_key_value_heads in (None, kv_heads)
    ]
    if not possible:
        known = ", ".join(f"{heads}/{kv_heads}" for heads, kv_heads in sorted(cuts)[:20])
        raise ShapeError(
            f"slice_student.num_heads: {num_heads or 'any'} with num_key_value_heads {num_key_value_heads or 'any'} "
            f"cannot be cut from the teacher's {teacher.num_heads}/{teacher.num_key_value_heads} at hidden_size "
            f"{width}. Possible (num_heads/num_key_value_heads): {known}."
        )
    wanted = teacher.num_heads * width / teacher.hidden_size
    return min(
        possible,
        key=lambda cut: (abs(cut[0] // cut[1] - queries), abs(cut[0] - wanted), -cut[0]),
    )


def _parameter_axes(config: PreTrainedConfig, task: Task | None) -> dict[str, tuple[tuple[Axis, ...], torch.Size]]:
    """Axes and teacher's size of every parameter, from a model without weights."""
    family = family_of(config)
    builder = _BUILDERS[_task_of_config(family, config) if task is None else task]
    with torch.device("meta"):
        model: PreTrainedModel = builder.from_config(copy.deepcopy(config))
    return {
        name: (family.parameter_axes(name, config), parameter.shape) for name, parameter in model.named_parameters()
    }


def _task_of_config(family: Family, config: PreTrainedConfig) -> Task:
    for architecture in config.architectures or ():
        for task in family.tasks:
            if architecture.endswith(CLASS_SUFFIXES[task]):
                return task
    return family.tasks[0]


def _count(
    config: PreTrainedConfig, shape: StudentShape, parameters: Mapping[str, tuple[tuple[Axis, ...], torch.Size]]
) -> int:
    sizes = axis_sizes(config, shape)
    total = 0
    for name, (axes, teacher) in parameters.items():
        block = block_number(name)
        if block is None or block < shape.num_layers:
            total += math.prod(sizes.get(axis, kept) for axis, kept in zip(axes, teacher, strict=True))
    return total


def _proportional_shapes(config: PreTrainedConfig) -> Iterator[StudentShape]:
    teacher = shape_of(config)
    queries = teacher.num_heads // teacher.num_key_value_heads
    step = head_dim_of(config) if family_of(config).head_dim_key is None else min(16, head_dim_of(config))
    yield teacher
    for width in range(step, teacher.hidden_size + 1, step):
        layers = teacher.num_layers * width / teacher.hidden_size
        for depth in {max(1, math.floor(layers)), math.ceil(layers)}:
            try:
                shape = resolve_shape(config, hidden_size=width, num_layers=depth)
            except ShapeError:
                # A width that this family cannot have, such as ELECTRA's embedding_size.
                continue
            if shape.num_heads == queries * shape.num_key_value_heads:
                yield shape
