"""A student cut from its teacher along the residual stream, the heads, the feed-forward units and the blocks."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Int, Int64
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from flexkd.core.selection import select_units
from flexkd.errors import DataError, RecipeError, ShapeError, UnsupportedModelError, unknown_name
from flexkd.facts.families.row import WHAT_TO_DO, Family, is_residual_embedding
from flexkd.models.forward.families import family_of, task_of
from flexkd.models.loading.t5_head import build_model, has_own_head, normalize_head
from flexkd.models.slicing.axes import TeacherIndices
from flexkd.models.slicing.calibration import calibrate, measure
from flexkd.models.slicing.importance import Means, choose_indices, unit_weights
from flexkd.models.slicing.rotation import check_rotatable, rotate_teacher
from flexkd.models.slicing.scales import Scales
from flexkd.models.slicing.shape import StudentShape, axis_sizes, head_dim_of, resolve_shape, shape_of

Basis = Literal["coordinates", "rotated"]
"""What a student's units begin as: the teacher's own units, or directions of its residual stream."""

Model = TypeVar("Model", bound=PreTrainedModel)


def slice_student(
    teacher: Model,
    *,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    units: Int[Tensor, " units"] | Sequence[int] | None = None,
    num_heads: int | None = None,
    num_key_value_heads: int | None = None,
    intermediate_size: int | None = None,
    num_encoder_layers: int | None = None,
    layers: Sequence[int] | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    basis: Basis = "coordinates",
    tied_head: bool = False,
    means: Means | None = None,
) -> Model:
    """A smaller model of the teacher's class that starts from the teacher's own weights.

    Every axis on the residual stream is cut to the same units, so that student unit i begins as teacher unit
    `units[i]`, or in the rotated basis as a direction of the teacher's stream. With nothing to cut, the student
    computes the teacher's logits. The teacher stays as it was. Sizes that are not given follow from the width by
    `resolve_shape`.

    Args:
        num_layers: Blocks before the head; of an encoder-decoder those of the decoder, and the encoder's scale alike
            unless they are given.
        units: Units of the residual stream, ascending, from `select_units`. By default those with the largest weights
            (`importance.unit_weights`).
        layers: Blocks before the head to keep, counted from 1, ascending. By default evenly spaced with the last among
            them, or, with `batches`, those that change their input most.
        batches: Calibration batches; only an encoder-decoder needs labels, for its decoder reads them. With them heads,
            feed-forward units, blocks and the units of a dense layer before the classes are chosen by what they do,
            not by their weights, and the scale of every norm is corrected: it divides by the root mean square of k
            units now instead of d, so it is multiplied by `sqrt(share * d / k)`, share being the part of the sum of
            squares that the kept units hold. Without them that share is taken to be k / d.
        basis: `coordinates`, or `rotated` by `rotate_teacher`, which needs `batches` and keeps the k directions with
            most energy; units cannot be given then. `rotate_teacher` returns these directions: call it alone and slice
            its model by `units=range(k)` for the same student.
        tied_head: In the rotated basis, keep tied embeddings tied: half the embeddings for a head that is not exact.
        means: What the batches show of this teacher, where that was measured before; then no batch is read.

    Returns:
        A model on the CPU in eval mode, in the teacher's dtype, all of it trainable but positions that its code
        computes. `save_pretrained` writes nothing that plain transformers does not know.

    Raises:
        ShapeError: A size cannot be cut from this teacher.
        UnsupportedModelError: There is no row for this architecture or this kind of head, or it is no plain model.
        RecipeError: There is no such basis.
        DataError: One batch in the place of several.
    """
    _check_arguments(teacher, basis, batches)
    family = family_of(teacher)
    task_of(teacher)
    _check_stacks(teacher.config, family)
    _check_parameters(teacher, family)
    checked_units = None if units is None else _checked_units(units, hidden_size, shape_of(teacher.config).hidden_size)
    if layers is not None:
        layers = [int(layer) for layer in layers]
        num_layers = _checked_layers(family, layers, num_layers, shape_of(teacher.config).num_layers)
    shape = resolve_shape(
        teacher.config,
        hidden_size=hidden_size if checked_units is None else len(checked_units),
        num_layers=num_layers,
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        intermediate_size=intermediate_size,
        num_encoder_layers=num_encoder_layers,
    )
    if basis == "rotated":
        batches = _checked_calibration(units, batches)
        teacher, means = _rotated(teacher, batches, shape, tied_head=tied_head)
        checked_units = torch.arange(shape.hidden_size)
    residual = select_units(unit_weights(teacher), shape.hidden_size) if checked_units is None else checked_units
    if means is None:
        is_measured = batches is not None and shape != shape_of(teacher.config)
        means = measure(teacher, batches or (), residual) if is_measured else {}
    indices = choose_indices(teacher, shape, residual, layers, means)
    _check_block_numbers(teacher, family, indices)
    return _cut(teacher, family, shape, indices, means)


def _rotated(
    teacher: Model, batches: Sequence[Mapping[str, Any]], shape: StudentShape, *, tied_head: bool
) -> tuple[Model, Means]:
    """The teacher in its own basis, and what one pass over the batches shows of it there; nothing if nothing is cut."""
    check_rotatable(teacher, batches)
    calibration = calibrate(teacher, batches)
    rotation = rotate_teacher(teacher, batches, moment=calibration.stream_moment, tied_head=tied_head)
    is_cut = shape != shape_of(teacher.config)
    return rotation.model, calibration.along(rotation.stream.basis[:, : shape.hidden_size]) if is_cut else {}


def _check_arguments(teacher: Any, basis: str, batches: Any) -> None:
    if not isinstance(teacher, PreTrainedModel):
        raise UnsupportedModelError(
            f"slice_student: {type(teacher).__name__} is no plain model of transformers. Give the model inside a "
            "wrapper, with adapters merged into it (merge_and_unload())."
        )
    if basis not in get_args(Basis):
        raise RecipeError(unknown_name("slice_student.basis", "basis", basis, get_args(Basis)))
    if isinstance(batches, Mapping):
        raise DataError("slice_student.batches: one mapping was given. Give a list of them, [batch].")


def _cut(teacher: Model, family: Family, shape: StudentShape, indices: TeacherIndices, means: Means) -> Model:
    # Initial weights are thrown away, so they must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        config = student_config(teacher.config, shape, [block.block for block in indices.blocks])
        student = build_model(type(teacher), config, own_head=has_own_head(teacher))
    source = dict(teacher.named_parameters(remove_duplicate=False))
    _check_ties(student, source, indices)
    scales = Scales(teacher, student, indices, means)
    for name, parameter in student.named_parameters():
        teacher_name = indices.teacher_name(name)
        whole = source[teacher_name].detach()
        weight = whole
        axes = family.parameter_axes(teacher_name, teacher.config)
        for axis, kind in enumerate(axes):
            index = indices.along(kind, name)
            weight = weight if index is None else weight.index_select(axis, index.to(weight.device))
        weight = scales.scaled(name, weight)
        assert weight.shape == parameter.shape, name
        # Assigning .data keeps the teacher's dtype, as Module.to does.
        parameter.data = weight.to("cpu", copy=weight is whole)
    _copy_saved_buffers(student, teacher)
    normalize_head(student)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    student.train(False)
    return student


def _copy_saved_buffers(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Copy what no config describes, as BART's bias of the logits. Other buffers are computed, and keep their dtype."""
    of_teacher, saved = dict(teacher.named_buffers()), student.state_dict().keys()
    for name, buffer in student.named_buffers():
        if name in saved:
            assert buffer.shape == of_teacher[name].shape, name
            buffer.data = of_teacher[name].to("cpu", copy=True)


