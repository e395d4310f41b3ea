"""How far the teacher's output moves when one hidden unit moves: the score of every unit."""

import logging
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.errors import ScoreError, unknown_name

logger = logging.getLogger(__name__)

TARGETS: Final = ("log_prob", "logit", "predicted_logit")
"""What is differentiated: the label's log-probability, its centred logit, or that of the class the teacher predicts."""

GRADIENT_ATTRIBUTIONS: Final = ("gradient", "gradient_x_activation", "fisher")
CONTROLS: Final = ("activation", "variance", "random")
"""Scores that ask nothing of the output; the gradient must beat them."""

ATTRIBUTIONS: Final = GRADIENT_ATTRIBUTIONS + CONTROLS

DEGENERATE_SHARE: Final = 1e-6
"""Scores below this share of the mean |d logit / d h| are rounding noise."""

FEW_PREDICTIONS: Final = 100


@dataclass(frozen=True)
class UnitScores:
    """One score for each unit of a teacher's hidden state.

    Attributes:
        values: Mean over predictions; float64 on the CPU.
        target: One of `TARGETS`.
        attribution: One of `ATTRIBUTIONS`.
        layer: -1 for the state that the head reads, 1..N for the output of a block.
        num_predictions: Supervised labels behind the scores.
        effective_predictions: Kish's effective number of them; far below `num_predictions`, few decide.
    """

    values: Float64[Tensor, " hidden"]
    target: str
    attribution: str
    layer: int
    num_predictions: int
    effective_predictions: float

    @property
    def num_unused(self) -> int:
        """Units whose score is exactly 0: the output does not depend on them."""
        return int((self.values == 0).sum())


def label_target(
    logits: Float[Tensor, "predictions classes"],
    labels: Int[Tensor, " predictions"] | Float[Tensor, "predictions classes"],
    *,
    target: str = "log_prob",
) -> Float[Tensor, ""]:
    """The scalar whose gradient scores the units: summed over predictions, softmax in float32.

    Integer labels: one class each, `IGNORE_INDEX` adds nothing. Float labels of several columns: independent labels
    (0 or 1), each with a sigmoid of its own. One column: regression, the predicted value itself.

    A logit is taken minus the mean over the classes: moving all logits alike changes no probability, so that such a
    direction must score nothing.

    Raises:
        ScoreError: Unknown target.
    """
    if target not in TARGETS:
        raise ScoreError(unknown_name("scores.target", "target", target, TARGETS))
    logits = logits.float()
    if labels.is_floating_point():
        return _independent_target(logits, labels, target)
    kept = labels != IGNORE_INDEX
    logits, labels = logits[kept], labels[kept]
    if target == "predicted_logit":
        labels = logits.detach().argmax(-1)
    values = F.log_softmax(logits, -1) if target == "log_prob" else logits - logits.mean(-1, keepdim=True)
    return values.gather(-1, labels[:, None]).sum()


def _independent_target(logits: Tensor, labels: Tensor, target: str) -> Tensor:
    kept = ~torch.isnan(labels).any(-1)
    logits, labels = logits[kept], labels[kept].float()
    if logits.shape[-1] == 1:
        return logits.sum()
    if target == "log_prob":
        return -F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    present = labels if target == "logit" else (logits.detach() > 0).float()
    return (logits * (2 * present - 1)).sum()


