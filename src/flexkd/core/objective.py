"""The objective of one optimizer step: task loss + logit distillation + feature distillation, each weighted once."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from flexkd.core.checks import check_states
from flexkd.core.losses.feature import FEATURE_LOSSES, UNIT_STATISTICS
from flexkd.core.losses.lens import lens_divergence
from flexkd.core.losses.logit import LOGIT_LOSSES_BY_TASK
from flexkd.core.losses.moments import paired_moments
from flexkd.core.outputs import HeadOutputs, Outputs
from flexkd.core.predictions import PredictionTerms
from flexkd.core.predictions import PredictionValue as PredictionValue
from flexkd.core.predictions import StepCounts as StepCounts
from flexkd.core.tensors import graph_zero
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.errors import RecipeError, ShapeError, unknown_name
from flexkd.facts.losses import FEATURE_LOSS_FACTS, TASK_LOSS_FACTS


@dataclass(frozen=True)
class Signal:
    """Outputs and hidden states of one model for one micro-batch, computed or from a cache.

    Attributes:
        logits: One row for each prediction: a row of the batch in classification, an answer token in generation. None
            where no term reads them, or where their terms were already computed.
        features: For each pair of layers, the chosen positions of the batch in order, the chosen units as columns.
    """

    logits: Outputs | None = None
    features: tuple[Float[Tensor, "positions _"], ...] = ()


@dataclass(frozen=True)
class ObjectiveValue:
    """Loss of one micro-batch to call backward on, and its parts.

    Attributes:
        loss: This process's share; its mean over processes, summed over micro-batches, is the objective.
        parts: `task_raw`, `task_weighted`, ...: they add up like the loss, and the weighted ones to the loss.
        counts: `dead_student_units`, `dead_teacher_units`, `skipped_feature_terms`.
        distilled: As in `PredictionValue`.
    """

    loss: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]
    counts: dict[str, Tensor] = field(default_factory=dict)
    distilled: Int64[Tensor, " chosen"] | None = None


class Objective:
    """`(w_task sum ce + w_logits tau^2 sum kd) / T + w_features sum_m (n_m / n) F_m` for one optimizer step.

    With `entropy_share` the sum of kd is over the chosen predictions, and their number takes the place of T there.
    Additive terms do not change with the split into micro-batches and processes. A correlation is a statistic of one
    micro-batch over all processes, by definition. Rows without a label learn from the teacher alone.

    Args:
        task: Loss against labels.
        logits: Divergence from the teacher's outputs.
        features: Loss between hidden states.

    Raises:
        RecipeError: No term has a weight above 0, or a loss does not fit the task.

    Source:
        Saadi and Wang, Flex-KD, 2025, arXiv:2507.10155, overall objective.
    """

    def __init__(
        self,
        task: TaskTerm | None = None,
        logits: LogitTerm | None = None,
        features: FeatureTerm | None = None,
    ) -> None:
        for name, term, kind in (
            ("task", task, TaskTerm),
            ("logits", logits, LogitTerm),
            ("features", features, FeatureTerm),
        ):
            if term is not None and not isinstance(term, kind):
                raise RecipeError(
                    f"objective.{name}: must be a {kind.__name__}, was a {type(term).__name__}. Give each term by its "
                    "name: Objective(task=..., logits=..., features=...)."
                )
        # A term with weight 0 is not computed: it would cost a forward and bring 0 * inf.
        self.task = task if task is not None and task.weight > 0 else None
        self.logits = logits if logits is not None and logits.weight > 0 else None
        self.features = features if features is not None and features.weight > 0 else None
        if self.task is None and self.logits is None and self.features is None:
            raise RecipeError(
                "objective: no term has a weight above 0, so that nothing would be learnt. Give a weight."
            )
        if self.task is None and self.logits is None and self.features is not None and self.features.fade is not None:
            raise RecipeError(
                f"objective.features.fade: {self.features.fade} leaves no term for the steps after it. Give another "
                "term a weight above 0, or leave it out."
            )
        # The task term says what the outputs are, even where its weight is 0.
        self.task_loss = task.loss if task is not None else "cross_entropy"
        self._registry = LOGIT_LOSSES_BY_TASK[self.task_loss]
        if self.logits is not None and self.logits.loss not in self._registry:
            raise RecipeError(unknown_name("objective.logits.loss", "loss", self.logits.loss, self._registry))
        share = None if self.logits is None else self.logits.entropy_share
        if share is not None and not TASK_LOSS_FACTS[self.task_loss].is_distribution:
            raise RecipeError(
                f"objective.logits.entropy_share: {share}, but outputs that are learnt by '{self.task_loss}' are no "
                "distribution and have no entropy. Leave it out."
            )
        self.modules = nn.ModuleList(self.features.projectors if self.features is not None else ())

    @property
    def needs_teacher(self) -> bool:
        """Whether any term reads a teacher."""
        return self.logits is not None or self.features is not None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Training-only parameters, those of projectors; they never enter the student."""
        return self.modules.parameters()

    def at(self, step: int, num_steps: int) -> "Objective":
        """The objective of one step, whose feature term has the weight of this step, or is gone where it has faded.

        Args:
            step: Steps that were taken before it.
            num_steps: Steps of the whole run; 0: not known, and the weight is that of the first step.
        """
        features = self.features
        if features is None or features.fade is None:
            return self
        now = replace(features, weight=features.weight_at(step, num_steps), fade=None)
        return Objective(self.task or TaskTerm(self.task_loss, weight=0.0), self.logits, now)

    def formula(self) -> str:
        """The effective objective in one line, for the log and the report."""
        terms = []
        if self.task is not None:
            smoothing = f"(label_smoothing={self.task.label_smoothing:g})" if self.task.label_smoothing else ""
            terms.append(f"{self.task.weight:g} * {self.task.loss}{smoothing}")
        if self.logits is not None:
            factor = f"{self.logits.weight:g}" + (f" * {self.logits.scale:g}" if self.logits.scale != 1 else "")
            counts = {name: getattr(self.logits, name) for name in ("shared_outputs", "top_k", "entropy_share")}
            limits = {name: count for name, count in counts.items() if count is not None}
            options = {"temperature": self.logits.temperature, **self.logits.options, **limits}
            terms.append(f"{factor} * {self.logits.loss}({', '.join(f'{n}={v:g}' for n, v in options.items())})")
        if self.features is not None:
            pairs = ", ".join(pair.describe() for pair in self.features.layers)
            fade = "" if self.features.fade is None else f" (to 0 over {self.features.fade:g} of the steps)"
            rate = self.features.projector_learning_rate
            learns = "" if rate is None else f", learning_rate={rate:g}"
            compared = f"{pairs}, {self.features.positions}{learns}"
            terms.append(f"{self.features.weight:g}{fade} * {self.features.loss}({compared})")
        return "loss = " + " + ".join(terms)

    def __call__(
        self,
        student: Signal,
        teacher: Signal | None,
        labels: Tensor,
        counts: StepCounts | None = None,
        predictions: PredictionValue | None = None,
    ) -> ObjectiveValue:
        """Value of one micro-batch.

        Args:
            student: With gradients.
            teacher: Without; None when no term needs it.
            labels: One for each prediction.
            counts: None: this micro-batch is the whole step of the only process.
            predictions: The terms of the predictions, where they were computed while the student ran.
        """
        if teacher is None and self.needs_teacher:
            raise RecipeError("teacher: a term of the objective reads it, and there is none. Give its Signal.")
        if counts is None:
            positions = student.features[0].shape[0] if student.features else 0
            distilled = None if self.logits is None else self.logits.num_distilled(len(labels))
            counts = StepCounts(labels.shape[0], positions, positions, distilled)
        if predictions is None:
            outputs = None if teacher is None else teacher.logits
            predictions = self.predictions(student.logits, outputs, labels, counts)
        loss, parts = predictions.loss + graph_zero(student.features), dict(predictions.parts)
        tallies: dict[str, Tensor] = {}
        if self.features is not None:
            assert teacher is not None
            raw, tallies = self._feature_value(self.features, student, teacher, counts)
            parts |= {"features_raw": raw.detach(), "features_weighted": (self.features.weight * raw).detach()}
            loss = loss + self.features.weight * raw
        return ObjectiveValue(loss, parts, tallies, predictions.distilled)

    def predictions(
        self,
        student: Outputs | None,
        teacher: Outputs | None,
        labels: Tensor,
        counts: StepCounts,
        *,
        chunk_size: int | None = None,
        nll: bool = False,
    ) -> PredictionValue:
        """The terms of the predictions of one micro-batch.

        Args:
            student: Logits, or the states before a head, whose logits are then made a chunk at a time.
            teacher: None when no term reads it.
            labels: One for each prediction.
            counts: Divisors of the step.
            chunk_size: Predictions whose logits are in memory at the same time; None: all.
            nll: Add `nll_sum` to the parts.
        """
        terms = PredictionTerms(self.task, self.logits, self._registry, nll)
        if terms.are_none and student is None:
            return PredictionValue(torch.zeros((), device=labels.device), {})
        if not isinstance(student, Tensor | HeadOutputs):
            raise RecipeError("student: a term of the objective reads its logits, and its Signal has none. Give them.")
        if self.logits is not None and teacher is None:
            raise RecipeError("teacher: the logits term reads its logits, and its Signal has none. Give them.")
        return terms.value(student, teacher, labels, counts, chunk_size=chunk_size)

    def _feature_value(
        self, term: FeatureTerm, student: Signal, teacher: Signal, counts: StepCounts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`(n_m / n) F_m` of one micro-batch, F_m the mean over layers.

        A statistic of fewer positions than its `minimum_positions` is 0, and counted.
        """
        if counts.micro_positions < FEATURE_LOSS_FACTS[term.loss].minimum_positions:
            zeros = [states.flatten()[:0].float().sum() for states in student.features]
            return torch.stack(zeros).sum(), {"skipped_feature_terms": torch.tensor(1.0)}
        layer_counts = [len(term.layers), len(student.features), len(teacher.features)]
        if len(set(layer_counts)) > 1:
            raise ShapeError(
                "features: {} pairs of layers, but states of {} of the student and of {} of the teacher. Give one of "
                "each for each pair.".format(*layer_counts)
            )
        values, tallies = [], []
        for index, (states, teacher_states) in enumerate(zip(student.features, teacher.features, strict=True)):
            tally: dict[str, Tensor] = {}
            if term.lenses:
                value = _lens_value(term, term.layers[index], states, teacher_states)
            else:
                projected = term.projectors[index](states) if term.projectors else states
                value, tally = _layer_value(term.loss, projected, teacher_states)
            values.append(value)
            tallies.append(tally)
        mean = torch.stack(values).mean() * (counts.micro_positions / max(counts.positions, 1))
        return mean, {name: torch.stack([tally[name] for tally in tallies]).sum() for name in tallies[0]}


def _lens_value(term: FeatureTerm, pair: LayerPair, student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence of the predictions that both models read off their states at a pair of layers."""
    student_lens, teacher_lens = term.lenses
    readings = student_lens.read(student, pair.student_layer), teacher_lens.read(teacher, pair.teacher_layer)
    return lens_divergence(*readings, student_lens, across_processes=True)


def _layer_value(loss: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over live units of one pair of layers, and how many are dead on each side."""
    if loss not in UNIT_STATISTICS:
        return FEATURE_LOSSES[loss](student, teacher, across_processes=True).mean(), {}
    check_states(student, teacher)
    moments = paired_moments(student, teacher, across_processes=True)
    values = UNIT_STATISTICS[loss](moments, across_processes=True)
    dead = {
        "dead_student_units": (~moments.student_live).sum().float(),
        "dead_teacher_units": (~moments.teacher_live).sum().float(),
    }
    return values.sum() / moments.live.sum().clamp(min=1), dead
