"""One training run of any model against any objective: progress, best checkpoint, resume."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from torch import nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from flexkd.core.objective import Objective
from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.processes import decided, num_processes, process_index
from flexkd.run_files import checkpoints
from flexkd.teacher.signal import Teacher
from flexkd.training.arguments import LAST_STEP
from flexkd.training.early_stopping import STOP_EARLY, EarlyStopping
from flexkd.training.interruption import Interruption
from flexkd.training.progress import TrainingProgress
from flexkd.training.sharding import gather_into, is_sharded
from flexkd.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)

_WRAPPED_ATTRIBUTES: Final = ("forward", "_original_forward")


@dataclass(frozen=True)
class ValidationMetrics:
    """The metrics of a model at every evaluation of a training run.

    Attributes:
        metric: Name of the metric that chooses the best checkpoint.
        of_outputs: Metrics of all outputs and labels of the validation rows; None where the trainer's own suffice.
        of_model: Further metrics, computed with the model itself.
    """

    metric: str
    of_outputs: Callable[[EvalPrediction], dict[str, float]] | None = None
    of_model: Callable[[PreTrainedModel], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained, on which rows, against which objective; the TrainingArguments say how long and in which folder.

    Attributes:
        model: Trained in place: a model of transformers, or one that `add_lora` has put adapters into.
        objective: What is minimised.
        rows: Encoded training rows.
        validation: Encoded rows that choose the best checkpoint.
        collator: Encoded rows to batches.
        validation_metrics: Metrics of every evaluation.
        description: Names the run in the log.
        logit_chunk: As in `DistillationTrainer`.
        compile_blocks: As in `DistillationTrainer`.
    """

    model: nn.Module
    objective: Objective
    rows: Sequence[EncodedRow]
    validation: Sequence[EncodedRow]
    collator: Collator
    validation_metrics: ValidationMetrics
    description: str
    logit_chunk: int | str = "auto"
    compile_blocks: bool = False

    def trainer(
        self,
        teacher: Teacher | None,
        arguments: TrainingArguments,
        *,
        fingerprints: Mapping[str, str] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> DistillationTrainer:
        """A trainer for this plan, which prints nothing; the teacher is None when the objective reads none."""
        trainer = DistillationTrainer(
            model=self.model,
            teacher=teacher,
            objective=self.objective,
            args=arguments,
            fingerprints=fingerprints,
            logit_chunk=self.logit_chunk,
            compile_blocks=self.compile_blocks,
            further_metrics=self.validation_metrics.of_model,
            train_dataset=self.rows,
            # Rows of one length together: less padding is computed, and no metric depends on the order.
            eval_dataset=sorted(self.validation, key=lambda row: len(row["input_ids"])),
            data_collator=self.collator,
            compute_metrics=self.validation_metrics.of_outputs,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def train(
    training_plan: TrainingPlan,
    teacher: Teacher | None,
    arguments: TrainingArguments,
    *,
    fingerprints: Mapping[str, str],
    resume: bool = True,
    early_stopping: EarlyStopping | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> DistillationTrainer:
    """Train; the model then has the weights of its best evaluation, is in eval mode and without the run's autocast.

    Args:
        teacher: None when the objective reads none.
        arguments: From `training_arguments`.
        fingerprints: What the run depends on; a checkpoint with other fingerprints is refused.
        resume: Continue from the last checkpoint in the output folder.
        early_stopping: When the run ends before its last step; None: never.

    Raises:
        TrainingError: A loss or a gradient is not finite.
        ArtifactError: The checkpoint belongs to another run.
        KeyboardInterrupt: The user or the system asked the process to end; a checkpoint of the step was written.
    """
    # Seeds the dropout of this run; a resume restores the random state of its checkpoint instead.
    set_seed(arguments.seed)
    checkpoint = _checkpoint(Path(str(arguments.output_dir))) if resume else None
    if checkpoint is not None:
        logger.info("%s: continuing from %s", training_plan.description, checkpoint)
    logger.info("%s: %s", training_plan.description, training_plan.objective.formula())
    interruption = Interruption()
    callbacks = [LAST_STEP(), interruption, *callbacks]
    if early_stopping is not None:
        early_stopping.tell(arguments.max_steps, int(arguments.eval_steps or 1))
        callbacks.append(STOP_EARLY(early_stopping))
    progress = TrainingProgress(training_plan.description)
    # Under FSDP a copy learns, as a model that was divided stays so; the model itself gets the weights at the end.
    learning = copied(training_plan) if is_sharded(arguments) else training_plan
    trainer = learning.trainer(teacher, arguments, fingerprints=fingerprints, callbacks=[*callbacks, progress])
    if num_processes() > 1:
        # Each drops other units; a resume restores the random state of each.
        set_seed(arguments.seed + process_index())
    # The Trainer itself loads the weights of the best evaluation when it ends (`load_best_model_at_end`).
    with restored_forward(learning.model), progress, interruption.awaited():
        if checkpoint is None:
            trainer.train()
        elif not _finished(trainer, checkpoint, early_stopping):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    if learning is not training_plan:
        gather_into(training_plan.model, learning.model)
        nn.Module.to(training_plan.model, arguments.device)
    training_plan.model.eval()
    return trainer


def copied(training_plan: TrainingPlan) -> TrainingPlan:
    """The plan with a copy of its model; the model itself waits on the CPU."""
    return replace(training_plan, model=deepcopy(nn.Module.to(training_plan.model, "cpu")))


def _checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole, as the first process sees it."""

    def name() -> str | None:
        for checkpoint, damage in checkpoints(folder):
            if not damage:
                return checkpoint.name
            aside = folder / checkpoint.name.replace("checkpoint", "damaged")
            logger.warning("%s: damaged (%s); moved to %s, and the one before is taken.", checkpoint, damage, aside)
            # There, the Trainer would count it among the latest ones, and remove others in its place.
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.replace(aside)
        return None

    last_name = decided(name)
    return None if last_name is None else folder / last_name


@contextmanager
def restored_forward(model: nn.Module) -> Iterator[None]:
    """Restores the model's `forward` afterwards, so that its next user decides on the precision.

    The Trainer wraps `forward` in the autocast of the run and leaves it so. What accelerate offers to unwrap it would
    also remove the decorators that transformers puts around a forward.
    """
    before: dict[str, Any] = {name: vars(model)[name] for name in _WRAPPED_ATTRIBUTES if name in vars(model)}
    try:
        yield
    finally:
        for name in _WRAPPED_ATTRIBUTES:
            vars(model).pop(name, None)
        vars(model).update(before)


def _finished(trainer: DistillationTrainer, checkpoint: Path, early_stopping: EarlyStopping | None) -> bool:
    """Whether the run ended at the checkpoint; if so, loads its log and its best weights.

    Resumed from the last step of a run, the Trainer would take one step more.
    """
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    stopped_early = early_stopping is not None and early_stopping.ends(state.log_history)
    if state.global_step < state.max_steps and not stopped_early:
        return False
    trainer.state = state
    best = state.best_global_step or state.global_step
    trainer._load_from_checkpoint(str(checkpoint.with_name(f"checkpoint-{best}")))
    return True
