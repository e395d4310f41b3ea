"""Features to batches: padded by length, with everything else that a row carries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.data.encoding.tokens import TEACHER_PREFIX


@dataclass(frozen=True)
class Collator:
    """Joins the features of `encode` into one batch.

    Padding is known by the length of a row, never by the id of a token: a pad token that is also the end of text
    (or any other token of the text) stays visible. The attention mask is always there.

    Labels that are tokens are padded with -100: beside `input_ids` for a decoder, to the longest of them for an
    encoder-decoder.

    `id` becomes `example_id`, a list of strings. Every other key survives, for a teacher's stored outputs as an
    example: as a tensor where all rows hold numbers of one shape, else as a list. The trainer gives each model only
    what its forward takes.

    Attributes:
        pad_token_id: The student's.
        teacher_pad_token_id: For `teacher_input_ids`; None: the student's.
        padding_side: A model with absolute positions needs "right", a decoder that is to write on needs "left".
        multiple: Lengths are rounded up to a multiple of it.
        seq2seq: Labels are a text of their own, the target of an encoder-decoder, padded on the right.
        packed: A decoder's rows follow each other in one sequence, without padding and without an attention mask:
            `position_ids` begin anew with each row, and no token predicts the first of the next row.
    """

    pad_token_id: int
    teacher_pad_token_id: int | None = None
    padding_side: Literal["right", "left"] = "right"
    multiple: int = 1
    seq2seq: bool = False
    packed: bool = False

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Batch of tensors and lists, with one entry a row."""
        keys = list(features[0])
        uneven = next((key for row in features for key in row.keys() ^ features[0].keys()), None)
        assert uneven is None, f"some rows of the batch hold '{uneven}', others do not"
        batch: dict[str, Any] = {}
        if self.packed:
            batch |= self._packed(features)
            keys = [key for key in keys if key != "attention_mask"]
        for prefix, pad in (("", self.pad_token_id), (TEACHER_PREFIX, self.teacher_pad_token_id)):
            if f"{prefix}input_ids" in keys and not self.packed:
                batch |= self._padded(features, prefix, self.pad_token_id if pad is None else pad)
        if "labels" in keys and not self.packed and all(_is_tokens(row["labels"]) for row in features):
            batch["labels"] = self._token_labels(features)
        for key in keys:
            if key == "id":
                batch["example_id"] = [str(row["id"]) for row in features]
            elif key not in batch:
                batch[key] = _stacked([row[key] for row in features])
        return batch

    def _packed(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        assert not self.seq2seq, "only a decoder's rows can follow each other"
        assert f"{TEACHER_PREFIX}input_ids" not in features[0], "packed rows have one encoding"
        labels = [token for row in features for token in (IGNORE_INDEX, *row["labels"][1:])]
        return {
            "input_ids": torch.tensor([[token for row in features for token in row["input_ids"]]]),
            "position_ids": torch.tensor([[index for row in features for index in range(len(row["input_ids"]))]]),
            "labels": torch.tensor([labels]),
        }

    def _padded(self, features: Sequence[Mapping[str, Any]], prefix: str, pad: int) -> dict[str, Tensor]:
        ids = [row[f"{prefix}input_ids"] for row in features]
        width = self._width(ids)
        masks = [row.get(f"{prefix}attention_mask", [1] * len(own)) for row, own in zip(features, ids, strict=True)]
        padded = {f"{prefix}input_ids": self._rows(ids, width, pad)}
        padded[f"{prefix}attention_mask"] = self._rows(masks, width, 0)
        types = f"{prefix}token_type_ids"
        if types in features[0]:
            padded[types] = self._rows([row[types] for row in features], width, 0)
        return padded

    def _token_labels(self, features: Sequence[Mapping[str, Any]]) -> Int[Tensor, "batch target"]:
        labels = [row["labels"] for row in features]
        if self.seq2seq:
            width = self._width(labels)
            return torch.stack([F.pad(torch.tensor(row), (0, width - len(row)), value=IGNORE_INDEX) for row in labels])
        uneven = [row["id"] for row in features if len(row["labels"]) != len(row["input_ids"])]
        assert not uneven, f"{uneven[0]}: a decoder's labels stand beside its tokens, one for each"
        return self._rows(labels, self._width(labels), IGNORE_INDEX)

    def _width(self, rows: Sequence[Sequence[int]]) -> int:
        return -(-max(map(len, rows)) // self.multiple) * self.multiple

    def _rows(self, rows: Sequence[Sequence[int]], width: int, fill: int) -> Int[Tensor, "batch width"]:
        padded = torch.full((len(rows), width), fill, dtype=torch.long)
        for index, row in enumerate(rows):
            place = slice(0, len(row)) if self.padding_side == "right" else slice(width - len(row), width)
            padded[index, place] = torch.as_tensor(row, dtype=torch.long)
        return padded


def _is_tokens(labels: Any) -> bool:
    """Whether labels are token ids; the flags of several classes are floats."""
    return isinstance(labels, Sequence) and all(isinstance(one, int) for one in labels)


def _stacked(values: Sequence[Any]) -> Tensor | list[Any]:
    """One tensor where the values are numbers, tensors or nested lists of one shape, else the list itself."""
    try:
        rows = [torch.as_tensor(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        return list(values)
    if len({row.shape for row in rows}) > 1:
        return list(values)
    return torch.stack(rows)
