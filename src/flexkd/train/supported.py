"""What a `DistillationTrainer` cannot do, refused when it is made."""

import os
from typing import Final

from torch import nn
from transformers import TrainingArguments

from flexkd.core.objective import Objective
from flexkd.errors import RecipeError
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import Teacher

_ZERO_3: Final = 3


def check_supported(args: TrainingArguments, objective: Objective, teacher: nn.Module | Teacher | None) -> None:
    """Refuse arguments under which training would fail late, or do something else than it says.

    A teacher that runs on every batch is whole on each device: one process and DistributedDataParallel train beside it
    (tested), and DeepSpeed up to ZeRO-2 (not tested). Where weights are sharded, its forward would gather or miss them.

    Raises:
        RecipeError: Says what to do in its place.
    """
    if objective.needs_teacher and teacher is None:
        raise RecipeError("teacher: the objective reads one, none was given. Pass teacher=, or drop those terms.")
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


def _sharding(args: TrainingArguments) -> str | None:
    """What splits the weights, set by arguments or by `accelerate launch`."""
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        return "FSDP"
    plugin = args.deepspeed_plugin
    return "DeepSpeed ZeRO-3" if plugin is not None and plugin.zero_stage == _ZERO_3 else None
