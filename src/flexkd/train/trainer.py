"""A transformers Trainer whose loss is an objective, with exact counts for each optimizer step."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from flexkd.core.objective import Objective, ObjectiveValue, PredictionValue, StepCounts
from flexkd.core.outputs import HeadOutputs
from flexkd.core.tensors import num_processes
from flexkd.errors import RecipeError, TrainingError
from flexkd.models.adapters import unwrapped
from flexkd.models.hidden import is_generative, model_inputs, prediction_labels
from flexkd.teacher.live import LiveTeacher, batch_positions, read_signal, student_columns
from flexkd.teacher.signal import BatchPositions, SignalRequest, Teacher
from flexkd.train.chunks import LogitChunks
from flexkd.train.failures import AdapterGradients, not_finite
from flexkd.train.order import LengthGroupedOrder
from flexkd.train.state import STATE_FILE, check_state, save_state

_COUNTS: Final = "step_counts"


class DistillationTrainer(Trainer):
    """Trains a student against an `Objective`; everything else is the Trainer's own.

    The teacher is no part of the student: it is not saved, not trained, and always in eval mode. What only training
    needs (a projector) lives in the objective and joins the optimizer. Loss parts are logged raw and weighted; the
    weighted ones add up to `loss`.

    Args:
        model: The student: a model of transformers, or one that `add_lora` has put adapters into.
        teacher: A model, which runs on every batch, or any `Teacher`. None when no term of the objective reads one.
        objective: What is minimised.
        args: As for Trainer. `remove_unused_columns` and `logging_nan_inf_filter` are switched off: the first would
            drop the teacher's columns, the second would hide a step that went wrong.
        fingerprints: What the run depends on, by name, such as the teacher's weights; stored with every checkpoint,
            and a resume under others is refused.
        logit_chunk: Supervised positions of a language model whose logits are made together, in the loss and in its
            gradient; `auto`: as many as 24 MiB of float32 hold, where a batch has more; `off`: all.
        further_metrics: More metrics of every evaluation, by name; called with the student, which is in eval mode.
        **kwargs: As for Trainer.

    Raises:
        RecipeError: The objective reads a teacher and there is none, or implicit DataParallel would split batches.
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
        further_metrics: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        if objective.needs_teacher and teacher is None:
            raise RecipeError("teacher: the objective reads one, none was given. Pass teacher=, or drop those terms.")
        if args.n_gpu > 1:
            raise RecipeError(
                f"{args.n_gpu} GPUs in one process would split each batch and its statistics. Start with "
                "'accelerate launch', or show one GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False
        args.label_names = ["labels"]
        if args.ddp_find_unused_parameters is None:
            # Every output of the student stays in the graph, with a zero where no term reads it: none is unused.
            args.ddp_find_unused_parameters = False
        self.student = unwrapped(model)
        config = self.student.config
        use_cache = getattr(config, "use_cache", None)
        super().__init__(model=model, args=args, **kwargs)
        # The Trainer writes its own wish into the config, which is saved with the student.
        if use_cache is None:
            del config.use_cache
        else:
            config.use_cache = use_cache
        # The Trainer decides by the model's signature; here every loss is already a share of the whole step.
        self.loss_is_scaled_for_ga = True
        if model is not self.student:
            self.add_callback(AdapterGradients())
        self.teacher = _live(teacher, args) if isinstance(teacher, nn.Module) else teacher
        self.objective: Objective = objective
        self.objective.modules.to(args.device)
        self.request = SignalRequest.of(objective)
        self.fingerprints = dict(fingerprints or {})
        self._chunks = LogitChunks(self.student, logit_chunk)
        self.further_metrics = further_metrics
        self._reads = tuple((pair.student_layer, student_columns(pair)) for pair in self.request.layers)
        self._start_window()
        self._evaluated: dict[str, Tensor] = {}
        self._evaluated_sizes: dict[str, int] = defaultdict(int)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; each run logs its own steps alone."""
        self._start_window()
        return super().train(*args, **kwargs)

    def _start_window(self) -> None:
        self._window: dict[str, Tensor] = {}
        self._window_sizes: dict[str, int] = defaultdict(int)
        self._window_steps = 0

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """All micro-batches of one optimizer step, each told what the whole step divides by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch, counts in zip(batches, self._step_counts(batches), strict=True):
            batch[_COUNTS] = counts
        # The Trainer clears the gradients of the model alone.
        self.objective.modules.zero_grad()
        self._window_steps += 1
        return batches, None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, Sized):
            return super()._get_train_sampler(train_dataset)
        # The Trainer's own draws from the global generator, whose state a resumed run does not have at its epoch.
        rows_of: Any = dataset
        lengths = [len(rows_of[index]["input_ids"]) for index in range(len(dataset))]
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedOrder(lengths, rows, seed)

    def _step_counts(self, batches: Sequence[Mapping[str, Any]]) -> list[StepCounts]:
        if not batches:
            return []
        local = torch.tensor([self._batch_counts(batch) for batch in batches], device=self.args.device)
        if num_processes() > 1:
            dist.all_reduce(local)
        totals = local.sum(0).tolist()
        return [StepCounts(totals[0], totals[1], positions) for _, positions in local.tolist()]

    def _batch_counts(self, batch: Mapping[str, Any]) -> tuple[int, int]:
        positions = self._positions(batch)
        features = int(positions.features.sum()) if positions.features is not None else 0
        return len(self._labels(batch, positions)), features

    def _positions(self, batch: Mapping[str, Any]) -> BatchPositions:
        return batch_positions(self.student, model_inputs(self.student, batch), batch["labels"], self.request)

    def _labels(self, batch: Mapping[str, Any], positions: BatchPositions) -> Tensor:
        return prediction_labels(self.student, batch["labels"], positions.supervised)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Value of the objective for one micro-batch.

        Raises:
            TrainingError: It is not finite; names the step, the terms and the examples.
        """
        counts = inputs.get(_COUNTS) or self._step_counts([inputs])[0]
        positions = self._positions(inputs)
        labels = self._labels(inputs, positions)
        teacher = None
        if self.objective.needs_teacher:
            assert self.teacher is not None
            teacher = self.teacher.signal(inputs, self.request)
        outputs = None if teacher is None else teacher.logits
        nll = is_generative(self.student) and not model.training
        chunk_size = self._chunks.size(inputs, len(labels))
        found: list[PredictionValue] = []

        def use(states: HeadOutputs) -> None:
            found.append(self.objective.predictions(states, outputs, labels, counts, chunk_size=chunk_size, nll=nll))

        student = read_signal(
            self.student,
            model_inputs(self.student, inputs),
            positions,
            self._reads,
            forward=model,
            use=None if chunk_size is None else use,
        )
        if chunk_size is None:
            found.append(self.objective.predictions(student.logits, outputs, labels, counts, nll=nll))
        value = self.objective(student, teacher, labels, counts, found[0])
        if not bool(torch.isfinite(value.loss)):
            raise TrainingError(not_finite(value, student, inputs, self.state.global_step + 1))
        self._collect(value, counts, len(labels), training=model.training)
        return (value.loss, {"logits": student.logits}) if return_outputs else value.loss

    def _collect(self, value: ObjectiveValue, counts: StepCounts, predictions: int, *, training: bool) -> None:
        if not training:
            parts = dict(value.parts)
            if "nll_sum" in parts:
                # Plain nats a token, whatever the objective weighs or smooths: what the best checkpoint is chosen by.
                self._evaluated["nll"] = self._evaluated.get("nll", 0) + parts.pop("nll_sum")
                self._evaluated_sizes["nll"] += predictions
            for name, part in parts.items():
                size = counts.positions if name.startswith("features") else counts.predictions
                self._evaluated[name] = self._evaluated.get(name, 0) + part * size
                self._evaluated_sizes[name] += size
            return
        tallies = {**value.counts}
        if self.request.layers:
            tallies["feature_positions"] = torch.tensor(float(counts.micro_positions))
        for name, part in {**value.parts, **tallies}.items():
            self._window[name] = self._window.get(name, 0) + part
            self._window_sizes[name] += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, averaged over the steps since the last log and over processes."""
        if "loss" in logs and self._window_steps > 0:
            for name, total in self._window.items():
                # Parts add up over a step's micro-batches, as the loss does; counts are means over them.
                is_part = name.endswith(("_raw", "_weighted"))
                divisor = self._window_steps if is_part else self._window_sizes[name]
                mean = self.accelerator.gather(total.detach().float().to(self.args.device).reshape(1)).mean().item()
                logs[name] = mean if name == "skipped_feature_terms" else mean / divisor
            self._start_window()
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's, with the loss and its parts as one step over all rows would have them.

        Parts are means over predictions, that of the features over positions, the last short batch included.
        """
        self._evaluated, self._evaluated_sizes = {}, defaultdict(int)
        output = super().evaluation_loop(*args, **kwargs)
        if self._evaluated and output.metrics is not None:
            means = {
                name: self.accelerator.gather(total.reshape(1)).mean().item() / max(self._evaluated_sizes[name], 1)
                for name, total in self._evaluated.items()
            }
            loss = sum(mean for name, mean in means.items() if name.endswith("_weighted"))
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics.update({f"{prefix}_{name}": mean for name, mean in {"loss": loss, **means}.items()})
            if self.further_metrics is not None:
                found = self.further_metrics(self.student)
                output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits and labels of one batch; the loss is the training objective's."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), outputs["logits"].detach(), inputs["labels"]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's, with the parameters that only training needs."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        own = list(self.objective.parameters())
        if created and own:
            optimizer.add_param_group({"params": own, "weight_decay": self.args.weight_decay})
        return optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        own = [p.grad for p in self.objective.parameters() if p.grad is not None]
        norms = [norm, nn.utils.get_total_norm(own)] if own else [norm]
        wrong = next((float(one) for one in norms if one is not None and not math.isfinite(one)), None)
        # In float16 the loss scaler finds overflows and skips them by itself.
        if wrong is not None and not self.args.fp16:
            raise TrainingError(
                f"step {self.state.global_step + 1}: the gradient norm is {wrong}. No optimizer step was taken with "
                "it. Lower the learning rate, or train in float32."
            )
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            # That of an older run would tell that a half-written checkpoint is whole.
            (folder / STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            save_state(folder, self.objective, self.fingerprints)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_state(Path(resume_from_checkpoint), self.objective, self.fingerprints)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def _live(teacher: nn.Module, args: TrainingArguments) -> LiveTeacher:
    model = unwrapped(teacher)
    nn.Module.to(model, args.device)
    return LiveTeacher(model, precision=_precision(args))


def _precision(args: TrainingArguments) -> torch.dtype | None:
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else None
