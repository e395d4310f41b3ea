"""Size of a cache on disk that holds a teacher's answers to all rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flexkd.core.objective import Objective
from flexkd.core.tensors import Number
from flexkd.costs.rows import RowLengths
from flexkd.costs.skeletons import Skeletons, outputs_of, width_at
from flexkd.teacher.cache.quantization import FLOAT16, INT8, SHORT_INDICES
from flexkd.teacher.cache.shards import INDEX_BYTES
from flexkd.teacher.cache.writer import TEACHER_BATCH_SIZE

TOP_K: Final = 64
"""The smaller cache that a plan also shows where the objective reads all outputs."""


@dataclass(frozen=True)
class Answers:
    """How many numbers a cache of the teacher's answers stores.

    Attributes:
        num_rows: Rows that the teacher reads.
        positions: Positions whose states are taught, summed over all rows.
        columns: Taught units at each position, summed over all pairs of layers.
        predictions: Predictions, summed over all rows.
        outputs: Outputs of each prediction; 0 where the objective reads none.
        top_k: Outputs of each prediction that the objective reads; None: all.
        writes_text: Whether they are a language model's, in float16; the few outputs of a classifier stay float32.
    """

    num_rows: Number
    positions: Number
    columns: int
    predictions: Number
    outputs: int
    top_k: int | None
    writes_text: bool

    @classmethod
    def of(cls, objective: Objective, models: Skeletons, lengths: RowLengths) -> "Answers":
        """The answers to the training and validation rows that an objective reads."""
        load = lengths.splits["train"].whole().plus(lengths.splits["validation"].whole())
        term, logits = objective.features, objective.logits
        pairs = term.layers if term is not None else ()
        supervised = term is not None and term.positions == "supervised"
        writes_text = models.teacher.get_output_embeddings() is not None
        return cls(
            num_rows=load.num_rows,
            positions=load.predictions if supervised else load.target or load.source,
            columns=sum(
                width_at(models.teacher, pair.teacher_layer) if pair.units is None else len(pair.units.teacher)
                for pair in pairs
            ),
            predictions=load.predictions,
            outputs=0 if logits is None else outputs_of(models.teacher),
            top_k=None if logits is None else logits.top_k,
            writes_text=writes_text,
        )

    def bytes(self, storage: str, top_k: int | None = None) -> int:
        """Size of a cache on disk.

        Args:
            storage: Number type of the columns: float16, or int8 with a scale and an offset of each column and batch.
            top_k: Outputs of each prediction; None: those that the objective reads.
        """
        states = self.positions * self.columns * (2 if storage == FLOAT16 else 1)
        if storage == INT8:
            states += -(-self.num_rows // TEACHER_BATCH_SIZE) * self.columns * 8
        top_k = self.top_k if top_k is None else top_k
        prediction = (2 if self.writes_text else 4) * self.outputs
        if top_k is not None and self.outputs:
            index = 2 if self.outputs <= SHORT_INDICES else 4
            prediction = min(top_k, self.outputs) * (2 + index) + 4
        return round(states + prediction * self.predictions + INDEX_BYTES * self.num_rows)

    def forms(self) -> Mapping[str, int]:
        """Size in bytes of each way to store them, by name; empty where the rows are not counted or nothing is read."""
        if not self.num_rows or not (self.columns or self.outputs):
            return {}
        tops = [self.top_k]
        if self.writes_text and self.outputs > TOP_K and self.top_k is None:
            tops.append(TOP_K)
        return {
            f"{storage}, {'all outputs' if top is None else f'top {top} outputs'}": self.bytes(storage, top)
            for storage in ((FLOAT16, INT8) if self.columns else (FLOAT16,))
            for top in tops
        }
