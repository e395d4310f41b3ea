"""What makes a row of a batch the same row again: its id, and a hash of what a teacher reads of it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.errors import DataError
from flexkd.models.forward.hidden import TEACHER_PREFIX, is_causal, is_generative

CLASSIFIER: Final = "classifier"
DECODER: Final = "decoder"
ENCODER_DECODER: Final = "encoder-decoder"


def kind_of(model: PreTrainedModel) -> str:
    """Which of a row's labels a model reads: none, those beside its tokens, or a target of their own."""
    if not is_generative(model):
        return CLASSIFIER
    return DECODER if is_causal(model) else ENCODER_DECODER


@dataclass(frozen=True)
class RowHashes:
    """The rows of a batch, whatever its order and padding.

    Attributes:
        ids: Hash of each row's id.
        hashes: Hash of what the teacher reads of it: its own encoding, and where a language model finds its labels.
        predictions: How many each row makes.
    """

    ids: Int64[Tensor, " rows"]
    hashes: Int64[Tensor, " rows"]
    predictions: Int64[Tensor, " rows"]


def row_hashes_of(batch: Mapping[str, Any], kind: str) -> RowHashes:
    """What the rows of a batch are.

    Args:
        batch: As the collator made it.
        kind: Of the teacher, from `kind_of`.

    Raises:
        DataError: The rows have no ids.
    """
    if "example_id" not in batch:
        raise DataError("rows: have no 'id', by which a cache finds a teacher's answers. Give each row its own.")
    prefix = TEACHER_PREFIX if f"{TEACHER_PREFIX}input_ids" in batch else ""
    names = [f"{prefix}{name}" for name in ("input_ids", "token_type_ids") if f"{prefix}{name}" in batch]
    read = list(zip(*(_rows(batch, batch[name], prefix) for name in names), strict=True))
    # Labels of a decoder stand beside its tokens, those of an encoder-decoder apart, those of a row alone.
    labels = _rows(batch, batch["labels"], prefix) if kind == DECODER else batch["labels"].cpu()
    hashes, predictions = [], []
    for parts, own in zip(read, labels, strict=True):
        count = 1
        if kind != CLASSIFIER:
            # A decoder predicts no first token.
            own = own[1:] if kind == DECODER else own[own != IGNORE_INDEX]
            count = int((own != IGNORE_INDEX).sum())
            parts = (*parts, own)
        hashes.append(_number(b"|".join(part.long().numpy().tobytes() for part in parts)))
        predictions.append(count)
    ids = [_number(str(id_).encode()) for id_ in batch["example_id"]]
    return RowHashes(torch.tensor(ids), torch.tensor(hashes), torch.tensor(predictions))


def _rows(batch: Mapping[str, Any], values: Tensor, prefix: str) -> list[Tensor]:
    """What stands at the real tokens of each row; packed rows begin where their positions begin anew."""
    values = values.cpu()
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero()[1:, 0].cpu()
        return list(values[0].tensor_split(starts))
    mask = batch.get(f"{prefix}attention_mask")
    return list(values) if mask is None else [row[kept] for row, kept in zip(values, mask.cpu().bool(), strict=True)]


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
