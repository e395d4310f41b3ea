"""How far the teacher's output moves when one hidden unit moves: the score of every unit."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexkd.core.losses.chunked import chunked_sums
from flexkd.core.outputs import HeadOutputs
from flexkd.core.tensors import IGNORE_INDEX
from flexkd.errors import ScoreError, unknown_name
from flexkd.facts.names import ALL_LAYERS
from flexkd.facts.own_scores import OWN_SCORES
from flexkd.facts.user_code import SCORE_KEY, note_function

logger = logging.getLogger(__name__)

TARGETS: Final = ("log_prob", "logit", "predicted_logit")
"""What is differentiated: the label's log-probability, its centred logit, or that of the class the teacher predicts."""

GRADIENT_ATTRIBUTIONS: Final = ("gradient", "gradient_x_activation", "fisher")
CONTROLS: Final = ("activation", "variance", "random")
"""Scores that do not depend on the output; scores by gradient must beat them."""

ATTRIBUTIONS: Final = GRADIENT_ATTRIBUTIONS + CONTROLS

DEGENERATE_SHARE: Final = 1e-6
"""Scores below this share of the mean |d logit / d h| are rounding noise."""

FEW_PREDICTIONS: Final = 100

_CHUNK_ELEMENTS: Final = 2**18
"""Gradients whose attributions are computed in float64 at once."""


@dataclass(frozen=True)
class UnitScores:
    """One score for each unit of a teacher's hidden state.

    Attributes:
        values: Mean over predictions; float64 on the CPU.
        target: One of `TARGETS`.
        attribution: One of `ATTRIBUTIONS`.
        layer: -1 for the state that the head reads, 1..N for the output of a block, `all` for a mean over all blocks.
        num_predictions: Supervised labels behind the scores.
        effective_predictions: Kish's effective sample size; far below `num_predictions` where a few predictions
            dominate.
    """

    values: Float64[Tensor, " hidden"]
    target: str
    attribution: str
    layer: int | Literal["all"]
    num_predictions: int
    effective_predictions: float

    @property
    def num_unused(self) -> int:
        """Units whose score is exactly 0: the output does not depend on them."""
        return int((self.values == 0).sum())


def mean_over_layers(scores: Sequence[UnitScores]) -> UnitScores:
    """One score for each unit of the residual stream: its share of a layer's total, mean over the layers.

    A student that is cut along units loses the others at every layer, and gradients are of another size at each. The
    effective number of predictions is that of the layer where it is smallest.

    Args:
        scores: Of all blocks, measured on the same rows in the same way.
    """
    shares = torch.stack([entry.values / entry.values.sum() for entry in scores])
    effective = min(entry.effective_predictions for entry in scores)
    return replace(scores[0], values=shares.mean(0), layer=ALL_LAYERS, effective_predictions=effective)


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
    is_labelled = labels != IGNORE_INDEX
    return label_values(logits[is_labelled], labels[is_labelled], target=target).sum()


def label_values(
    logits: Float[Tensor, "predictions classes"], labels: Int[Tensor, " predictions"], *, target: str
) -> Float[Tensor, " predictions"]:
    """The summands of `label_target`, for integer labels that all count; in float32."""
    if target == "log_prob":
        values: Tensor = _LogProb.apply(logits, labels)  # type: ignore[no-untyped-call]
        return values
    logits = logits.float()
    classes = labels if target == "logit" else logits.detach().argmax(-1)
    return logits.gather(-1, classes[:, None])[:, 0] - logits.mean(-1)


