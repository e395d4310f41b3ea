"""Encoded rows to batches: token lists padded to one length, other values stacked or kept as lists."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.facts.names import TEACHER_PREFIX


@dataclass(frozen=True)
class Collator:
    """Joins encoded rows into one batch.

    The attention mask comes from the lengths of the rows, never from token ids: a pad token that is also the end of
    text, or any other token of a text, stays visible where a text holds it. Every batch has an attention mask, unless
    it is packed.

    Labels that are tokens are padded with -100: to the length of `input_ids` for a decoder, to the longest labels for
    an encoder-decoder.

    `id` becomes `example_id`, a list of strings. Every other key, such as a teacher's stored outputs, becomes a tensor
    where all rows hold numbers of one shape, else a list. The trainer gives each model only what its forward takes.

    Attributes:
        pad_token_id: Pads `input_ids`.
        teacher_pad_token_id: Pads `teacher_input_ids`; None: `pad_token_id` does.
        padding_side: "right" for models with absolute positions, "left" for a decoder that continues the rows.
        multiple: Lengths are rounded up to a multiple of this.
        seq2seq: Labels are the target text of an encoder-decoder and are padded on the right.
        packed: The rows of a decoder follow each other in one sequence, without padding and without an attention mask:
            `position_ids` restart at 0 in each row, and no token predicts the first token of the next row.
    """

    pad_token_id: int
    teacher_pad_token_id: int | None = None
    padding_side: Literal["right", "left"] = "right"
    multiple: int = 1
    seq2seq: bool = False
    packed: bool = False

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, Any]:
        """The rows as one batch of tensors and lists, one entry a row."""
        keys = list(rows[0])
        uneven = next((key for row in rows for key in row.keys() ^ rows[0].keys()), None)
        assert uneven is None, f"some rows of the batch hold '{uneven}', others do not"
        batch: dict[str, Any] = {}
        if self.packed:
            batch |= self._packed(rows)
            keys = [key for key in keys if key != "attention_mask"]
        for prefix, pad in (("", self.pad_token_id), (TEACHER_PREFIX, self.teacher_pad_token_id)):
            if f"{prefix}input_ids" in keys and not self.packed:
                batch |= self._padded(rows, prefix, self.pad_token_id if pad is None else pad)
        if "labels" in keys and not self.packed and all(_is_tokens(row["labels"]) for row in rows):
            batch["labels"] = self._token_labels(rows)
        for key in keys:
            if key == "id":
                batch["example_id"] = [str(row["id"]) for row in rows]
            elif key not in batch:
                batch[key] = _stacked([row[key] for row in rows])
        return batch

    def _packed(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        assert not self.seq2seq, "only a decoder's rows can follow each other"
        assert f"{TEACHER_PREFIX}input_ids" not in rows[0], "packed rows have one encoding"
        labels = [token for row in rows for token in (IGNORE_INDEX, *row["labels"][1:])]
        return {
            "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
            "position_ids": torch.tensor([[index for row in rows for index in range(len(row["input_ids"]))]]),
            "labels": torch.tensor([labels]),
        }

    def _padded(self, rows: Sequence[EncodedRow], prefix: str, pad: int) -> dict[str, Tensor]:
        ids = [row[f"{prefix}input_ids"] for row in rows]
        width = self._width(ids)
        masks = [row.get(f"{prefix}attention_mask", [1] * len(tokens)) for row, tokens in zip(rows, ids, strict=True)]
        padded = {f"{prefix}input_ids": self._pad(ids, width, pad)}
        padded[f"{prefix}attention_mask"] = self._pad(masks, width, 0)
        types = f"{prefix}token_type_ids"
        if types in rows[0]:
            padded[types] = self._pad([row[types] for row in rows], width, 0)
        return padded

    def _token_labels(self, rows: Sequence[EncodedRow]) -> Int[Tensor, "batch target"]:
        labels = [row["labels"] for row in rows]
        if self.seq2seq:
            width = self._width(labels)
            padded = [F.pad(torch.tensor(row), (0, width - len(row)), value=IGNORE_INDEX) for row in labels]
            return torch.stack(padded)
        uneven = [row["id"] for row in rows if len(row["labels"]) != len(row["input_ids"])]
        assert not uneven, f"{uneven[0]}: a decoder's labels stand beside its tokens, one for each"
        return self._pad(labels, self._width(labels), IGNORE_INDEX)

    def _width(self, sequences: Sequence[Sequence[int]]) -> int:
        """Length of the longest sequence, rounded up to the multiple."""
        return -(-max(map(len, sequences)) // self.multiple) * self.multiple

    def _pad(self, sequences: Sequence[Sequence[int]], width: int, fill: int) -> Int[Tensor, "batch width"]:
        padded = torch.full((len(sequences), width), fill, dtype=torch.long)
        for index, sequence in enumerate(sequences):
            length = len(sequence)
            columns = slice(0, length) if self.padding_side == "right" else slice(width - length, width)
            padded[index, columns] = torch.as_tensor(sequence, dtype=torch.long)
        return padded


def _is_tokens(labels: Any) -> bool:
    """Whether labels are token ids; the flags of several classes are floats."""
    return isinstance(labels, Sequence) and all(isinstance(label, int) for label in labels)


def _stacked(values: Sequence[Any]) -> Tensor | list[Any]:
    """One tensor where the values are numbers, tensors or nested lists of one shape, else the list itself."""
    try:
        tensors = [torch.as_tensor(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        return list(values)
    if len({tensor.shape for tensor in tensors}) > 1:
        return list(values)
    return torch.stack(tensors)