def student_config(config: PreTrainedConfig, shape: StudentShape, blocks: Sequence[int]) -> Any:
    """The teacher's config with other sizes. A copy, so that everything else stays as it was.

    Args:
        config: The teacher's.
        shape: The student's.
        blocks: The teacher's blocks before the head that are kept, counted from 0.
    """
    family = family_of(config)
    head_dim = head_dim_of(config)
    student = copy.deepcopy(config)
    for key in (family.hidden_key, *family.width_keys):
        setattr(student, key, shape.hidden_size)
    stacks = ((family.stack, shape.num_layers), (family.encoder, shape.num_encoder_layers))
    for stack, depth in stacks:
        if stack is not None:
            setattr(student, stack.layers_key, depth)
            setattr(student, stack.heads_key, shape.num_heads)
            # GPT-2 says nothing where feed-forward units are four times the width.
            is_multiple = shape.intermediate_size == (family.intermediate_multiple or 0) * shape.hidden_size
            if getattr(config, stack.intermediate_key) is not None or not is_multiple:
                setattr(student, stack.intermediate_key, shape.intermediate_size)
    if family.kv_heads_key is not None:
        setattr(student, family.kv_heads_key, shape.num_key_value_heads)
    # Qwen2 computes head_dim where its config lacks it, and readers of its configs expect it to be absent.
    head_dim_key = family.head_dim_key
    is_silent = head_dim_key is None or getattr(config, head_dim_key, None) is None
    if head_dim_key is not None and not (is_silent and shape.hidden_size == shape.num_heads * head_dim):
        setattr(student, head_dim_key, head_dim)
    if family.embedding_key in config.to_dict() and is_residual_embedding(family, config):
        setattr(student, family.embedding_key, shape.hidden_size)
    for key in family.block_lists:
        if getattr(config, key, None):
            setattr(student, key, [getattr(config, key)[block] for block in blocks])
    return student


