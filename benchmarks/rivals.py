"""Sides of TRL: its trainers on the same models and rows, and its chunked divergence on the same states."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from benchmarks.losses import Loss
from benchmarks.pairs import Work
from benchmarks.setting import Setting, collate, rows_of, student_of, teacher_of
from benchmarks.stepping import arguments, stepwise

# On by default in TRL.
_OFF: Final = {"gradient_checkpointing": False}


@contextmanager
def gkd_step(setting: Setting) -> Iterator[Work]:
    """An optimizer step of GKDTrainer without generation (lmbda 0): KL(teacher || student) alone (beta 0)."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    config = arguments(GKDConfig, setting.rows, lmbda=0.0, beta=0.0, **_OFF, max_length=setting.length)
    trainer = GKDTrainer(model=student_of(setting), teacher_model=teacher_of(setting), args=config, **_data(setting))
    with stepwise(trainer) as step:
        yield step


@contextmanager
def sft_step(setting: Setting) -> Iterator[Work]:
    """An optimizer step of SFTTrainer."""
    from trl import SFTConfig, SFTTrainer

    unchanged_rows = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    config = arguments(SFTConfig, setting.rows, **_OFF, **unchanged_rows, max_length=setting.length)
    with stepwise(SFTTrainer(model=student_of(setting), args=config, **_data(setting))) as step:
        yield step


def chunked_divergence(_: Setting) -> Loss:
    """TRL's chunked divergence, on the supervised states alone."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(states: Tensor, head: nn.Linear, teacher_states: Tensor, teacher_head: nn.Linear) -> Tensor:
        mask = torch.ones(1, len(states))
        value: Tensor
        value, *_ = _chunked_divergence_loss(
            states[None], teacher_states[None], head.weight, teacher_head.weight, mask, beta=0.0
        )
        return value

    return loss


def _data(setting: Setting) -> dict[str, Any]:
    rows = [{key: value for key, value in row.items() if key != "id"} for row in rows_of(setting)]
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    dataset = Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in rows]).with_format(
        "torch"
    )
    return {"train_dataset": dataset, "data_collator": collate, "processing_class": tokenizer}