class _LogProb(torch.autograd.Function):
    """The label's log-probability, with a gradient in the type of the logits.

    Half the work of log_softmax and gather, which matters where all positions have labels: a single softmax, computed
    in float32 and stored in the type of the logits, is turned into the gradient in place.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        # Autocast would store the softmax in float32.
        with torch.autocast(logits.device.type, enabled=False):
            largest, others = logits.amax(-1), logits.softmax(-1)
        log_largest = others.amax(-1).float().log()
        # Written by index: scatter_ copies all of a tensor in 16 bits twice.
        rows = torch.arange(len(labels), device=labels.device)
        others[rows, labels] = 0
        # 1 - p of the label, which has digits where p is nearly 1.
        complement = others.sum(-1)
        ctx.save_for_backward(others, complement, rows, labels)
        from_logits = logits[rows, labels].float() - largest.float() + log_largest
        return torch.where(complement < 0.5, torch.log1p(-complement.float()), from_logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None]:
        others, complement, rows, labels = ctx.saved_tensors
        grad_value = grad_value.to(others.dtype)
        # In place; autograd refuses a second backward.
        gradient = others.mul_(-grad_value[:, None])
        gradient[rows, labels] = complement * grad_value
        return gradient, None


def chunked_label_target(
    outputs: HeadOutputs, labels: Int[Tensor, " predictions"], *, target: str, chunk_size: int
) -> Float[Tensor, ""]:
    """`label_target` of a language model, with logits and gradients in memory for a few predictions at a time.

    Args:
        outputs: With a gradient for their states.
        labels: Of each prediction; all count.
        target: One of `TARGETS`.
        chunk_size: Predictions whose logits are in memory at the same time.
    """

    def terms(logits: Tensor, chunk: slice) -> Tensor:
        return label_values(logits, labels[chunk], target=target)[None]

    return chunked_sums(outputs, terms, torch.ones(1, device=labels.device), chunk_size=chunk_size)[0]


def _independent_target(logits: Tensor, labels: Tensor, target: str) -> Tensor:
    is_labelled = ~torch.isnan(labels).any(-1)
    logits, labels = logits[is_labelled], labels[is_labelled].float()
    if logits.shape[-1] == 1:
        return logits.sum()
    if target == "log_prob":
        return -F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    present = labels if target == "logit" else (logits.detach() > 0).float()
    return (logits * (2 * present - 1)).sum()


class ScoreAccumulator:
    """Sums the attributions of all positions in float64 on the CPU, batch by batch, and makes `UnitScores` of them.

    The sum over positions is divided by the number of predictions once, at the end: the result does not depend on
    batch size, order or padding.
    """

    def __init__(self, hidden_size: int, *, target: str, attribution: str, layer: int, seed: int = 0) -> None:
        check_attribution(attribution)
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
    ) -> None:
        """Add one batch.

        Args:
            gradients: d y / d h of every position.
            states: h itself.
            mask: Positions that count; the others are left out.
            predictions: Supervised labels that each row stands for.
        """
        counts = predictions.double().cpu()
        self.positions += int(mask.sum())
        self.predictions += int(counts.sum())
        # In float64 a few rows at a time: a whole batch would be copied several times over.
        size = max(_CHUNK_ELEMENTS // max(gradients[:1].numel(), 1), 1)
        parts = zip(*(tensor.split(size) for tensor in (gradients, states, mask)), strict=True)
        attributions = [self._attributions(*part) for part in parts]
        self.sums += torch.stack([sums for sums, _ in attributions]).sum(0).cpu()
        weights = torch.cat([weights for _, weights in attributions]).cpu()
        self.weight_sum += float(weights.sum())
        self.weight_squares += float((weights.square() / counts.clamp(min=1)).sum())

    def merge(self, other: "ScoreAccumulator", *, reference: bool) -> None:
        """Add what another accumulator has seen; batch by batch this is the same as `add`.

        Args:
            other: Of the same layer, target and attribution.
            reference: Add its reference too.
        """
        self.sums += other.sums
        self.positions += other.positions
        self.predictions += other.predictions
        self.weight_sum += other.weight_sum
        self.weight_squares += other.weight_squares
        if reference:
            self.reference_sum += other.reference_sum
            self.reference_predictions += other.reference_predictions

    def add_reference(
        self, logit_gradients: Float[Tensor, "rows positions hidden"], mask: Bool[Tensor, "rows positions"], count: int
    ) -> None:
        """Add to the reference that scores are compared with, to see whether they vanish.

        Args:
            logit_gradients: d (sum of the labels' plain logits) / d h.
            mask: As in `add`.
            count: Labels in that sum.
        """
        self.reference_sum += float(logit_gradients[mask].double().abs().sum())
        self.reference_predictions += count

    def _attributions(self, gradients: Tensor, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The contribution of a few rows to the two sums, and the weight of each row."""
        gradient = torch.where(mask[..., None], gradients, 0).double()
        state = gradient
        if self.attribution not in ("gradient", "fisher"):
            state = torch.where(mask[..., None], states, 0).double()
        weights = gradient.abs()
        match self.attribution:
            case "gradient":
                first = weights
            case "gradient_x_activation":
                first = (gradient * state).abs()
            case "fisher":
                first = gradient.square()
            case "activation":
                first = state.abs()
            case name if name in OWN_SCORES:
                first = torch.where(mask[..., None], OWN_SCORES[name](gradient, state), 0)
            case _:
                first = state
        sums = first.sum((0, 1))
        squares = state.square().sum((0, 1)) if self.attribution == "variance" else torch.zeros_like(sums)
        return torch.stack([sums, squares]), weights.sum((1, 2))

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
        reads_gradient = self.attribution not in CONTROLS
        if reads_gradient:
            self._check(values)
        effective = self.weight_sum**2 / self.weight_squares if self.weight_squares > 0 else 0.0
        if reads_gradient and self.target == "log_prob" and effective < FEW_PREDICTIONS:
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


def check_attribution(name: str) -> None:
    """Refuse an attribution that is none.

    Raises:
        ScoreError: Names those that there are.
    """
    if name not in ATTRIBUTIONS and name not in OWN_SCORES:
        raise ScoreError(unknown_name("scores.attribution", "attribution", name, [*ATTRIBUTIONS, *OWN_SCORES]))


def register_score(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Make a function an attribution of this process, which a recipe names as `scores.attribution`.

    It is called with d y / d h and h, `[rows, positions, units]` in float64, and returns what each unit counts at each
    position, not negative and of the same shape; the score is its sum over positions, divided by the predictions. It
    is tried once, on random numbers.

    Args:
        name: Not that of another attribution.
        function: Of one position at a time: batches are split and padded.

    Raises:
        ScoreError: The name is taken or no name, or the function gives something else.

    Example:
        >>> register_score("root", lambda gradients, states: gradients.abs().sqrt())
        >>> del OWN_SCORES["root"]
    """
    where = f"register_score: {name!r}"
    if name in ATTRIBUTIONS or name in OWN_SCORES or not name.isidentifier():
        reason = "is no name: letters, digits and '_'" if not name.isidentifier() else "is taken"
        raise ScoreError(f"{where} {reason}. Choose another name.")
    draw = torch.Generator().manual_seed(0)
    gradients, states = (torch.randn(3, 4, 5, dtype=torch.float64, generator=draw) for _ in range(2))
    advice = "Let it take gradients and states, [rows, positions, units], and return numbers of that shape, 0 or more."
    try:
        whole, first = function(gradients, states), function(gradients[:1, :2], states[:1, :2])
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise ScoreError(f"{where} raised {type(error).__name__} ({text}) on random numbers. {advice}") from error
    is_score = isinstance(whole, Tensor) and whole.shape == gradients.shape
    if not is_score or not bool(whole.isfinite().all()) or bool((whole < 0).any()):
        raise ScoreError(f"{where} returned {whole!r:.100}. {advice}")
    if not torch.allclose(first, whole[:1, :2]):
        raise ScoreError(f"{where} gives a position another number where others stand beside it. {advice}")
    OWN_SCORES[name] = function
    note_function(SCORE_KEY, name, function)


def _not_finite(values: Tensor) -> str:
    units = torch.nonzero(~torch.isfinite(values)).flatten().tolist()
    shown = ", ".join(map(str, units[:10])) + (", ..." if len(units) > 10 else "")
    return f"scores: not finite for unit {shown}. Score with a teacher whose outputs are finite (try float32)."
