"""Models and rows of both sides of a ratio: shapes of real models, random weights, fixed seeds."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from flexkd.core.tensors import IGNORE_INDEX

Batch = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, under the names of its config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


SMOLLM2_135M: Final = Shape(576, 1536, 30, 9, 3)
STUDENT: Final = Shape(288, 1024, 16, 6, 2)


@dataclass(frozen=True)
class Setting:
    """Models and rows of a measurement.

    Attributes:
        share: Share of supervised positions, which are the last of each row.
        rows: Number of rows of a batch.
        length: Tokens of a row.
        vocabulary: Vocabulary size of both models.
        teacher: Shape of the teacher.
        student: Shape of the student.
        num_batches: Batches of an epoch.
    """

    share: float
    rows: int = 8
    length: int = 256
    vocabulary: int = 49_152
    teacher: Shape = SMOLLM2_135M
    student: Shape = STUDENT
    num_batches: int = 2

    def tiny(self) -> "Setting":
        """A copy that runs within seconds, to see that everything works; never for figures."""
        shapes = {"teacher": Shape(48, 96, 2, 4, 2), "student": Shape(24, 48, 2, 2, 1)}
        return replace(self, rows=2, length=24, vocabulary=256, **shapes)

    def describe(self) -> str:
        """Rows, length and vocabulary in a few words."""
        return f"{self.rows} x {self.length} tokens, vocabulary {self.vocabulary:,}, f = {self.share:g}"


def teacher_of(setting: Setting) -> PreTrainedModel:
    """A teacher, frozen and in eval mode."""
    return model_of(setting.teacher, setting.vocabulary, seed=0).eval().requires_grad_(False)


def student_of(setting: Setting) -> PreTrainedModel:
    """A student, with the same weights at every call."""
    return model_of(setting.student, setting.vocabulary, seed=1)


def model_of(shape: Shape, vocabulary: int, *, seed: int) -> PreTrainedModel:
    """A Llama in float32 with tied embeddings and eager attention."""
    config = LlamaConfig(
        **asdict(shape),
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model


def taught_units(setting: Setting) -> Tensor:
    """As many units of the teacher as the student has, ascending."""
    units = torch.randperm(setting.teacher.hidden_size, generator=torch.Generator().manual_seed(2))
    return units[: setting.student.hidden_size].sort().values


def rows_of(setting: Setting) -> list[Batch]:
    """The rows of an epoch; labels cover the last positions, like an answer."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(setting.rows * setting.num_batches):
        ids = torch.randint(3, setting.vocabulary, (setting.length,), generator=generator)
        labels = ids.clone()
        labels[: setting.length - max(round(setting.share * setting.length), 1)] = IGNORE_INDEX
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        rows.append({**row, "id": str(index)})
    return rows


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Rows of one length to a batch; their ids become `example_id`."""
    batch: Batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "id"}
    return batch | ({"example_id": [row["id"] for row in rows]} if "id" in rows[0] else {})


def batches_of(setting: Setting, batch_size: int | None = None) -> list[Batch]:
    """The rows of an epoch in batches; None: of the size of the training."""
    rows, size = rows_of(setting), batch_size or setting.rows
    return [collate(rows[first : first + size]) for first in range(0, len(rows), size)]


def bfloat16() -> AbstractContextManager[Any]:
    """The autocast under which both sides run."""
    return torch.autocast("cpu", torch.bfloat16)
