"""One training run of any model against any objective: progress, best checkpoint, resume."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import EvalPrediction, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from flexkd.core.objective import Objective
from flexkd.data.collate import Collator
from flexkd.evaluate.classification import classification_metrics
from flexkd.teacher.signal import Teacher
from flexkd.train.arguments import LAST_STEP
from flexkd.train.state import last_checkpoint
from flexkd.train.trainer import DistillationTrainer

logger = logging.getLogger(__name__)

TASK_LOSSES: Final = {"single_label": "cross_entropy", "multi_label": "binary_cross_entropy", "regression": "mse"}
"""Loss against the labels of each kind of problem."""


def train(
    model: nn.Module,
    teacher: Teacher | None,
    objective: Objective,
    arguments: TrainingArguments,
    *,
    rows: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    collator: Collator,
    problem: str,
    fingerprints: Mapping[str, str],
    description: str,
    resume: bool = True,
) -> DistillationTrainer:
    """Train, and leave the model with the weights of its best evaluation, in eval mode.

    Args:
        model: Trained in place: a model of transformers, or one that `add_lora` has put adapters into.
        teacher: None when the objective reads none.
        objective: What is minimised.
        arguments: From `training_arguments`.
        rows: Features of the training rows.
        validation: Features of the rows that choose the best checkpoint.
        collator: Features to batches.
        problem: Kind of problem, for the metrics.
        fingerprints: What the run depends on; a checkpoint of other ones is refused.
        description: Names the run in the log.
        resume: Go on from the last checkpoint in the output folder.

    Raises:
        TrainingError: A loss or a gradient is not finite.
        ArtifactError: The checkpoint belongs to another run.
    """
    set_seed(arguments.seed)
    checkpoint = last_checkpoint(Path(str(arguments.output_dir))) if resume else None
    if checkpoint is not None:
        logger.info("%s: going on from %s", description, checkpoint)
    logger.info("%s: %s", description, objective.formula())
    trainer = DistillationTrainer(
        model=model,
        teacher=teacher,
        objective=objective,
        args=arguments,
        fingerprints=fingerprints,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=collator,
        compute_metrics=_metrics(problem),
        callbacks=[LAST_STEP()],
    )
    if checkpoint is None:
        trainer.train()
    elif not _finished(trainer, checkpoint):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    model.eval()
    return trainer


def _finished(trainer: DistillationTrainer, checkpoint: Path) -> bool:
    """Whether the run ended at the checkpoint; then its log and its best weights are put back.

    The Trainer would take one step more.
    """
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if state.global_step < state.max_steps:
        return False
    trainer.state = state
    best = state.best_global_step or state.global_step
    trainer._load_from_checkpoint(str(checkpoint.with_name(f"checkpoint-{best}")))
    return True


def _metrics(problem: str) -> Any:
    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = torch.as_tensor(prediction.predictions).float()
        found = classification_metrics(logits, torch.as_tensor(prediction.label_ids), problem)
        return {name: float("nan") if value is None else value for name, value in found.items()}

    return compute
