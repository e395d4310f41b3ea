"""Which unit of the student is taught which unit of the teacher, and the objective that teaches them."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flexkd.core.geometry import geometry_coverage, matrix_square_root, tangent_basis
from flexkd.core.losses.projector import Projector
from flexkd.core.objective import Objective
from flexkd.core.selection import UnitPairs, count_for_coverage, coverage_curve, pair_units, select_units
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.errors import RecipeError, ShapeError
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.pipeline.job import Job
from flexkd.pipeline.projectors import begin_projectors, projector_settings, target_basis
from flexkd.pipeline.start import Start
from flexkd.pipeline.states import calibration_states
from flexkd.preflight.objective import check_mapping
from flexkd.recipe import Recipe
from flexkd.scoring.geometry import functional_geometry
from flexkd.scoring.selection_file import Selection

logger = logging.getLogger(__name__)


def pair_layers(job: Job, recipe: Recipe, start: Start, selection: Selection) -> tuple[LayerPair, ...]:
    """For each pair of layers, which student unit is taught which teacher unit or direction.

    A sliced student's units are paired with the units or directions that they were cut from, at every layer, because
    all layers share one residual stream.

    Raises:
        RecipeError: The mapping would teach a sliced student other units than its own.
        ShapeError: A sliced student is paired with a state that is not the residual stream.
    """
    section = recipe.objective.features
    if section is None or section.weight == 0:
        return ()
    facts = FEATURE_LOSS_FACTS[section.loss]
    pairs = []
    for student_layer, teacher_layer in section.layer_map.items():
        if facts.needs_geometry:
            geometry = functional_geometry(job.teacher, _scoring_batches(job, recipe), layer=teacher_layer)
            pairs.append(LayerPair(student_layer, teacher_layer, None, matrix_square_root(geometry)))
        elif not facts.pairs_units:
            basis = target_basis(job, recipe, teacher_layer)
            pairs.append(LayerPair(student_layer, teacher_layer, None, basis))
        else:
            pairs.append(_unit_pair(job, recipe, start, selection, student_layer, teacher_layer))
    return tuple(pairs)


def _unit_pair(
    job: Job, recipe: Recipe, start: Start, selection: Selection, student_layer: int, teacher_layer: int
) -> LayerPair:
    """Pairs of units at a pair of layers: directions of a rotation or of G, units of the cut, or units by a mapping."""
    section, student = recipe.objective.features, start.student
    assert section is not None
    widths = job.width(student, student_layer), job.width(job.teacher, teacher_layer, as_teacher=True)
    width = widths[0]
    if start.rotation is not None and section.basis == "units" and section.mapping != "matched":
        rotation = start.rotation
        k = _taught_count(recipe, *widths, lambda: rotation.energy.cumsum(0))
        return LayerPair(
            student_layer, teacher_layer, _cut_directions(k, section.mapping), rotation.directions(teacher_layer, k)
        )
    if section.basis == "tangent":
        geometry = functional_geometry(job.teacher, _scoring_batches(job, recipe), layer=teacher_layer)
        k = _taught_count(recipe, *widths, lambda: geometry_coverage(geometry))
        basis = tangent_basis(geometry, k)
        pairs = pair_units(
            torch.arange(k),
            width,
            mapping="matched",
            student_states=calibration_states(job, recipe, student, student_layer),
            teacher_states=calibration_states(job, recipe, job.teacher, teacher_layer, as_teacher=True) @ basis,
        )
        return LayerPair(student_layer, teacher_layer, pairs, basis)
    is_taught_its_cut = selection.start_units is not None and section.mapping != "matched"
    # All layers share one stream, so that the scores of the cut choose among its units at every layer.
    scores = selection.cut_scores() if is_taught_its_cut else selection.scores_of(teacher_layer)
    k = _taught_count(recipe, *widths, lambda: coverage_curve(scores))
    if is_taught_its_cut:
        if len(scores.values) != widths[1]:
            raise ShapeError(
                f"objective.features.layer_map: teacher layer {teacher_layer} has {widths[1]} units, and the student "
                f"is cut along {len(scores.values)}. Pair layers below the projection, or use mapping: matched."
            )
        return LayerPair(student_layer, teacher_layer, _identity(selection, k, section.mapping))
    units = select_units(scores, k)
    if section.mapping != "matched":
        return LayerPair(student_layer, teacher_layer, pair_units(units, width, mapping=section.mapping, scores=scores))
    pairs = pair_units(
        units,
        width,
        mapping="matched",
        student_states=calibration_states(job, recipe, student, student_layer),
        teacher_states=calibration_states(job, recipe, job.teacher, teacher_layer, as_teacher=True)[:, units],
    )
    return LayerPair(student_layer, teacher_layer, pairs)


def _cut_directions(k: int, mapping: str) -> UnitPairs:
    """The first k units of a rotated student, each paired with the direction that it was cut along."""
    check_mapping(mapping, rotated=True)
    return UnitPairs(torch.arange(k), torch.arange(k))


def _identity(selection: Selection, k: int, mapping: str) -> UnitPairs:
    """The k highest-scored units that the student was cut along, each paired with itself."""
    assert selection.start_units is not None
    check_mapping(mapping, rotated=False)
    units = select_units(selection.cut_scores(), k)
    student_units = torch.searchsorted(selection.start_units, units).clamp(max=len(selection.start_units) - 1)
    if not torch.equal(selection.start_units[student_units], units):
        raise RecipeError("objective.features.units: others than the student was sliced by. Use mapping: matched.")
    return UnitPairs(student_units, units)


def _taught_count(recipe: Recipe, student_width: int, teacher_width: int, curve: Callable[[], Tensor]) -> int:
    """How many units or directions are taught: `k = min(requested, d_S, d_T)`; warns where fewer than requested.

    Args:
        recipe: Requests a number of units or directions, or the share (coverage) that they have to hold.
        student_width: Units of the student's state.
        teacher_width: Units of the teacher's state.
        curve: Share held by the first 1, 2, ... units or directions; called only where the recipe requests a share.
    """
    section = recipe.objective.features
    assert section is not None
    requested = section.units
    if section.coverage is not None:
        requested = count_for_coverage(curve(), section.coverage)
        logger.info("features: %d units or directions hold %g of what they are ranked by", requested, section.coverage)
    k = min(requested or student_width, student_width, teacher_width)
    if requested is not None and k < requested:
        logger.warning(
            "features: %d units requested, the student has %d and the teacher %d",
            requested,
            student_width,
            teacher_width,
        )
    return k


def build_objective(job: Job, recipe: Recipe, start: Start, selection: Selection) -> Objective:
    """The objective of a run, whose layers are paired.

    Raises:
        FlexKDError: As `begin_projectors`.
    """
    student, layers = start.student, selection.layers or ()

    def widths(pair: LayerPair) -> tuple[int, int]:
        return job.width(student, pair.student_layer), job.width(job.teacher, pair.teacher_layer, as_teacher=True)

    objective = objective_of(
        recipe, layers, task_loss=job.task.loss, shared_outputs=job.task.shared_outputs, widths=widths
    )
    projectors = () if objective.features is None else objective.features.projectors
    if projectors:
        begin_projectors(job, recipe, start, selection, tuple(zip(layers, projectors, strict=True)))
    return objective


def _scoring_batches(job: Job, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """The rows that units are scored on."""
    return job.batches("train", num_rows=recipe.scores.rows)


def objective_of(
    recipe: Recipe,
    layers: tuple[LayerPair, ...],
    *,
    task_loss: str,
    shared_outputs: int | None,
    widths: Callable[[LayerPair], tuple[int, int]],
) -> Objective:
    """The objective of a recipe, the same for a run and a plan, with projectors where its feature loss learns some.

    Args:
        layers: Pairs of layers that the feature term compares; ignored where the recipe has no such term.
        task_loss: The loss against labels.
        shared_outputs: As in `LogitTerm`.
        widths: The student's and the teacher's width at a pair of layers; called only for projectors.
    """
    section, features = recipe.objective, recipe.objective.features
    task = TaskTerm(task_loss, section.task.weight, section.task.label_smoothing)
    logits = None
    if section.logits is not None:
        logits = LogitTerm(**section.logits.model_dump(), shared_outputs=shared_outputs)
    if features is None or features.weight == 0:
        return Objective(task, logits)
    projectors: tuple[Projector, ...] = ()
    settings = projector_settings(recipe)
    if settings is not None:
        # Projectors start alike for a seed, and draw nothing from the generator that the training goes on to use.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.training.seed)
            projectors = tuple(Projector(*widths(pair)) for pair in layers)
    rate = None if settings is None else settings.learning_rate
    term = FeatureTerm(features.loss, features.weight, features.positions, layers, projectors, features.fade, rate)
    return Objective(task, logits, term)
