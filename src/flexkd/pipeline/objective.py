"""The objective of a recipe from its sections and the pairs of units that meet; a run and a plan build the same one."""

from collections.abc import Callable

import torch

from flexkd.core.losses.projector import Projector
from flexkd.core.objective import Objective
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.recipe import Recipe


def objective_of(
    recipe: Recipe,
    layers: tuple[LayerPair, ...],
    *,
    task_loss: str,
    shared_outputs: int | None,
    widths: Callable[[LayerPair], tuple[int, int]],
) -> Objective:
    """The recipe's objective, with projectors where its feature loss learns some.

    Args:
        layers: Pairs of layers that the feature term compares; not read where the recipe has no such term.
        task_loss: The loss against labels.
        shared_outputs: As in `LogitTerm`.
        widths: The student's and the teacher's width at a pair of layers; only asked for projectors.
    """
    section, features = recipe.objective, recipe.objective.features
    task = TaskTerm(task_loss, section.task.weight, section.task.label_smoothing)
    logits = None
    if section.logits is not None:
        logits = LogitTerm(**section.logits.model_dump(), shared_outputs=shared_outputs)
    if features is None or features.weight == 0:
        return Objective(task, logits)
    projectors: tuple[Projector, ...] = ()
    if FEATURE_LOSS_FACTS[features.loss].needs_projector:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.training.seed)
            projectors = tuple(Projector(*widths(pair)) for pair in layers)
    return Objective(task, logits, FeatureTerm(features.loss, features.weight, features.positions, layers, projectors))
