"""Scores of the teacher's units and directions, each computed once for all runs of a job that read it."""

from typing import Any, Literal

import torch
from jaxtyping import Float64
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flexkd.core.scores import UnitScores
from flexkd.facts.names import ALL_LAYERS
from flexkd.models.forward.autocast import scoring_dtype
from flexkd.models.forward.hidden import HEAD_INPUT
from flexkd.models.slicing.rotation import Rotation, mean_coordinates
from flexkd.models.slicing.shape import shape_of
from flexkd.pipeline.job import Job
from flexkd.recipe import Recipe
from flexkd.recipe.fingerprints import score_seed
from flexkd.recipe.taught_features import BY_SCORES
from flexkd.scoring.geometry import functional_geometry
from flexkd.scoring.selection_file import DirectionScores, directions_hash
from flexkd.scoring.units import score_units


def unit_scores(job: Job, recipe: Recipe, attribution: str) -> tuple[UnitScores, ...]:
    """Scores of each layer that the recipe names; runs with the same settings share them.

    Args:
        attribution: The recipe's own, or that of a control.
    """
    section, seed = recipe.scores, score_seed(recipe)
    layers = (section.layer,) if section.layer == ALL_LAYERS else section.layers

    def compute() -> tuple[UnitScores, ...]:
        if attribution == "random":
            return tuple(_random_scores(job, layer, section.target, seed) for layer in layers)
        batches = tqdm(list(job.batches("train", num_rows=section.rows)), "teacher units, batches scored", leave=False)
        options: dict[str, Any] = {"target": section.target, "attribution": attribution}
        options |= {"precision": scoring_dtype(job.teacher_precision)}
        if section.layer == ALL_LAYERS:
            return (score_units(job.teacher, batches, layer=ALL_LAYERS, **options),)
        return tuple(score_units(job.teacher, batches, layer=section.layers, **options))

    settings = f"{section.model_dump_json(exclude={'attribution'})} {attribution}"
    return job.memo.scores(f"{settings} {seed}" if attribution == "random" else settings, compute)


def _random_scores(job: Job, layer: int | Literal["all"], target: str, seed: int) -> UnitScores:
    """Random numbers in the place of scores, for which no row is read."""
    stream = shape_of(job.teacher.config).hidden_size
    width = stream if layer == ALL_LAYERS else job.width(job.teacher, layer, as_teacher=True)
    values = random_values(width, seed)
    return UnitScores(values, target, "random", layer, 0, 0.0)


def random_values(count: int, seed: int) -> Float64[Tensor, " count"]:
    """Random numbers by which units or directions are drawn."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def geometry_at(job: Job, recipe: Recipe, layer: int) -> Float64[Tensor, "hidden hidden"]:
    """The functional geometry of a teacher layer on the scoring rows; runs share it."""

    def compute() -> Tensor:
        batches = list(job.batches("train", num_rows=recipe.scores.rows))
        shown = tqdm(batches, "teacher geometry, batches read", leave=False)
        return functional_geometry(job.teacher, shown, layer=layer)

    return job.memo.geometry(f"{layer} {recipe.scores.rows}", compute)


def direction_scores(job: Job, recipe: Recipe, rotation: Rotation[PreTrainedModel]) -> DirectionScores:
    """The numbers by which the recipe chooses directions for its cut.

    `scores` and `lowest` are `Rotation.scores`, of the geometry at the head, or over all layers unit scores in its
    basis, by `gradient_x_activation`. `activation` is the mean size of the coordinates on the calibration rows; a mixed
    basis lies in the order of what it adds up.
    """
    chosen_by = recipe.student.chosen_by
    if chosen_by in BY_SCORES and recipe.scores.layer == ALL_LAYERS:
        values = _scores_over_layers(job, recipe, rotation)
    elif chosen_by in BY_SCORES:
        values = rotation.scores(geometry_at(job, recipe, HEAD_INPUT))
    elif chosen_by == "activation":
        precision = scoring_dtype(job.teacher_precision)
        values = mean_coordinates(job.teacher, job.calibration(recipe), rotation.basis, precision=precision)
    elif chosen_by == "random":
        values = random_values(len(rotation.basis), score_seed(recipe))
    else:
        values = rotation.energy.clamp(min=0)
    return DirectionScores(values, chosen_by, directions_hash(rotation.basis))


def _scores_over_layers(job: Job, recipe: Recipe, rotation: Rotation[PreTrainedModel]) -> Float64[Tensor, " hidden"]:
    """Scores of all directions at every block, in which the size of a state along them counts; runs share them."""
    section = recipe.scores

    def compute() -> tuple[UnitScores, ...]:
        batches = list(job.batches("train", num_rows=section.rows))
        shown = tqdm(batches, "teacher directions, batches scored", leave=False)
        precision = scoring_dtype(job.teacher_precision)
        scores = score_units(
            job.teacher,
            shown,
            target=section.target,
            attribution="gradient_x_activation",
            layer=ALL_LAYERS,
            basis=rotation.basis,
            precision=precision,
        )
        return (scores,)

    settings = f"{directions_hash(rotation.basis)} {section.model_dump_json(exclude={'attribution'})}"
    return job.memo.scores(settings, compute)[0].values
