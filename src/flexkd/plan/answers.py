"""Bytes of what a teacher says to all rows, kept on disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flexkd.core.objective import Objective
from flexkd.plan.rows import Rows
from flexkd.plan.skeletons import Skeletons
from flexkd.plan.teaching import outputs_of, width_at

TOP_K: Final = 64
"""Outputs of a prediction that a plan speaks of where the objective reads all of them."""

_SMALL_INDEX: Final = 2**16


@dataclass(frozen=True)
class Answers:
    """How much there is to keep of one teacher.

    Attributes:
        columns: Taught units at all feature positions: positions x units, summed over the pairs of layers.
        predictions: Labels of all rows.
        outputs: Of each prediction; 0 where the objective reads none.
        top_k: Outputs of each prediction that it reads; None: all.
    """

    columns: float
    predictions: float
    outputs: int
    top_k: int | None

    @classmethod
    def of(cls, objective: Objective, models: Skeletons, rows: Rows) -> "Answers":
        """Those to the training and validation rows of a recipe's objective."""
        load = rows.splits["train"].whole().plus(rows.splits["validation"].whole())
        term = objective.features
        columns = 0.0
        if term is not None:
            positions = load.predictions if term.positions == "supervised" else load.target or load.source
            columns = positions * sum(
                width_at(models.teacher, pair.teacher_layer) if pair.units is None else len(pair.units.teacher)
                for pair in term.layers
            )
        logits = objective.logits
        outputs = 0 if logits is None else outputs_of(models.teacher)
        return cls(columns, load.predictions, outputs, None if logits is None else logits.top_k)

    def stored(self, storage: str) -> int:
        """In a cache of the recipe's own rule and storage of states (float16 or int8)."""
        forms = self.on_disk()
        own = [size for name, size in forms.items() if self.top_k is not None or "top" not in name]
        return (min if storage == "int8" else max)(own, default=0)

    def on_disk(self) -> Mapping[str, int]:
        """In a cache, by form: states in 16 or 8 bits, all outputs in 16 bits or the likeliest with their indices."""
        if not self.predictions:
            return {}
        states = {"float16 states": 2 * self.columns, "int8 states": self.columns} if self.columns else {"": 0.0}
        k = min(self.top_k or TOP_K, self.outputs)
        index = 2 if self.outputs <= _SMALL_INDEX else 4
        parts = {f"top {k} outputs": self.predictions * (k * (2 + index) + 4)} if 0 < k < self.outputs else {}
        if self.top_k is None and self.outputs:
            parts["all outputs"] = self.predictions * 2 * self.outputs
        parts = parts or {"": 0.0}
        return {
            ", ".join(filter(None, names)): round(state + part)
            for one, state in states.items()
            for two, part in parts.items()
            if any(names := (one, two))
        }
