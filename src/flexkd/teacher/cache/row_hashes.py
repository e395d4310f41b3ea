"""How a cache recognizes a row: by a hash of its id, and a hash of everything that the teacher reads of it."""

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
from flexkd.facts.names import TEACHER_PREFIX
from flexkd.models.forward.hidden import is_causal, is_generative
from flexkd.teacher.live import packed_rows

CLASSIFIER: Final = "classifier"
DECODER: Final = "decoder"
ENCODER_DECODER: Final = "encoder-decoder"


def kind_of(model: PreTrainedModel) -> str:
    """Kind of a teacher by the labels that it reads: none, one for each token, or a target sequence."""
    if not is_generative(model):
        return CLASSIFIER
    return DECODER if is_causal(model) else ENCODER_DECODER


@dataclass(frozen=True)
class RowHashes:
    """Hashes of the rows of a batch; they do not depend on the order and the padding of the batch.

    Attributes:
        ids: Hash of the id of each row.
        hashes: Hash of what the teacher reads: its own encoding of the row, and the labels of a language model.
        predictions: Number of predictions of each row.
    """

    ids: Int64[Tensor, " rows"]
    hashes: Int64[Tensor, " rows"]
    predictions: Int64[Tensor, " rows"]


def row_hashes_of(batch: Mapping[str, Any], kind: str) -> RowHashes:
    """Hash the rows of a batch.

    Args:
        batch: From the collator.
        kind: Kind of the teacher, from `kind_of`.

    Raises:
        DataError: The rows have no ids.
    """
    if "example_id" not in batch:
        raise DataError("rows: have no 'id', by which a cache finds a teacher's answers. Give each row its own.")
    prefix = TEACHER_PREFIX if f"{TEACHER_PREFIX}input_ids" in batch else ""
    names = [f"{prefix}{name}" for name in ("input_ids", "token_type_ids") if f"{prefix}{name}" in batch]
    encodings = list(zip(*(_by_row(batch, batch[name], prefix) for name in names), strict=True))
    # A decoder has a label for each token, an encoder-decoder a padded target, a classifier one label for each row.
    labels = _by_row(batch, batch["labels"], prefix) if kind == DECODER else batch["labels"].cpu()
    hashes, predictions = [], []
    for parts, row_labels in zip(encodings, labels, strict=True):
        count = 1
        if kind != CLASSIFIER:
            # A decoder does not predict the first token.
            targets = row_labels[1:] if kind == DECODER else row_labels[row_labels != IGNORE_INDEX]
            count = int((targets != IGNORE_INDEX).sum())
            parts = (*parts, targets)
        hashes.append(_hash(b"|".join(part.long().numpy().tobytes() for part in parts)))
        predictions.append(count)
    ids = [_hash(str(id_).encode()) for id_ in batch["example_id"]]
    return RowHashes(torch.tensor(ids), torch.tensor(hashes), torch.tensor(predictions))


def _by_row(batch: Mapping[str, Any], values: Tensor, prefix: str) -> list[Tensor]:
    """Values at the real tokens of each row."""
    values = values.cpu()
    if "position_ids" in batch:
        return packed_rows(values, batch)
    mask = batch.get(f"{prefix}attention_mask")
    if mask is None:
        return list(values)
    return [row[tokens] for row, tokens in zip(values, mask.cpu().bool(), strict=True)]


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
