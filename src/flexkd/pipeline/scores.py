"""Scores of the teacher's units and directions, each computed once for all runs of a job that read it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from flexkd.core.scores import UnitScores
from flexkd.display.progress import Tracked
from flexkd.facts.names import ALL_LAYERS
from flexkd.models.forward.autocast import scoring_dtype
from flexkd.models.forward.hidden import HEAD_INPUT
from flexkd.models.slicing.calibration import Calibration, CalibrationPass, calibrate
from flexkd.models.slicing.rotation import StreamBasis, mean_coordinates
from flexkd.models.slicing.shape import shape_of
from flexkd.pipeline.job import Job
from flexkd.processes import share_of
from flexkd.recipe import Recipe
from flexkd.recipe.fingerprints import score_seed
from flexkd.recipe.taught_features import BY_SCORES, cut_chosen_by
from flexkd.scoring.geometry import functional_geometry
from flexkd.scoring.selection_file import DirectionScores, directions_hash
from flexkd.scoring.teacher_graph import Watch
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
        batches = Tracked(list(job.batches("train", num_rows=section.rows)), "scores of the teacher's units")
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


def geometry_at(
    job: Job, recipe: Recipe, layer: int, *, stored: Float[Tensor, "hidden hidden"] | None = None
) -> Float64[Tensor, "hidden hidden"]:
    """The functional geometry of a teacher layer on the scoring rows, in numbers of float32; runs share it.

    Args:
        stored: What an earlier process computed, in place of a pass over the rows.
    """

    def compute() -> Tensor:
        return _geometry(job, recipe, layer) if stored is None else stored.double()

    return job.memo.geometry(_geometry_settings(recipe, layer), compute)


def _geometry_settings(recipe: Recipe, layer: int) -> str:
    return f"{layer} {recipe.scores.rows}"


def _geometry(job: Job, recipe: Recipe, layer: int, watches: Sequence[Watch] = ()) -> Float64[Tensor, "hidden hidden"]:
    batches = list(job.batches("train", num_rows=recipe.scores.rows))
    shown = Tracked(batches, "geometry of the teacher's states")
    # As it is stored: what comes of it is the same to the bit in a run that goes on.
    return functional_geometry(job.teacher, shown, layer=layer, watches=watches).float().double()


def calibration_of(job: Job, recipe: Recipe, *, geometry_follows: bool = False) -> Calibration:
    """What the calibration rows show of a teacher that a student is cut from along directions; runs share it.

    Args:
        geometry_follows: Whether the geometry of the head's input will be read too. If it is not known yet, the teacher
            reads the rows of both once: they are the first training rows, here and there.
    """
    settings = _geometry_settings(recipe, HEAD_INPUT)

    def compute() -> Calibration:
        if not geometry_follows or job.memo.has_geometry(settings):
            return calibrate(job.teacher, Tracked(job.calibration(recipe), "calibration of the cut"))
        calibration, geometry = _with_geometry(job, recipe)
        job.memo.geometry(settings, lambda: geometry)
        return calibration

    return job.memo.calibration(recipe.student.calibration_rows, compute)


def _with_geometry(job: Job, recipe: Recipe) -> tuple[Calibration, Float64[Tensor, "hidden hidden"]]:
    """The calibration, and the geometry of the head's input, in one pass over the rows that both read."""
    rows = (recipe.student.calibration_rows, recipe.scores.rows)
    ids = [[batch["example_id"] for batch in job.batches("train", num_rows=count)] for count in rows]
    num_shared = 0
    while num_shared < min(map(len, ids)) and ids[0][num_shared] == ids[1][num_shared]:
        num_shared += 1
    unread = dict(share_of(enumerate(job.calibration(recipe))))
    calibration = CalibrationPass(job.teacher)
    with calibration.observation.hooked() as observation:

        @contextmanager
        def watch(number: int, inputs: Mapping[str, Tensor]) -> Iterator[None]:
            del unread[number]
            with observation.reading(inputs):
                yield

        geometry = _geometry(job, recipe, HEAD_INPUT, [partial(watch, number) for number in range(num_shared)])
        # Rows that fill no batch of their own in one of the two, and batches without anything to predict.
        for batch in unread.values():
            observation.read(batch)
    return calibration.result(), geometry


def direction_scores(job: Job, recipe: Recipe, stream: StreamBasis) -> DirectionScores:
    """The numbers by which the recipe chooses directions for its cut.

    `scores` and `lowest` are `StreamBasis.scores`, of the geometry at the head, or over all layers unit scores in its
    basis, by `gradient_x_activation`. `activation` is the mean size of the coordinates on the calibration rows; a mixed
    basis lies in the order of what it adds up.
    """
    chosen_by = cut_chosen_by(recipe, rotated=True)
    if chosen_by in BY_SCORES and recipe.scores.layer == ALL_LAYERS:
        values = _scores_over_layers(job, recipe, stream)
    elif chosen_by in BY_SCORES:
        values = stream.scores(geometry_at(job, recipe, HEAD_INPUT))
    elif chosen_by == "activation":
        precision = scoring_dtype(job.teacher_precision)
        values = mean_coordinates(job.teacher, job.calibration(recipe), stream.basis, precision=precision)
    elif chosen_by == "random":
        values = random_values(len(stream.basis), score_seed(recipe))
    else:
        values = stream.energy.clamp(min=0)
    return DirectionScores(values, chosen_by, directions_hash(stream.basis))


def _scores_over_layers(job: Job, recipe: Recipe, stream: StreamBasis) -> Float64[Tensor, " hidden"]:
    """Scores of all directions at every block, in which the size of a state along them counts; runs share them."""
    section = recipe.scores

    def compute() -> tuple[UnitScores, ...]:
        batches = list(job.batches("train", num_rows=section.rows))
        shown = Tracked(batches, "scores of the teacher's directions")
        precision = scoring_dtype(job.teacher_precision)
        scores = score_units(
            job.teacher,
            shown,
            target=section.target,
            attribution="gradient_x_activation",
            layer=ALL_LAYERS,
            basis=stream.basis,
            precision=precision,
        )
        return (scores,)

    settings = f"{directions_hash(stream.basis)} {section.model_dump_json(exclude={'attribution'})}"
    return job.memo.scores(settings, compute)[0].values
