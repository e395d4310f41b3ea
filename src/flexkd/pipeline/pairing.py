"""Which unit of the student is taught which unit of the teacher, and the objective that teaches them."""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.geometry import geometry_coverage, lowest_directions, matrix_square_root, tangent_basis
from flexkd.core.losses.lens import Lens
from flexkd.core.losses.projector import Projector
from flexkd.core.objective import Objective
from flexkd.core.selection import UnitPairs, count_for_coverage, coverage_curve, pair_units, select_units
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.errors import RecipeError
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.models.forward.hidden import model_inputs
from flexkd.models.forward.lens import check_lens, lens_of
from flexkd.pipeline.job import Job
from flexkd.pipeline.projectors import begin_projectors, projector_settings, target_basis
from flexkd.pipeline.scores import geometry_at
from flexkd.pipeline.start import Start
from flexkd.pipeline.states import calibration_states
from flexkd.preflight.objective import check_mapping
from flexkd.preflight.projection import check_paired_widths
from flexkd.recipe import Recipe
from flexkd.recipe.fingerprints import score_seed
from flexkd.recipe.taught_features import BY_SCORES, taught_choice, unit_attribution
from flexkd.scoring.selection_file import Selection

logger = logging.getLogger(__name__)

Count = Callable[[Callable[[], Tensor]], int]
"""How many units or directions are taught, by the share that the first 1, 2, ... of them hold."""


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
            root = matrix_square_root(geometry_at(job, recipe, teacher_layer))
            pairs.append(LayerPair(student_layer, teacher_layer, None, root))
        elif not facts.pairs_units:
            basis = target_basis(job, recipe, teacher_layer)
            pairs.append(LayerPair(student_layer, teacher_layer, None, basis))
        else:
            pairs.append(_unit_pair(job, recipe, start, selection, student_layer, teacher_layer))
    return tuple(pairs)


def _unit_pair(
    job: Job, recipe: Recipe, start: Start, selection: Selection, student_layer: int, teacher_layer: int
) -> LayerPair:
    """Pairs of units at a pair of layers: what the student was cut along, or units or directions by a mapping."""
    student = start.student
    choice = taught_choice(recipe, rotated=start.stream is not None)
    assert choice is not None, "a loss that pairs units"
    widths = job.width(student, student_layer), job.width(job.teacher, teacher_layer, as_teacher=True)
    count = partial(_taught_count, recipe, *widths)
    if choice.is_cut and start.stream is not None:
        return _cut_directions_pair(recipe, start, selection, count, student_layer, teacher_layer)
    if choice.is_cut:
        return _cut_units_pair(recipe, selection, count, (student_layer, teacher_layer), widths)
    if choice.kind == "directions":
        student_states = calibration_states(job, recipe, student, student_layer)
        teacher_states = calibration_states(job, recipe, job.teacher, teacher_layer, as_teacher=True)
        directions, curve = _ranked_directions(job, recipe, choice.chosen_by, teacher_layer, teacher_states)
        basis = directions[:, : min(count(lambda: curve), directions.shape[1])]
        pairs = pair_units(
            torch.arange(basis.shape[1]),
            widths[0],
            mapping="matched",
            student_states=student_states,
            teacher_states=teacher_states @ basis,
        )
        return LayerPair(student_layer, teacher_layer, pairs, basis)
    scores = selection.scores_of(teacher_layer, unit_attribution(recipe, choice.chosen_by))
    lowest = choice.chosen_by == "lowest"
    units = select_units(scores, count(lambda: coverage_curve(scores, lowest=lowest)), lowest=lowest)
    features = recipe.objective.features
    assert features is not None
    if features.mapping != "matched":
        pairs = pair_units(units, widths[0], mapping=features.mapping, scores=scores)
        return LayerPair(student_layer, teacher_layer, pairs)
    pairs = pair_units(
        units,
        widths[0],
        mapping="matched",
        student_states=calibration_states(job, recipe, student, student_layer),
        teacher_states=calibration_states(job, recipe, job.teacher, teacher_layer, as_teacher=True)[:, units],
    )
    return LayerPair(student_layer, teacher_layer, pairs)


def _cut_directions_pair(
    recipe: Recipe, start: Start, selection: Selection, count: Count, student_layer: int, teacher_layer: int
) -> LayerPair:
    """The best directions that a student was cut along, each paired with the unit that starts as it."""
    stream, ranking = start.stream, selection.direction_scores
    assert stream is not None
    assert start.directions is not None
    features = recipe.objective.features
    assert features is not None
    check_mapping(features.mapping, rotated=True)
    # An earlier version wrote no ranking: it took the directions with the most variance.
    values = stream.energy.clamp(min=0) if ranking is None else ranking.values
    lowest = ranking is not None and ranking.chooses_lowest
    k = count(lambda: coverage_curve(values, lowest=lowest))
    student_units = select_units(values[start.directions], k, lowest=lowest)
    directions = stream.directions(teacher_layer, start.directions[student_units])
    return LayerPair(student_layer, teacher_layer, UnitPairs(student_units, torch.arange(k)), directions)


