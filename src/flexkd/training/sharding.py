"""Weights of a student that are divided among processes while it trains (FSDP2): checked, and gathered at the end."""

from collections.abc import Iterator
from typing import Any, Final

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from flexkd.errors import ProcessError
from flexkd.models.forward.hidden import model_blocks
from flexkd.processes import shards_weights

_SECOND: Final = 2


def is_sharded(args: TrainingArguments) -> bool:
    """Whether FSDP is asked for, by arguments or by a launcher."""
    return bool(args.fsdp) or shards_weights()


def use_fsdp(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Let an accelerator shard, also on a CPU, where accelerate would train whole copies (DDP) without a word.

    Raises:
        ProcessError: One process, or settings of FSDP under which a recipe was never run.
    """
    state: Any = accelerator.state
    if accelerator.num_processes == 1:
        raise ProcessError("ACCELERATE_USE_FSDP: one process, and nothing to divide. Start several, or leave FSDP out.")
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        # Each new state of accelerate begins with a copy of the partial one.
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    plugin = getattr(state, "fsdp_plugin", None)
    if accelerator.distributed_type != DistributedType.FSDP or plugin is None:
        raise ProcessError(
            f"ACCELERATE_USE_FSDP: accelerate chose {accelerator.distributed_type} here, and would train whole copies. "
            "Leave FSDP out, or train on GPUs."
        )
    if plugin.fsdp_version != _SECOND:
        raise ProcessError(
            f"FSDP_VERSION: is {plugin.fsdp_version}, and students are sharded by version 2. Set it to 2 "
            "(accelerate launch --fsdp_version 2)."
        )


def divide_by_blocks(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Name the blocks of a model as what FSDP divides, each by itself; states are read behind them.

    A model's own list (`_no_split_modules`) has embeddings in it, too, which accelerate would divide twice.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    kinds = {type(block) for block in model_blocks(model)}
    marked = set(model._no_split_modules or ())
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            kinds |= {type(part) for part in module if type(part).__name__ in marked}
    plugin.transformer_cls_names_to_wrap = sorted(kind.__name__ for kind in kinds)


def check_sharded(model: PreTrainedModel) -> None:
    """Prove that a prepared model is divided, block by block.

    Raises:
        ProcessError: Names the first weight that is whole, or says that the blocks are not divided each by itself.
    """
    undivided = [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    if undivided:
        raise ProcessError(
            f"FSDP: {len(undivided)} weights of {type(model).__name__} are whole in each process (first: "
            f"{undivided[0]}). Leave FSDP_IGNORED_MODULES out."
        )
    if not all(isinstance(block, FSDPModule) for block in model_blocks(model)):
        raise ProcessError(
            f"FSDP: the blocks of {type(model).__name__} are not divided each by itself. Set FSDP_AUTO_WRAP_POLICY to "
            "TRANSFORMER_BASED_WRAP, or leave it out, and FSDP_ACTIVATION_CHECKPOINTING too."
        )


@torch.no_grad()
def gather_into(model: nn.Module, sharded: nn.Module) -> None:
    """Copy the weights of a sharded model into a whole one, one tensor at a time, in every process.

    Args:
        model: The model that the sharded one is a copy of.
    """
    targets = dict(_tensors(model))
    for name, value in _tensors(sharded):
        targets[name].copy_(whole(value))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def whole(value: Tensor) -> Tensor:
    """A tensor of all processes, in each of them."""
    return value.full_tensor() if isinstance(value, DTensor) else value
