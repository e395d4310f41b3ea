"""Whether a cut goes by the residual stream and its units are paired there, not behind a projection to the head."""

from collections.abc import Iterator, Sequence
from typing import Final

from flexkd.errors import FlexKDError, ShapeError
from flexkd.facts.families.table import family_can_rotate
from flexkd.facts.names import ALL_LAYERS
from flexkd.preflight.inputs import RecipeInputs
from flexkd.recipe.taught_features import is_rotated, taught_choice

_HEAD_INPUT: Final = -1


def projection_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """A student that is cut along units is scored, and taught these units, where they are.

    Raises:
        ShapeError: As `check_paired_widths`.
    """
    recipe, teacher = inputs.recipe, inputs.teacher
    if teacher is None or recipe.student.start != "slice":
        return
    rotated = is_rotated(recipe, can_rotate=family_can_rotate(teacher.model_type))
    projected, stream, depth = teacher.projected_width, teacher.size("hidden_size"), teacher.size("num_layers")
    if rotated or projected is None or stream is None or depth is None:
        return
    if recipe.scores.layer != ALL_LAYERS and set(recipe.scores.layers) == {_HEAD_INPUT}:
        yield stream_error(teacher.model_type, _HEAD_INPUT, projected, stream=stream, num_layers=depth)
    student, features = recipe.student, recipe.objective.features
    if features is None or features.weight == 0:
        return
    choice, projector = taught_choice(recipe, rotated=rotated), features.projector
    begins_with_cut = projector is not None and projector.start == "cut"
    if not begins_with_cut and (choice is None or not choice.is_cut):
        return
    # A derived width is known only once the student is made.
    is_derived = student.size is not None or student.max_parameters is not None
    cut_widths = (None if is_derived else student.hidden_size or stream, stream)
    for layers in features.layer_map.items():
        widths = [projected if layer == _HEAD_INPUT else width for layer, width in zip(layers, cut_widths, strict=True)]
        check_paired_widths(layers, widths, cut_widths, begins_with_cut=begins_with_cut)


def stream_error(model_type: str, layer: int | str, width: int, *, stream: int, num_layers: int) -> ShapeError:
    """The error of a cut whose scores are all of states of another width than the residual stream.

    Args:
        layer: One of the scored layers.
        width: Its units.
        stream: Units of the stream.
        num_layers: Blocks of the teacher.
    """
    return ShapeError(
        f"scores.layer: layer {layer} of this {model_type} lies behind a projection to {width} units and says nothing "
        f"about the {stream} of its stream. Score the last block, scores.layer: {num_layers}."
    )


def check_paired_widths(
    layers: tuple[int, int],
    widths: Sequence[int | None],
    cut_widths: Sequence[int | None],
    *,
    begins_with_cut: bool = False,
) -> None:
    """Refuse a pair of states between which the units of a cut are not the same.

    Args:
        layers: Of student and teacher, as the following.
        widths: Units of the states.
        cut_widths: Units of the streams that the cut is between; None, as a width: not known yet.
        begins_with_cut: A projector is to begin with the way back from the cut; else units are paired.

    Raises:
        ShapeError: A state lies behind a projection.
    """
    for who, index in (("teacher", 1), ("student", 0)):
        layer, width, stream = layers[index], widths[index], cut_widths[index]
        if stream is None or width == stream:
            continue
        reason = f"{width} units behind a projection, and the student is cut along the stream, which has {stream}"
        if begins_with_cut:
            raise ShapeError(
                f"objective.features.projector.start: 'cut' at {who} layer {layer}, which has {reason}. Pair layers "
                "below the projection, or use start: random."
            )
        raise ShapeError(
            f"objective.features.layer_map: {who} layer {layer} has {reason}. Pair layers below the projection, or use "
            "mapping: matched."
        )
