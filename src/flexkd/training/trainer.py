"""A transformers Trainer whose loss is an objective, with exact counts for each optimizer step."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from flexkd.core.objective import Objective
from flexkd.errors import DataError
from flexkd.files import writing
from flexkd.models.forward.compilation import compiled_blocks
from flexkd.models.forward.quiet import quiet
from flexkd.models.loading.adapters import unwrapped
from flexkd.models.loading.saving import make_savable
from flexkd.models.loading.shared import check_not_shared, teaching_adapters, without_wrapper
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import Teacher
from flexkd.training.checkpoint import check_state, new_checkpoint, save_state
from flexkd.training.checks import BatchCheck
from flexkd.training.diagnosis import infinite_predictions
from flexkd.training.failures import AdapterGradients, FeaturePositions, StepCheck, TaughtSteps
from flexkd.training.interruption import unsignalled
from flexkd.training.micro_batches import MICRO_BATCH, prepare_step
from flexkd.training.row_sharing import ROUND, EvaluationLoader, Round, loader_options, training_loader
from flexkd.training.sampler import LengthGroupedOrder
from flexkd.training.sharding import check_sharded, divide_by_blocks, is_sharded, use_fsdp
from flexkd.training.step import DistillationStep
from flexkd.training.supported import (
    check_labelled,
    check_optimizer,
    check_outputs,
    check_sharded_model,
    check_supported,
)
from flexkd.training.tallies import EvaluationTally, TrainingTally

logger = logging.getLogger(__name__)


class DistillationTrainer(Trainer):
    """Trains a student against an `Objective`; everything else is the Trainer's own.

    The teacher is no part of the student: it is not saved, not trained, and always in eval mode. What only training
    needs (a projector) lives in the objective and joins the optimizer. Loss parts are logged raw and weighted; the
    weighted ones add up to `loss`.

    Args:
        model: The student: a model of transformers, or one that `add_lora` has put adapters into.
        teacher: A model, which runs on every batch, or any `Teacher`. None when no term of the objective reads one. It
            may have modules in common with the student if they are frozen. Over one base model of PEFT the teacher is
            another adapter, or the base alone: see `LiveTeacher`.
        objective: What is minimised.
        args: As for Trainer. `remove_unused_columns` and `logging_nan_inf_filter` are switched off: the first would
            drop the teacher's columns, the second would hide a loss that is not finite.
        fingerprints: What the run depends on, by name, such as the teacher's weights; stored with every checkpoint,
            and a resume under others is refused.
        logit_chunk: Supervised positions of a language model whose logits are made together, in the loss and in its
            gradient; `auto`: as many as 24 MiB of float32 hold, where a batch has more; `off`: all.
        compile_blocks: Compile the student's blocks while it trains; see `models/forward/compilation.py`.
        further_metrics: More metrics of every evaluation, by name; called with the student, which is in eval mode.
        **kwargs: As for Trainer.

    Raises:
        RecipeError: As `check_supported`; or `compute_metrics` for a language model, whose logits are not collected.
        UnsupportedModelError, VocabularyError: As `check_models`.
        UnsupportedModelError: The teacher is the student, or shares weights with it that the student trains.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | Teacher | None = None,
        *,
        objective: Objective,
        args: TrainingArguments,
        fingerprints: Mapping[str, str] | None = None,
        logit_chunk: int | str = "auto",
        compile_blocks: bool = False,
        further_metrics: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        check_supported(args, objective, teacher, kwargs)
        self.student = unwrapped(model)
        self.teacher = _apart(teacher, model, args)
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False
        args.label_names = ["labels"]
        if args.ddp_find_unused_parameters is None:
            # Every output of the student stays in the graph, with a zero where no term reads it: none is unused.
            args.ddp_find_unused_parameters = False
        if kwargs.get("compute_metrics") is not None:
            check_outputs(self.student, "compute_metrics")
        config = self.student.config
        use_cache = getattr(config, "use_cache", None)
        super().__init__(model=model, args=args, **kwargs)
        # The Trainer sets use_cache in the config, which is saved with the student: the student's own value returns.
        if use_cache is None:
            del config.use_cache
        else:
            config.use_cache = use_cache
        # Every loss is already divided by the counts of the whole step, so that the Trainer must not divide it again.
        self.loss_is_scaled_for_ga = True
        if model is not self.student:
            self.add_callback(AdapterGradients())
        self.objective: Objective = objective
        self.objective.modules.to(args.device)
        check_optimizer(self.optimizer, objective)
        self._step = DistillationStep(self.student, self.teacher, objective, logit_chunk=logit_chunk)
        self.request = self._step.request
        self._current = self._step
        self.fingerprints = dict(fingerprints or {})
        self.compile_blocks = compile_blocks
        self.further_metrics = further_metrics
        self._check_batch = BatchCheck(self.student, self.teacher, objective)
        self._check = StepCheck()
        self._begin_run()
        self._evaluated = EvaluationTally()
        self._round: Round | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train; every call logs its own steps alone.

        Raises:
            UnsupportedModelError: Transformers would not save the student; else the first checkpoint would end the run.
        """
        is_whole = self.model is self.student and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        make_savable(self.student, where="model", weights=is_whole)
        self._begin_run()
        with compiled_blocks(self.student) if self.compile_blocks else nullcontext():
            return super().train(*args, **kwargs)

    def _begin_run(self) -> None:
        self._trained = TrainingTally()
        self._taught_steps = TaughtSteps()
        self._feature_positions = FeaturePositions(self.objective)

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer, with FSDP where it is asked for, on a CPU too."""
        super().create_accelerator_and_postprocess()
        if is_sharded(self.args):
            use_fsdp(self.accelerator, self.args)
            self.is_fsdp_enabled = True

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled:
            divide_by_blocks(self.accelerator, self.student)
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.is_fsdp_enabled:
            check_sharded(self.student)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """All micro-batches of one optimizer step, each with the counts that the whole step divides by."""
        batches = self._prepared(list(islice(epoch_iterator, num_batches)))
        counts = [batch[MICRO_BATCH].counts for batch in batches]
        self._taught_steps.see(counts, max_steps=self.state.max_steps)
        reads_features = self._current.objective.features is not None
        if reads_features:
            self._feature_positions.see([count.micro_positions for count in counts], max_steps=self.state.max_steps)
        # The Trainer clears only the gradients of the model, and projectors are not part of it.
        self.objective.modules.zero_grad()
        self._check = StepCheck()
        self._trained.begin_step(reads_features=reads_features)
        return batches, None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's; batches stay on the CPU until they are counted."""
        loader = super().get_train_dataloader()
        if isinstance(loader, DataLoaderShard):
            loader.device = None
        loader.worker_init_fn = unsignalled(loader.worker_init_fn)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, Sized):
            return super()._get_train_sampler(train_dataset)
        # The Trainer's own sampler draws from the global generator, so that a resumed run would see another order.
        rows_of: Any = dataset
        lengths = [len(rows_of[index]["input_ids"]) for index in range(len(dataset))]
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedOrder(lengths, rows, seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Value of the objective for one micro-batch; in training it is checked once for the whole step."""
        batch = inputs if MICRO_BATCH in inputs else self._prepared([inputs])[0]
        # Hook, loss and backward: `DistillationStep` draws the order of events.
        micro_batch_loss = self._current(batch, is_training=model.training, forward=model)
        value, student = micro_batch_loss.value, micro_batch_loss.student
        # Not the loss itself, whose graph and logits would stay in memory until the step is checked.
        seen = {"distilled": value.distilled, "makes_chunks": micro_batch_loss.makes_chunks}
        reason = partial(self._why_infinite, batch, seen)
        self._check.add(value, student, batch, reason)
        if model.training:
            self._trained.add(value, batch[MICRO_BATCH].counts)
        else:
            self._evaluated.add(value, batch[MICRO_BATCH].counts)
        # DeepSpeed steps within the backward; an evaluation has no step to wait for.
        if self.is_deepspeed_enabled or not model.training:
            self._check.read(self.state.global_step + 1)
        return (value.loss, {"logits": student.logits}) if return_outputs else value.loss

    def _why_infinite(self, batch: dict[str, Any], seen: Mapping[str, Any], terms: Collection[str]) -> str:
        # The teacher answers again: the answers of all micro-batches are not kept until the step is checked.
        needs = self.objective.logits is not None and self.teacher is not None
        answers = (
            self.teacher.signal(batch, self._current.request).logits if needs and self.teacher is not None else None
        )
        return infinite_predictions(self.student, self.objective, batch, answers, terms, **seen)

    def _prepared(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        for batch in batches:
            self._check_batch(batch)
        self._current = self._step.at(self.state.global_step, self.state.max_steps)
        request, device = self._current.request, self.args.device
        return prepare_step(self.student, self.teacher, batches, request, device, self.objective.logits)

    def _mean(self, values: list[Tensor | float]) -> list[float]:
        """Means over processes, read from the device in one transfer."""
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        row = torch.stack([torch.as_tensor(value, dtype=dtype).detach().to(self.args.device) for value in values])
        gathered: list[float] = self.accelerator.gather(row[None]).mean(0).tolist()
        return gathered

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, averaged over the steps since the last log and over processes."""
        if "loss" in logs and self._trained.steps > 0:
            logs.update(self._trained.means(self._mean))
            if self._step.objective is not self._current.objective:
                features = self._current.objective.features
                logs["features_weight"] = 0.0 if features is None else features.weight
            self._trained = TrainingTally()
        super().log(logs, start_time)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        if is_training:
            if self._shares_out(dataset) and (sampler := sampler_fn(dataset)) is not None:
                return training_loader(dataset, self.data_collator, batch_size, sampler, self.accelerator, self.args)
            if self.args.world_size > 1:
                logger.warning(
                    "train_dataset: rows may be repeated at an epoch's end, so that every process has as many"
                )
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, True, dataloader_key)
        loader = EvaluationLoader(dataset, self.data_collator, batch_size, self.accelerator, loader_options(self.args))
        if dataloader_key is not None and self.args.dataloader_persistent_workers:
            self._eval_dataloaders = {**getattr(self, "_eval_dataloaders", {}), dataloader_key: loader}
        return loader

    def _shares_out(self, dataset: Any) -> bool:
        """Whether the rows of an epoch are shared out here: where accelerate would repeat some of them."""
        is_rebalanced = self.args.train_sampling_strategy == "batch_rebalance"
        if self.args.world_size == 1 or is_rebalanced or self.accelerator.split_batches:
            return False
        return isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in Trainer, with the loss and its parts as one step over all rows would have them.

        Each row counts once, in any number of processes, batches and last short batches. Parts are means over
        predictions, that of the features over positions; of a statistic, see `EvaluationTally`.

        Raises:
            RecipeError: The outputs of a language model would be collected.
            DataError: There are no rows.
        """
        is_loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        if not is_loss_only:
            check_outputs(self.student, description)
        self._evaluated = EvaluationTally()
        self.gather_function = self._gathered
        output = super().evaluation_loop(dataloader, description, is_loss_only, ignore_keys, metric_key_prefix)
        self._round = None
        means = self._evaluated.means(self._mean)
        if not means or output.metrics is None:
            raise DataError("eval_dataset: it has no rows. Give some, or do not evaluate (eval_strategy: 'no').")
        if self.further_metrics is not None:
            means |= dict(self.further_metrics(self.student))
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        # Computed in every process; those of the first one count, as all must choose the same checkpoint.
        output.metrics.update(broadcast_object_list([output.metrics])[0])
        self._evaluated.warn(description)
        return output._replace(num_samples=self._evaluated.num_rows or output.num_samples)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits and labels of one batch; the loss is the training objective's, of all processes' batches."""
        check_labelled(inputs)
        inputs = self._prepare_inputs(inputs)
        self._round = inputs.get(ROUND)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if self._round is not None:
            self._evaluated.num_rows += self._round.num_rows
        loss = self.accelerator.reduce(loss.detach(), "mean")
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs["logits"].detach(), inputs["labels"]

    def _gathered(self, tensors: Any) -> Any:
        """Rows of all processes, each once; for a loader made elsewhere, as accelerate gathers them."""
        if self._round is None:
            return self.accelerator.gather_for_metrics(tensors)
        return self._round.gathered(tensors, self.accelerator)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As in Trainer, with the parameters of the objective (projectors) in a group of their own."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        projector_weights = list(self.objective.parameters())
        if created and projector_weights:
            group = {"params": projector_weights, "weight_decay": self.args.weight_decay}
            rate = None if self.objective.features is None else self.objective.features.projector_learning_rate
            optimizer.add_param_group(group if rate is None else {**group, "lr": float(rate)})
        return optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        # In float16 the loss scaler finds overflows and skips them by itself.
        norms = [] if self.args.fp16 else [norm, *([nn.utils.get_total_norm(gradients)] if gradients else [])]
        self._check.read(self.state.global_step + 1, [value for value in norms if value is not None])
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if not self.args.should_save:
            with quiet(), writing(folder):
                super()._save_checkpoint(model, trial)
            return
        with new_checkpoint(folder), quiet():
            super()._save_checkpoint(model, trial)
            save_state(folder, self.objective, self.fingerprints)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_state(Path(resume_from_checkpoint), self.objective, self.fingerprints)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def _apart(teacher: nn.Module | Teacher | None, student: nn.Module, args: TrainingArguments) -> Teacher | None:
    """The teacher as a `Teacher`, after a check that training the student cannot change it."""
    if isinstance(teacher, nn.Module):
        adapters = teaching_adapters(without_wrapper(teacher), student)
        teacher = LiveTeacher(teacher, precision=_precision(args), adapters=adapters)
        nn.Module.to(teacher.model, args.device)
    if isinstance(teacher, LiveTeacher):
        check_not_shared(teacher.model, student, teacher.adapters)
    if is_sharded(args):
        check_sharded_model(student, unwrapped(student), teacher)
    return teacher


def _precision(args: TrainingArguments) -> torch.dtype | None:
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else None
