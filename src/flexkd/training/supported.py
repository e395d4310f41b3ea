"""Arguments that a `DistillationTrainer` does not support, refused when it is created."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from flexkd.core.objective import Objective
from flexkd.errors import DataError, RecipeError
from flexkd.models.forward.hidden import is_generative
from flexkd.processes import shards_weights
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import Teacher

_ZERO_3: Final = 3
_FSDP: Final = "FSDP"
_LABELS: Final = "labels"
_WHAT_CAN: Final = (
    "evaluate() gives loss and nll, flexkd.evaluate.likelihood.likelihoods the nats of each row, "
    "flexkd.evaluate.generation.generate_answers and `flexkd evaluate` answers and their metrics; during training, "
    "further_metrics of the trainer."
)


_NO_OPTIONS: Final[Mapping[str, Any]] = {}
_ADVICE: Final = {
    "model_init": "the student and the objective are made for each other. Give model=, a student that is made.",
    "compute_loss_func": "the objective is the loss. Give it another term (docs/extend.md).",
}
"""Advice for options of the Trainer that would be ignored."""


def check_supported(
    args: TrainingArguments,
    objective: Objective,
    teacher: nn.Module | Teacher | None,
    options: Mapping[str, Any] = _NO_OPTIONS,
) -> None:
    """Refuse arguments under which training would fail late, or do something else than it says.

    A teacher that runs on every batch is whole on each device: one process, DistributedDataParallel and FSDP2 train
    beside it (tested), and DeepSpeed up to ZeRO-2 (not tested). ZeRO-3 would divide every model of the process.

    Args:
        options: Further options of the Trainer, by name.

    Raises:
        RecipeError: Says what to do in its place.
    """
    if objective.needs_teacher and teacher is None:
        raise RecipeError("teacher: the objective reads one, none was given. Pass teacher=, or drop those terms.")
    is_teacher = isinstance(teacher, nn.Module | Teacher) and not isinstance(teacher, type)
    if teacher is not None and not is_teacher:
        kind = teacher if isinstance(teacher, type) else type(teacher)
        raise RecipeError(f"teacher: {kind.__name__} does not answer. Give a loaded model, or a Teacher (signal()).")
    for name in (name for name in _ADVICE if options.get(name) is not None):
        raise RecipeError(f"{name}: was given, but {_ADVICE[name]}")
    if args.label_smoothing_factor:
        raise RecipeError(
            f"args.label_smoothing_factor: {args.label_smoothing_factor} would not be read: the objective is the loss. "
            f"Set it to 0, and give TaskTerm(label_smoothing={args.label_smoothing_factor})."
        )
    if args.label_names not in (None, [_LABELS]):
        raise RecipeError(
            f"args.label_names: {args.label_names}, and the objective reads '{_LABELS}' alone. Rename the column, and "
            "leave label_names out."
        )
    if args.n_gpu > 1:
        raise RecipeError(
            f"{args.n_gpu} GPUs in one process would split each batch and its statistics. Start with "
            "'accelerate launch', or show one GPU (CUDA_VISIBLE_DEVICES=0)."
        )
    if args.torch_compile:
        raise RecipeError(
            "args.torch_compile: True compiles the hooks that read states, anew for each batch. Set it to False, and "
            "compile_blocks=True of the trainer (training.compile in a recipe)."
        )
    sharding = _sharding(args)
    if sharding is not None:
        _check_sharding(sharding, args, objective, is_live=isinstance(teacher, nn.Module | LiveTeacher))


def _check_sharding(sharding: str, args: TrainingArguments, objective: Objective, *, is_live: bool) -> None:
    """Refuse what reads weights of the student where they are not whole, and what was never run on divided ones."""
    term = objective.features
    if term is not None and term.lenses:
        raise RecipeError(
            f"objective.features.loss: '{term.loss}' reads the student's head after its forward, and "
            f"under {sharding} it is not whole there. Use another loss, or DistributedDataParallel or ZeRO-2."
        )
    if is_live and sharding != _FSDP:
        raise RecipeError(
            f"teacher: under {sharding} a teacher cannot run beside the student. Use the teacher cache, or "
            "DistributedDataParallel or ZeRO-2."
        )
    if sharding == _FSDP and term is not None and term.projectors:
        raise RecipeError(
            f"objective.features.loss: '{term.loss}' trains projectors, which are no part of the model that FSDP "
            "divides. Use a loss without them, such as 'correlation', or DistributedDataParallel."
        )
    if sharding == _FSDP and args.fp16:
        raise RecipeError("args.fp16: True, and under FSDP models train in float32 or bfloat16. Set bf16 instead.")


def check_sharded_model(model: nn.Module, student: PreTrainedModel, teacher: Teacher | None) -> None:
    """Refuse models of which FSDP would divide too little, or what a teacher runs on.

    Args:
        model: The student as it is trained, with adapters or without.
        student: The student itself.

    Raises:
        RecipeError: Says what to do in its place.
    """
    if model is not student:
        raise RecipeError(
            "model: it has adapters, and under FSDP all weights of a model are trained. Train it whole (student.lora: "
            "null in a recipe), or use DistributedDataParallel."
        )
    trained = {id(weight) for weight in student.parameters()}
    weights = teacher.model.named_parameters() if isinstance(teacher, LiveTeacher) else ()
    shared = next((name for name, weight in weights if id(weight) in trained), None)
    if shared is not None:
        raise RecipeError(
            f"teacher: its weight '{shared}' is the student's too, and under FSDP the student's is divided. Give the "
            "student a copy, or use DistributedDataParallel."
        )


def check_optimizer(optimizer: torch.optim.Optimizer | None, objective: Objective) -> None:
    """Refuse an optimizer without the parameters that the objective trains beside the student.

    Raises:
        RecipeError: Names what it has to hold.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) not in held for parameter in objective.parameters()):
        raise RecipeError(
            "optimizers: this one does not hold the projectors, which would never be trained. Make it of "
            "[*model.parameters(), *objective.parameters()], or leave it out."
        )


def check_outputs(student: PreTrainedModel, where: str) -> None:
    """Refuse to gather the logits of a language model: a whole vocabulary for each token of each row.

    Raises:
        RecipeError: Says what gives the figures that they would be used for.
    """
    if is_generative(student):
        raise RecipeError(
            f"{where}: the logits of a language model, a vocabulary for each token of each row, are not collected. "
            f"{_WHAT_CAN}"
        )


def check_labelled(batch: Mapping[str, Any]) -> None:
    """Refuse a batch without labels.

    Raises:
        DataError: Says how a row without a label is given.
    """
    if batch.get(_LABELS) is None:
        raise DataError(
            f"eval_dataset: its rows have no '{_LABELS}'. Give -100 (NaN where labels are numbers) to rows without "
            "one, or ask the model by flexkd.evaluate.classification.predict."
        )


def _sharding(args: TrainingArguments) -> str | None:
    """What splits the weights, set by arguments or by `accelerate launch`."""
    if args.fsdp or shards_weights():
        return _FSDP
    plugin = args.deepspeed_plugin
    return "DeepSpeed ZeRO-3" if plugin is not None and plugin.zero_stage == _ZERO_3 else None
