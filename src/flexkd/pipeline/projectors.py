"""Projectors of a run: the scale of their targets, and where they begin."""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.losses.projector import Projector
from flexkd.core.projection import LinearMap, cut_map, head_map, unit_variance_basis
from flexkd.core.terms import LayerPair
from flexkd.errors import UnsupportedModelError
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.models.forward.head import linear_head
from flexkd.models.slicing.shape import shape_of
from flexkd.pipeline.job import Job
from flexkd.pipeline.start import Start
from flexkd.pipeline.states import calibration_states
from flexkd.preflight.objective import check_head_start
from flexkd.preflight.projection import check_paired_widths
from flexkd.recipe import Recipe
from flexkd.recipe.training_sections import ProjectorSection
from flexkd.scoring.selection_file import Selection


def projector_settings(recipe: Recipe) -> ProjectorSection | None:
    """The settings of the projectors that a recipe trains; None where it trains none."""
    features = recipe.objective.features
    if features is None or features.weight == 0 or not FEATURE_LOSS_FACTS[features.loss].needs_projector:
        return None
    return features.projector or ProjectorSection()


def target_basis(job: Job, recipe: Recipe, layer: int) -> Tensor | None:
    """The basis in which a projector's targets have unit variance; None where they stay as they are."""
    settings = projector_settings(recipe)
    if settings is None or not settings.standardize:
        return None
    return unit_variance_basis(calibration_states(job, recipe, job.teacher, layer, as_teacher=True))


def begin_projectors(
    job: Job,
    recipe: Recipe,
    start: Start,
    selection: Selection,
    pairs: tuple[tuple[LayerPair, Projector], ...],
) -> None:
    """Give projectors the maps that they begin with, where the recipe asks for other than random ones.

    Args:
        pairs: The pairs of layers, each with its projector.

    Raises:
        ShapeError: As `check_paired_widths`.
        UnsupportedModelError: A head is more than a linear map.
    """
    settings = projector_settings(recipe)
    if settings is None or settings.start == "random":
        return
    for pair, projector in pairs:
        if settings.start == "cut":
            layer = pair.teacher_layer
            states = calibration_states(job, recipe, job.teacher, layer, as_teacher=True)
            cut = _cut(job, start, selection, layer)
            widths = job.width(start.student, pair.student_layer), states.shape[1]
            layers = pair.student_layer, layer
            check_paired_widths(layers, widths, (cut.shape[1], len(cut)), begins_with_cut=True)
            linear_map = cut_map(states, cut)
        else:
            linear_map = _map_of_heads(start.student, job.teacher, job.task.shared_outputs)
        if pair.teacher_basis is not None:
            linear_map = linear_map.in_basis(pair.teacher_basis)
        projector.begin_with(linear_map)


def _cut(job: Job, start: Start, selection: Selection, layer: int) -> Float[Tensor, "units kept_units"]:
    """The columns that turn a teacher's state into what the units of the untrained student are."""
    if start.stream is not None:
        assert start.directions is not None, "a student with a rotation is cut along directions"
        return start.stream.directions(layer, start.directions)
    assert selection.start_units is not None, "checked by the recipe"
    return torch.eye(shape_of(job.teacher.config).hidden_size)[:, selection.start_units]


def _map_of_heads(student: PreTrainedModel, teacher: PreTrainedModel, shared_outputs: int | None) -> LinearMap:
    check_head_start({"student": student.config, "teacher": teacher.config})
    weights, biases = [], []
    for who, model in (("student", student), ("teacher", teacher)):
        head = linear_head(model)
        if head is None:
            raise UnsupportedModelError(
                f"objective.features.projector.start: 'heads' needs a head that is one linear map, and the {who}, "
                f"{type(model).__name__}, has adapters or packed weights there. Use start: random."
            )
        weights.append(head[0][:shared_outputs])
        biases.append(head[1][:shared_outputs])
    return head_map(weights[0], weights[1], biases[0] - biases[1])