def _cut_units_pair(
    recipe: Recipe, selection: Selection, count: Count, layers: tuple[int, int], widths: tuple[int, int]
) -> LayerPair:
    """The best units that a student was cut along, each paired with itself.

    All layers share one stream, so that the scores of the cut choose among its units at every layer.
    """
    features, scores, start_units = recipe.objective.features, selection.cut_scores(), selection.start_units
    assert features is not None
    assert start_units is not None
    check_mapping(features.mapping, rotated=False)
    check_paired_widths(layers, widths, (len(start_units), len(scores.values)))
    lowest = recipe.student.chosen_by == "lowest"
    student_units = select_units(
        scores.values[start_units], count(lambda: coverage_curve(scores, lowest=lowest)), lowest=lowest
    )
    return LayerPair(*layers, UnitPairs(student_units, start_units[student_units]))


def _ranked_directions(job: Job, recipe: Recipe, chosen_by: str, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of a teacher layer as columns, the chosen ones first, and the share that the first 1, 2, ... hold.

    By scores they are eigenvectors of the geometry, and the share is that of its trace; by variance those of the
    covariance of the states. Random ones hold shares of the variance, in the order in which they are drawn.
    """
    if chosen_by in BY_SCORES:
        geometry = geometry_at(job, recipe, layer)
        if chosen_by == "lowest":
            return lowest_directions(geometry)
        return tangent_basis(geometry, len(geometry)), geometry_coverage(geometry)
    centred = (states - states.mean(0)).double()
    covariance = centred.T @ centred / len(centred)
    if chosen_by == "variance":
        return tangent_basis(covariance, len(covariance)), geometry_coverage(covariance)
    if chosen_by != "random":
        raise RecipeError(
            f"objective.features.chosen_by: '{chosen_by}' ranks no directions. Use scores, variance, random or lowest, "
            "or basis: units."
        )
    generator = torch.Generator().manual_seed(score_seed(recipe))
    basis = torch.linalg.qr(torch.randn(len(covariance), len(covariance), dtype=torch.float64, generator=generator)).Q
    variances = (basis * (covariance @ basis)).sum(0)
    return basis.float(), variances.cumsum(0) / variances.sum()


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
        FlexKDError: As `begin_projectors` and `check_lens`.
    """
    student, layers = start.student, selection.layers or ()

    def widths(pair: LayerPair) -> tuple[int, int]:
        return job.width(student, pair.student_layer), job.width(job.teacher, pair.teacher_layer, as_teacher=True)

    objective = objective_of(
        recipe,
        layers,
        task_loss=job.task.loss,
        shared_outputs=job.task.shared_outputs,
        widths=widths,
        models=(student, job.teacher),
    )
    if objective.features is not None and objective.features.lenses:
        batch = next(iter(job.batches("train", num_rows=1)))
        for model, as_teacher in ((student, False), (job.teacher, True)):
            inputs = model_inputs(model, batch, as_teacher=as_teacher)
            check_lens(model, {key: value.to(model.device) for key, value in inputs.items()}, batch["labels"])
    projectors = () if objective.features is None else objective.features.projectors
    if projectors:
        begin_projectors(job, recipe, start, selection, tuple(zip(layers, projectors, strict=True)))
    return objective


def objective_of(
    recipe: Recipe,
    layers: tuple[LayerPair, ...],
    *,
    task_loss: str,
    shared_outputs: int | None,
    widths: Callable[[LayerPair], tuple[int, int]],
    models: tuple[PreTrainedModel, PreTrainedModel],
) -> Objective:
    """The objective of a recipe, the same for a run and a plan, with projectors where its feature loss learns some.

    Args:
        layers: Pairs of layers that the feature term compares; ignored where the recipe has no such term.
        task_loss: The loss against labels.
        shared_outputs: As in `LogitTerm`.
        widths: The student's and the teacher's width at a pair of layers; called only for projectors.
        models: Student and teacher, whose heads some losses read.
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
    lenses: tuple[Lens, ...] = ()
    if FEATURE_LOSS_FACTS[features.loss].needs_heads:
        student, teacher = models
        lenses = (
            lens_of(student, learns=True, shared_outputs=shared_outputs),
            lens_of(teacher, learns=False, shared_outputs=shared_outputs),
        )
    term = FeatureTerm(
        features.loss,
        features.weight,
        features.positions,
        layers,
        projectors,
        features.fade,
        None if settings is None else settings.learning_rate,
        lenses,
    )
    return Objective(task, logits, term)
