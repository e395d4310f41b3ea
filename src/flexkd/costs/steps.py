"""Training steps of a recipe, as the planner sees them: their objective, and a batch of the longest rows."""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.selection import UnitPairs
from flexkd.core.terms import LayerPair, TaskTerm
from flexkd.costs.memory import PlannedStep
from flexkd.costs.rows import Batch, RowLengths
from flexkd.costs.skeletons import Skeletons, outputs_of, width_at
from flexkd.facts.batches import device_batch
from flexkd.facts.losses import FEATURE_LOSS_FACTS, TASK_LOSS_OF
from flexkd.models.forward.autocast import autocast_dtype
from flexkd.models.forward.chunks import chunk_size
from flexkd.models.forward.hidden import is_generative
from flexkd.pipeline.pairing import objective_of
from flexkd.recipe import Recipe


def planned_objective(recipe: Recipe, models: Skeletons) -> Objective:
    """The recipe's objective with the largest number of taught units; which units they are does not change the cost."""

    def widths(pair: LayerPair) -> tuple[int, int]:
        return width_at(models.student, pair.student_layer), width_at(models.teacher, pair.teacher_layer)

    features = recipe.objective.features
    outputs = {outputs_of(model) for model in (models.teacher, models.student)}
    with models.mode:
        layers = [LayerPair(*layer_pair) for layer_pair in (features.layer_map.items() if features is not None else ())]
        if features is not None and FEATURE_LOSS_FACTS[features.loss].pairs_units:
            layers = [_with_units(pair, features.units, *widths(pair)) for pair in layers]
        return objective_of(
            recipe,
            tuple(layers),
            task_loss=TASK_LOSS_OF[recipe.task.problem],
            shared_outputs=min(outputs) if len(outputs) > 1 else None,
            widths=widths,
            models=(models.student, models.teacher),
        )


def _with_units(pair: LayerPair, count: int | None, student_width: int, teacher_width: int) -> LayerPair:
    """The first `count` units of both sides; None: as many as both have."""
    units = torch.arange(min(count or student_width, student_width, teacher_width))
    return replace(pair, units=UnitPairs(units, units))


def _without_numbers(objective: Objective, models: Skeletons) -> Objective:
    """The objective with a correlation in place of a loss whose code reads values; it holds states of the same size."""
    term = objective.features
    if term is None or not FEATURE_LOSS_FACTS[term.loss].reads_values:
        return objective
    with models.mode:
        layers = tuple(
            _with_units(
                pair, None, width_at(models.student, pair.student_layer), width_at(models.teacher, pair.teacher_layer)
            )
            for pair in term.layers
        )
    return Objective(objective.task, objective.logits, replace(term, loss="correlation", layers=layers))


def student_step(
    recipe: Recipe,
    models: Skeletons,
    lengths: RowLengths,
    *,
    precision: str,
    teacher_precision: str,
    runs_teacher: bool,
    processes: int = 1,
) -> PlannedStep:
    """A step of the student's training on the longest rows.

    Args:
        models: Teacher and student, the student with its low-rank updates.
        lengths: How long the rows are.
        precision: Precision of the student's forward, not `auto`.
        teacher_precision: Precision of the teacher's forward, not `auto`.
        runs_teacher: Whether the teacher runs in the step; else its answers come from a cache.
        processes: Processes that divide the rows of the step.

    Raises:
        RecipeError: The rows of a step do not divide.
    """
    section = recipe.training
    at_once, passes = device_batch(section.batch_size, section.per_device_batch_size, processes)
    batch = lengths.splits["train"].heaviest(at_once)
    objective = _without_numbers(planned_objective(recipe, models), models)
    layers = () if objective.features is None else objective.features.layers
    with models.mode:
        teacher_widths = tuple(width_at(models.teacher, pair.teacher_layer) for pair in layers)
    return PlannedStep(
        mode=models.mode,
        student=models.student,
        objective=objective,
        teacher_widths=teacher_widths,
        teacher=models.teacher if runs_teacher else None,
        batch=batch,
        autocast=autocast_dtype(precision),
        teacher_autocast=autocast_dtype(teacher_precision),
        checkpointing=section.gradient_checkpointing,
        logit_chunk=section.logit_chunk,
        accumulates=passes > 1,
    )


def fine_tuning_step(
    recipe: Recipe, step: PlannedStep, teacher: PreTrainedModel, lengths: RowLengths, *, processes: int = 1
) -> PlannedStep:
    """A step of the teacher's own fine-tuning on the longest rows, beside a step of the student's."""
    section = recipe.teacher.fine_tune
    assert section is not None, "the recipe fine-tunes its teacher"
    at_once, passes = device_batch(
        section.batch_size, section.per_device_batch_size, processes, where="teacher.fine_tune"
    )
    batch = lengths.splits["train"].heaviest(at_once)
    return replace(
        step,
        student=teacher,
        objective=Objective(TaskTerm(TASK_LOSS_OF[recipe.task.problem])),
        teacher=None,
        batch=batch,
        autocast=step.teacher_autocast,
        checkpointing=section.gradient_checkpointing,
        logit_chunk="auto",
        accumulates=passes > 1,
    )


def rival_step(recipe: Recipe, step: PlannedStep, rival: PreTrainedModel) -> PlannedStep:
    """A step of a rival's fine-tuning on the labels alone, with the batch of the student's step."""
    objective = Objective(TaskTerm(TASK_LOSS_OF[recipe.task.problem]))
    return replace(step, student=rival, objective=objective, teacher=None, teacher_widths=(), logit_chunk="auto")


def chunk_of(model: PreTrainedModel, batch: Batch, setting: int | str = "auto") -> int | None:
    """Predictions whose logits are in memory at the same time; None: all of them."""
    return chunk_size(setting, outputs_of(model), batch.predictions) if is_generative(model) else None
