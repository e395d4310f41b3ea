"""Means of the parts of the loss: between two entries of the log, and over an evaluation."""

import logging
from collections import defaultdict
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from flexkd.core.objective import ObjectiveValue, StepCounts
from flexkd.core.tensors import num_processes
from flexkd.facts.losses import MINIMUM_POSITIONS

logger = logging.getLogger(__name__)

Mean = Callable[[list[Tensor | float]], list[float]]
"""A function from figures of this process to their means over processes, read in one transfer."""


class Tally:
    """Sums of figures and of their sizes; nothing is read from a device before the end."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor | float] = {}
        self._sizes: dict[str, int] = defaultdict(int)

    def add(self, name: str, value: Tensor | float, size: int = 1) -> None:
        """Add a figure that stands for `size` rows, predictions or positions."""
        if isinstance(value, Tensor) and value.device.type != "mps":  # which has no float64
            # In float32 a long sum loses the digits that tell two checkpoints apart.
            value = value.to(torch.float64)
        self._totals[name] = self._totals.get(name, 0.0) + value
        self._sizes[name] += size

    def means(self, mean: Mean, *, divisors: Callable[[str, int], int]) -> dict[str, float]:
        """The mean over processes of each sum, divided by `divisors(name, size)`."""
        if not self._totals:
            return {}
        names = list(self._totals)
        figures = zip(names, mean([self._totals[name] for name in names]), strict=True)
        return {name: value / divisors(name, self._sizes[name]) for name, value in figures}


class TrainingTally:
    """Parts of the loss since the last entry of the log."""

    def __init__(self) -> None:
        self._tally = Tally()
        self.steps = 0
        self._steps_with_features = 0
        self._reads_features = False

    def begin_step(self, *, reads_features: bool) -> None:
        """Count one optimizer step."""
        self.steps += 1
        self._steps_with_features += reads_features
        self._reads_features = reads_features

    def add(self, value: ObjectiveValue, counts: StepCounts) -> None:
        """Add one micro-batch of the step."""
        for name, part in {**value.parts, **value.counts}.items():
            self._tally.add(name, part)
        if self._reads_features:
            self._tally.add("feature_positions", float(counts.micro_positions))

    def means(self, mean: Mean) -> dict[str, float]:
        """Parts add up over a step's micro-batches, as the loss does; counts are means over them.

        A feature term that has faded was not computed: its raw value is the mean over the steps that have it.
        """

        def divisor(name: str, size: int) -> int:
            if name == "skipped_feature_terms":
                return 1
            if name == "features_raw":
                return self._steps_with_features
            return self.steps if name.endswith(("_raw", "_weighted")) else size

        return self._tally.means(mean, divisors=divisor)


class EvaluationTally:
    """Parts of the loss over all batches of an evaluation, as one step over all rows would have them.

    A statistic, such as a correlation, is computed over the rows that all processes read together. Its mean over
    batches, weighted by positions, is not the statistic of all rows, and depends on the size of a batch.

    Attributes:
        num_rows: Rows read so far, of all processes.
        skipped_positions: Positions of batches that have too few for a statistic; they are in no mean.
    """

    def __init__(self) -> None:
        self._tally = Tally()
        self.num_rows = 0
        self.skipped_positions = 0

    def add(self, value: ObjectiveValue, counts: StepCounts) -> None:
        """Add one batch, counted as a step of its own."""
        parts = dict(value.parts)
        if "nll_sum" in parts:
            # Plain nats a token, whatever the objective weighs or smooths: what the best checkpoint is chosen by.
            # Each process sums its own rows, and the mean over processes is taken.
            self._tally.add("nll", parts.pop("nll_sum") * num_processes(), counts.predictions)
        positions = counts.positions
        if "skipped_feature_terms" in value.counts:
            self.skipped_positions += positions
            positions = 0
        for name, part in parts.items():
            size = positions if name.startswith("features") else counts.of(name)
            self._tally.add(name, part * size, size)

    def warn(self, description: str) -> None:
        """Warn if positions are in no mean."""
        if self.skipped_positions:
            _warn(description, self.skipped_positions)

    def means(self, mean: Mean) -> dict[str, float]:
        """Means over the predictions or positions that each term is computed at, and the loss that they make."""
        figures = self._tally.means(mean, divisors=lambda _, size: max(size, 1))
        if not figures:
            return {}
        return {"loss": sum(value for name, value in figures.items() if name.endswith("_weighted")), **figures}


@cache
def _warn(description: str, positions: int) -> None:
    """Cached, so that it warns once: a run evaluates the same rows again and again."""
    logger.warning(
        "%s: %d positions are in no mean of the features, for fewer than %d were read together. Set "
        "per_device_eval_batch_size higher.",
        description,
        positions,
        MINIMUM_POSITIONS,
    )
