"""The shape of a student for a given number of parameters."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from flexkd.errors import ShapeError
from flexkd.facts.families.row import CLASS_SUFFIXES, Axes, Family, Task, block_number
from flexkd.models.forward.families import family_of
from flexkd.models.loading.t5_head import build_model
from flexkd.models.slicing.shape import StudentShape, axis_sizes, head_dim_of, resolve_shape, shape_of

_BUILDERS: Final = {
    "classification": AutoModelForSequenceClassification,
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}

_ROTATED_POWER: Final = 3


def derive_shape(
    config: PreTrainedConfig,
    *,
    size: float | None = None,
    max_parameters: int | None = None,
    task: Task | None = None,
    rotated: bool = False,
) -> StudentShape:
    """The largest student in its teacher's proportions that has no more than a number of parameters.

    The rule: widths are the multiples of the teacher's head_dim, or, where any width can be cut, those multiples of 16
    that let each key-value head keep its queries; a width of w in d has `layers * w / d` layers, rounded down or up,
    at least one; heads and feed-forward units follow as in `resolve_shape`. Of all these shapes the one with most
    parameters that fits is taken, the wider of two equals. Every parameter counts, embeddings and head too, tied ones
    once.

    A rotated student is wider and shallower: `layers * (w / d) ** 3`. After equal training time on two cores that was
    the best of the shapes that were tried (docs/log.md, 2026-11-25): its width keeps more of the teacher's directions,
    and fewer blocks take more steps in the same time.

    Args:
        size: Share of the teacher's parameters, above 0 and up to 1.
        max_parameters: Number of parameters. One above the teacher's gives the teacher's shape.
        task: Decides which head is counted; by default what the config's `architectures` say, else the family's first.
        rotated: The student is cut in the basis of `rotate_teacher`.

    Raises:
        ShapeError: Not exactly one of size and max_parameters, or even the smallest shape does not fit.

    Example:
        >>> from transformers import BertConfig
        >>> shape = derive_shape(BertConfig(), size=0.25)
        >>> shape.hidden_size, shape.num_layers, shape.num_heads, shape.intermediate_size
        (384, 6, 6, 1536)
    """
    if (size is None) == (max_parameters is None):
        raise ShapeError(
            f"derive_shape: needs exactly one of size and max_parameters, got {size} and {max_parameters}. "
            "Leave one of them out."
        )
    if size is not None and not 0 < size <= 1:
        raise ShapeError(f"derive_shape: size {size} is no share of the teacher. Give a number above 0 and up to 1.")
    count = parameter_counter(config, task=task)
    limit = max_parameters if size is None else num_parameters(config, size, task=task)
    assert limit is not None, "one of both is given"
    shapes = _proportional_shapes(config, power=_ROTATED_POWER if rotated else 1)
    counted = {shape: count(shape) for shape in shapes}
    fitting = [shape for shape, total in counted.items() if total <= limit]
    if not fitting:
        smallest = min(counted, key=lambda shape: counted[shape])
        raise ShapeError(
            f"derive_shape: no student of this {config.model_type} has {limit:,} parameters or fewer: the smallest "
            f"(hidden_size {smallest.hidden_size}, num_layers {smallest.num_layers}) has {counted[smallest]:,}. "
            "Ask for at least that many."
        )
    return max(fitting, key=lambda shape: (counted[shape], shape.hidden_size))


def num_parameters(config: PreTrainedConfig, size: float, *, task: Task | None = None) -> int:
    """Number of parameters of a share of a model; as in `derive_shape`."""
    return math.floor(size * parameter_counter(config, task=task)(shape_of(config)))


def parameter_counter(config: PreTrainedConfig, *, task: Task | None = None) -> Callable[[StudentShape], int]:
    """A function that gives the number of parameters of any student shape, tied ones once, without making weights."""
    parameters = _parameter_axes(config, task)
    return lambda shape: _count(config, shape, parameters)


def _parameter_axes(config: PreTrainedConfig, task: Task | None) -> dict[str, tuple[Axes, torch.Size]]:
    """Axes and teacher's size of every parameter, from a model without weights."""
    family = family_of(config)
    builder = _BUILDERS[_task_of_config(family, config) if task is None else task]
    with torch.device("meta"):
        model: PreTrainedModel = build_model(builder.from_config, copy.deepcopy(config))
    return {
        name: (family.parameter_axes(name, config), parameter.shape) for name, parameter in model.named_parameters()
    }


def _task_of_config(family: Family, config: PreTrainedConfig) -> Task:
    for architecture in config.architectures or ():
        for task in family.tasks:
            if architecture.endswith(CLASS_SUFFIXES[task]):
                return task
    return family.tasks[0]


def _count(config: PreTrainedConfig, shape: StudentShape, parameters: Mapping[str, tuple[Axes, torch.Size]]) -> int:
    sizes = axis_sizes(config, shape)
    encoder = family_of(config).encoder
    total = 0
    for name, (axes, teacher) in parameters.items():
        block = block_number(name)
        depth = shape.num_layers if encoder is None or not encoder.holds(name) else shape.num_encoder_layers
        if block is None or block < (depth or 0):
            total += math.prod(sizes.get(axis, length) for axis, length in zip(axes, teacher, strict=True))
    return total


def _proportional_shapes(config: PreTrainedConfig, *, power: int) -> Iterator[StudentShape]:
    teacher = shape_of(config)
    queries = teacher.num_heads // teacher.num_key_value_heads
    step = head_dim_of(config) if family_of(config).head_dim_key is None else min(16, head_dim_of(config))
    yield teacher
    for width in range(step, teacher.hidden_size + 1, step):
        layers = teacher.num_layers * (width / teacher.hidden_size) ** power
        for depth in {max(1, math.floor(layers)), math.ceil(layers)}:
            try:
                shape = resolve_shape(config, hidden_size=width, num_layers=depth)
            except ShapeError:
                # A width that this family cannot have, such as ELECTRA's embedding_size.
                continue
            if shape.num_heads == queries * shape.num_key_value_heads:
                yield shape