def _check_parameters(teacher: PreTrainedModel, family: Family) -> None:
    """Every parameter is described by the family's row, has the config's size, and holds finite numbers."""
    sizes = axis_sizes(teacher.config, shape_of(teacher.config))
    for name, parameter in teacher.named_parameters():
        axes = family.parameter_axes(name, teacher.config)
        expected = tuple(sizes.get(axis, length) for axis, length in zip(axes, parameter.shape, strict=False))
        if tuple(parameter.shape) != expected:
            raise UnsupportedModelError(
                f"slice_student: parameter '{name}' has the shape {tuple(parameter.shape)} where the teacher's config "
                f"says {expected}. {WHAT_TO_DO}."
            )
        if not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"slice_student: parameter '{name}' is stored as {parameter.dtype}, and quantized weights cannot be "
                "cut. Load the teacher dequantized."
            )
        # A sum shows every NaN and infinity without a second tensor of the parameter's size.
        if not parameter.sum(dtype=torch.float32).isfinite():
            raise UnsupportedModelError(
                f"slice_student: parameter '{name}' holds values that are not finite. Load or train the teacher again."
            )


def _check_stacks(config: PreTrainedConfig, family: Family) -> None:
    if family.encoder is None:
        return
    for encoder_key, decoder_key in (
        (family.encoder.heads_key, family.heads_key),
        (family.encoder.intermediate_key, family.intermediate_key),
    ):
        if getattr(config, encoder_key) != getattr(config, decoder_key):
            raise UnsupportedModelError(
                f"slice_student: the teacher has {encoder_key} = {getattr(config, encoder_key)} and {decoder_key} = "
                f"{getattr(config, decoder_key)}, and stacks of unlike blocks cannot be cut. {WHAT_TO_DO}."
            )


def _check_block_numbers(teacher: PreTrainedModel, family: Family, indices: TeacherIndices) -> None:
    moved = [block.block + 1 for place, block in enumerate(indices.blocks) if block.block != place]
    if moved and family.block_scale_key and getattr(teacher.config, family.block_scale_key):
        raise ShapeError(
            f"slice_student.layers: layer {moved[0]} cannot take another place: with {family.block_scale_key} its "
            f"attention depends on its number. Keep the first ones (layers=range(1, {len(indices.blocks) + 1}))."
        )


def _check_ties(student: PreTrainedModel, source: Mapping[str, Tensor], indices: TeacherIndices) -> None:
    """Weights that are one in the student must be one in the teacher, or half of them would be lost."""
    first: dict[int, str] = {}
    for name, parameter in student.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        first_weight, second_weight = source[indices.teacher_name(other)], source[indices.teacher_name(name)]
        if first_weight is not second_weight and not torch.equal(first_weight, second_weight):
            raise UnsupportedModelError(
                f"slice_student: the teacher's config ties '{name}' to '{other}', but their values differ. "
                "Set teacher.config.tie_word_embeddings = False first."
            )


def _checked_units(
    units: Int[Tensor, " units"] | Sequence[int], hidden_size: int | None, teacher: int
) -> Int64[Tensor, " units"]:
    numbers = torch.as_tensor(units).detach()
    if numbers.numel() and (numbers.ndim != 1 or numbers.is_floating_point() or numbers.dtype == torch.bool):
        raise ShapeError(
            f"slice_student.units: must be a list of whole numbers, was {numbers.dtype} of shape "
            f"{list(numbers.shape)}. Use select_units(scores, k)."
        )
    indices = numbers.to("cpu", torch.int64)
    if hidden_size not in (None, len(indices)):
        raise ShapeError(
            f"slice_student.units: {len(indices)} units do not make hidden_size {hidden_size}. "
            "Leave hidden_size out, or select as many units."
        )
    if len(indices) == 0 or indices[0] < 0 or indices[-1] >= teacher or bool((indices.diff() <= 0).any()):
        raise ShapeError(
            f"slice_student.units: must be different numbers from 0 to {teacher - 1}, ascending, got "
            f"{indices[:10].tolist()}{'...' if len(indices) > 10 else ''}. Use select_units(scores, k)."
        )
    return indices


def _checked_calibration(
    units: Int[Tensor, " units"] | Sequence[int] | None, batches: Iterable[Mapping[str, Any]] | None
) -> list[Mapping[str, Any]]:
    if units is not None:
        raise ShapeError(
            f"slice_student.units: basis 'rotated' keeps directions, not the {len(units)} units asked for. Give "
            "hidden_size instead, or use basis 'coordinates'."
        )
    if batches is None:
        raise ShapeError(
            "slice_student.batches: None, and basis 'rotated' is measured on calibration rows. Give a few hundred, or "
            "use basis 'coordinates'."
        )
    return list(batches)


def _checked_layers(family: Family, layers: Sequence[int], num_layers: int | None, teacher: int) -> int:
    if num_layers not in (None, len(layers)):
        raise ShapeError(
            f"slice_student.layers: {len(layers)} layers do not make num_layers {num_layers}. Leave num_layers out."
        )
    if list(layers) != sorted({layer for layer in layers if 1 <= layer <= teacher}) or not layers:
        raise ShapeError(
            f"slice_student.layers: must be different numbers from 1 to {teacher}, ascending, got {list(layers)}. "
            "Layer k is the k-th block."
        )
    if family.keeps_first_block and layers[0] != 1:
        raise ShapeError(
            f"slice_student.layers: the first block of a {family.model_type} model has to stay, as it is built in "
            f"another way than the others, got {list(layers)}. Add 1."
        )
    return len(layers)