class ScoreAccumulator:
    """Sums attributions of positions in float64 on the CPU, batch by batch, and turns them into `UnitScores`.

    The sum over positions is divided by the number of predictions once, at the end: the result does not depend on
    batch size, order or padding.
    """

    def __init__(self, hidden_size: int, *, target: str, attribution: str, layer: int, seed: int = 0) -> None:
        if attribution not in ATTRIBUTIONS:
            raise ScoreError(unknown_name("scores.attribution", "attribution", attribution, ATTRIBUTIONS))
        self.target, self.attribution, self.layer, self.seed = target, attribution, layer, seed
        self.sums = torch.zeros(2, hidden_size, dtype=torch.float64)
        self.positions = 0
        self.predictions = 0
        self.weight_sum = 0.0
        self.weight_squares = 0.0
        self.reference_sum = 0.0
        self.reference_predictions = 0

    def add(
        self,
        gradients: Float[Tensor, "rows positions hidden"],
        states: Float[Tensor, "rows positions hidden"],
        mask: Bool[Tensor, "rows positions"],
        predictions: Int[Tensor, " rows"],
        logit_gradients: Float[Tensor, "rows positions hidden"] | None = None,
    ) -> None:
        """Add one batch.

        Args:
            gradients: d y / d h of every position.
            states: h itself.
            mask: Positions that count; the others are selected away.
            predictions: Supervised labels that each row stands for.
            logit_gradients: Gradient of the plain logits over the same rows, the yard-stick for vanishing scores.
        """
        gradient = torch.where(mask[..., None], gradients, 0).double().cpu()
        state = torch.where(mask[..., None], states, 0).double().cpu()
        self.sums += self._attributions(gradient, state)
        self.positions += int(mask.sum())
        counts = predictions.double().cpu()
        self.predictions += int(counts.sum())
        weights = gradient.abs().sum((1, 2))
        self.weight_sum += float(weights.sum())
        self.weight_squares += float((weights.square() / counts.clamp(min=1)).sum())
        if logit_gradients is not None:
            self.reference_sum += float(torch.where(mask[..., None], logit_gradients, 0).double().abs().sum())
            self.reference_predictions += int(counts.sum())

    def _attributions(self, gradient: Tensor, state: Tensor) -> Tensor:
        match self.attribution:
            case "gradient":
                first = gradient.abs()
            case "gradient_x_activation":
                first = (gradient * state).abs()
            case "fisher":
                first = gradient.square()
            case "activation":
                first = state.abs()
            case _:
                first = state
        second = state.square() if self.attribution == "variance" else torch.zeros_like(first)
        return torch.stack([first.sum((0, 1)), second.sum((0, 1))])

    def scores(self) -> UnitScores:
        """Divide, check that the scores mean something, and freeze.

        Raises:
            ScoreError: No prediction was seen, or the scores vanish, are not finite, or are mostly equal.
        """
        if self.predictions == 0:
            raise ScoreError("scores: no supervised label in the batches. Give rows with labels.")
        values = self._values()
        if not bool(torch.isfinite(values).all()):
            raise ScoreError(_not_finite(values))
        if self.attribution in GRADIENT_ATTRIBUTIONS:
            self._check(values)
        effective = self.weight_sum**2 / self.weight_squares if self.weight_squares > 0 else 0.0
        if self.attribution in GRADIENT_ATTRIBUTIONS and self.target == "log_prob" and effective < FEW_PREDICTIONS:
            logger.warning(
                "scores: %.1f of %d predictions decide the log_prob scores (Kish). More rows or target 'logit' help.",
                effective,
                self.predictions,
            )
        return UnitScores(values, self.target, self.attribution, self.layer, self.predictions, effective)

    def _values(self) -> Tensor:
        match self.attribution:
            case "random":
                return torch.rand(
                    self.sums.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed)
                )
            case "variance":
                mean = self.sums[0] / self.positions
                return (self.sums[1] / self.positions - mean.square()).clamp(min=0)
            case _:
                return self.sums[0] / self.predictions

    def _check(self, values: Tensor) -> None:
        reference = self.reference_sum / max(self.reference_predictions, 1) / len(values)
        gradient_sum = self.weight_sum / self.predictions / len(values)
        largest = float(values.max()) if self.attribution == "gradient" else gradient_sum
        if float(values.max()) == 0 or largest < DEGENERATE_SHARE * reference:
            raise ScoreError(
                f"scores: the largest '{self.target}' score is {largest:.3g}, below {DEGENERATE_SHARE:g} of the mean "
                f"|d logit / d h| = {reference:.3g}: rounding noise. Use target 'logit' or 'predicted_logit'."
            )
        live = values[values > 0]
        _, counts = torch.unique(live, return_counts=True)
        if len(live) > 1 and 2 * int(counts.max()) > len(live):
            raise ScoreError(
                f"scores: {int(counts.max())} of {len(live)} non-zero '{self.target}' scores are equal, so that a "
                "choice between them is chance. Use another target or more rows."
            )


def _not_finite(values: Tensor) -> str:
    units = torch.nonzero(~torch.isfinite(values)).flatten().tolist()
    shown = ", ".join(map(str, units[:10])) + (", ..." if len(units) > 10 else "")
    return f"scores: not finite for unit {shown}. Score with a teacher whose outputs are finite (try float32)."
