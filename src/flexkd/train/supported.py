"""What a `DistillationTrainer` cannot do, refused when it is made."""

import os
from collections.abc import Mapping
from typing import Any, Final

from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from flexkd.core.objective import Objective
from flexkd.errors import DataError, RecipeError
from flexkd.models.hidden import is_generative
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import Teacher

_ZERO_3: Final = 3
_LABELS: Final = "labels"
_WHAT_CAN: Final = (
    "evaluate() gives loss and nll, flexkd.evaluate.likelihood.likelihoods the nats of each row, "
    "flexkd.evaluate.generation.generate_answers and `flexkd evaluate` answers and their metrics; during training, "
    "further_metrics of the trainer."
)


def check_supported(args: TrainingArguments, objective: Objective, teacher: nn.Module | Teacher | None) -> None:
    """Refuse arguments under which training would fail late, or do something else than it says.

    A teacher that runs on every batch is whole on each device: one process and DistributedDataParallel train beside it
    (tested), and DeepSpeed up to ZeRO-2 (not tested). Where weights are sharded, its forward would gather or miss them.

    Raises:
        RecipeError: Says what to do in its place.
    """
    if objective.needs_teacher and teacher is None:
        raise RecipeError("teacher: the objective reads one, none was given. Pass teacher=, or drop those terms.")
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
    if sharding is not None and isinstance(teacher, nn.Module | LiveTeacher):
        raise RecipeError(
            f"teacher: under {sharding} a teacher cannot run beside the student. Use the teacher cache, or "
            "DistributedDataParallel or ZeRO-2."
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
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        return "FSDP"
    plugin = args.deepspeed_plugin
    return "DeepSpeed ZeRO-3" if plugin is not None and plugin.zero_stage == _ZERO_3 else None
