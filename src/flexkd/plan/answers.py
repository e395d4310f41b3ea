"""Bytes of a teacher's answers to all rows, as a cache on disk would hold them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flexkd.core.objective import Objective
from flexkd.core.tensors import Number
from flexkd.plan.rows import Rows
from flexkd.plan.skeletons import Skeletons, outputs_of, width_at
from flexkd.teacher.cache.quantization import FLOAT16, INT8, SHORT_INDICES
from flexkd.teacher.cache.shards import INDEX_BYTES
from flexkd.teacher.cache.writer import TEACHER_BATCH_SIZE

TOP_K: Final = 64
"""Outputs of a prediction that a plan speaks of where the objective reads all of them."""


@dataclass(frozen=True)
class Answers:
    """How many numbers of one teacher there are to store.

    Attributes:
        rows: Rows that the teacher reads.
        positions: Of all rows, whose states are taught.
        columns: Taught units of a position, of all pairs of layers together.
        predictions: Of all rows.
        outputs: Of each prediction; 0 where the objective reads none.
        top_k: Outputs of each prediction that it reads; None: all.
        writes_text: Few outputs, those of a classifier, stay float32.
    """

    rows: Number
    positions: Number
    columns: int
    predictions: Number
    outputs: int
    top_k: int | None
    writes_text: bool

    @classmethod
    def of(cls, objective: Objective, models: Skeletons, rows: Rows) -> "Answers":
        """Those to the training and validation rows that an objective reads."""
        load = rows.splits["train"].whole().plus(rows.splits["validation"].whole())
        term, logits = objective.features, objective.logits
        pairs = term.layers if term is not None else ()
        supervised = term is not None and term.positions == "supervised"
        writes_text = models.teacher.get_output_embeddings() is not None
        return cls(
            rows=load.rows,
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
        """Of a cache.

        Args:
            storage: Of the columns: float16, or int8 with the range of each column for each batch.
            top_k: Outputs of each prediction; None: those that the objective reads.
        """
        states = self.positions * self.columns * (2 if storage == FLOAT16 else 1)
        if storage == INT8:
            states += -(-self.rows // TEACHER_BATCH_SIZE) * self.columns * 8
        top_k = self.top_k if top_k is None else top_k
        prediction = (2 if self.writes_text else 4) * self.outputs
        if top_k is not None and self.outputs:
            index = 2 if self.outputs <= SHORT_INDICES else 4
            prediction = min(top_k, self.outputs) * (2 + index) + 4
        return round(states + prediction * self.predictions + INDEX_BYTES * self.rows)

    def forms(self) -> Mapping[str, int]:
        """Bytes of each way to store them, by name; none where the rows are not counted, or nothing is read."""
        if not self.rows or not (self.columns or self.outputs):
            return {}
        tops = [self.top_k]
        if self.writes_text and self.outputs > TOP_K and self.top_k is None:
            tops.append(TOP_K)
        return {
            f"{storage}, {'all outputs' if top is None else f'top {top} outputs'}": self.bytes(storage, top)
            for storage in ((FLOAT16, INT8) if self.columns else (FLOAT16,))
            for top in tops
        }
