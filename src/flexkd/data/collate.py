"""Features to batches: padded by length, with everything else that a row carries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from flexkd.data.encoding import TEACHER_PREFIX


@dataclass(frozen=True)
class Collator:
    """Joins the features of `encode` into one batch.

    Padding is known by the length of a row, never by the id of a token: a pad token that is also the end of text
    (or any other token of the text) stays visible. The attention mask is always there.

    `id` becomes `example_id`, a list of strings. Every other key survives, for a teacher's stored outputs as an
    example: as a tensor where all rows hold numbers of one shape, else as a list. The trainer gives each model only
    what its forward takes.

    Attributes:
        pad_token_id: The student's.
        teacher_pad_token_id: For `teacher_input_ids`; None: the student's.
        padding_side: A model with absolute positions needs "right".
        multiple: Lengths are rounded up to a multiple of it.
    """

    pad_token_id: int
    teacher_pad_token_id: int | None = None
    padding_side: Literal["right", "left"] = "right"
    multiple: int = 1

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Batch of tensors and lists, with one entry a row."""
        keys = list(features[0])
        uneven = next((key for row in features for key in row.keys() ^ features[0].keys()), None)
        assert uneven is None, f"some rows of the batch hold '{uneven}', others do not"
        batch: dict[str, Any] = {}
        for prefix, pad in (("", self.pad_token_id), (TEACHER_PREFIX, self.teacher_pad_token_id)):
            if f"{prefix}input_ids" in keys:
                batch |= self._padded(features, prefix, self.pad_token_id if pad is None else pad)
        for key in keys:
            if key == "id":
                batch["example_id"] = [str(row["id"]) for row in features]
            elif key not in batch:
                batch[key] = _stacked([row[key] for row in features])
        return batch

    def _padded(self, features: Sequence[Mapping[str, Any]], prefix: str, pad: int) -> dict[str, Tensor]:
        lengths = [len(row[f"{prefix}input_ids"]) for row in features]
        width = -(-max(lengths) // self.multiple) * self.multiple
        masks = [
            row.get(f"{prefix}attention_mask", [1] * length) for row, length in zip(features, lengths, strict=True)
        ]
        padded = {f"{prefix}input_ids": self._rows([row[f"{prefix}input_ids"] for row in features], width, pad)}
        padded[f"{prefix}attention_mask"] = self._rows(masks, width, 0)
        types = f"{prefix}token_type_ids"
        if types in features[0]:
            padded[types] = self._rows([row[types] for row in features], width, 0)
        return padded

    def _rows(self, rows: Sequence[Sequence[int]], width: int, fill: int) -> Int[Tensor, "batch width"]:
        padded = torch.full((len(rows), width), fill, dtype=torch.long)
        for index, row in enumerate(rows):
            place = slice(0, len(row)) if self.padding_side == "right" else slice(width - len(row), width)
            padded[index, place] = torch.as_tensor(row, dtype=torch.long)
        return padded


def _stacked(values: Sequence[Any]) -> Tensor | list[Any]:
    """One tensor where the values are numbers, tensors or nested lists of one shape, else the list itself."""
    try:
        rows = [torch.as_tensor(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        return list(values)
    if len({row.shape for row in rows}) > 1:
        return list(values)
    return torch.stack(rows)
