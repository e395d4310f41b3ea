"""What is true of each loss: what it compares, which problems it fits, and what it needs."""

from dataclasses import dataclass
from typing import Final

MINIMUM_POSITIONS: Final = 8
"""Fewest positions that a statistic is taken over: a correlation of two positions is always 1 or -1."""


@dataclass(frozen=True, kw_only=True)
class TaskLossFacts:
    """What is true of a loss against labels.

    Attributes:
        name: As in `TaskTerm.loss`.
        problems: Values of a recipe's `task.problem` that are learnt with it.
        problem_type: The same in the config of a classifier (`config.problem_type`).
        is_distribution: The outputs of a prediction are one distribution, of which one output is right. Otherwise each
            output stands for itself, and its label is a number.
    """

    name: str
    problems: tuple[str, ...]
    problem_type: str
    is_distribution: bool = False


@dataclass(frozen=True, kw_only=True)
class LogitLossFacts:
    """What is true of a loss between the outputs of teacher and student.

    Attributes:
        name: As in a recipe's `objective.logits.loss`.
        task_losses: Names of `TASK_LOSS_FACTS` whose outputs it compares.
        temperature_exponent: The objective multiplies the loss by the temperature to this power, so that its gradient
            keeps its size; 0: a temperature has no meaning for it.
        options: Further settings that it takes, by name.
        is_finite: With its settings as they are by default it stays finite where one side has probability and the other
            none (a logit of -inf).
        is_reverse: It is infinite where the student has probability and the teacher none; False: the other way round.
    """

    name: str
    task_losses: tuple[str, ...] = ("cross_entropy",)
    temperature_exponent: int = 2
    options: tuple[str, ...] = ()
    is_finite: bool = False
    is_reverse: bool = False

    @property
    def problems(self) -> tuple[str, ...]:
        """Values of a recipe's `task.problem` that it fits."""
        return tuple(name for task_loss in self.task_losses for name in TASK_LOSS_FACTS[task_loss].problems)

    @property
    def fits_top_k(self) -> bool:
        """Whether it compares distributions, so that the likeliest outputs and the rest can stand for all of them."""
        return any(TASK_LOSS_FACTS[name].is_distribution for name in self.task_losses)


@dataclass(frozen=True, kw_only=True)
class FeatureLossFacts:
    """What is true of a loss between hidden states.

    Attributes:
        name: As in a recipe's `objective.features.loss`.
        pairs_units: It compares unit i with unit i, so that as many units of one side are chosen as of the other;
            False: it takes whole states.
        is_statistic: It means nothing for fewer than `MINIMUM_POSITIONS` positions; False: a mean over positions, which
            adds up over micro-batches.
        has_live_units: A unit that does not vary is left out of the mean; such a loss is computed from `PairedMoments`.
        fits_int8: It hardly changes when each column of the teacher's states is rounded to 255 steps of its range.
        needs_projector: The student's states go through a learned `Projector` to the teacher's width first.
        needs_geometry: The teacher's states are turned by the root of the functional geometry first.
        needs_heads: It compares what the heads of both models predict from the states, by the `Lens` of each.
        reads_values: Its code depends on the numbers in a tensor, so that it cannot run on tensors without storage.
    """

    name: str
    pairs_units: bool = False
    is_statistic: bool = False
    has_live_units: bool = False
    fits_int8: bool = False
    needs_projector: bool = False
    needs_geometry: bool = False
    needs_heads: bool = False
    reads_values: bool = False

    @property
    def minimum_positions(self) -> int:
        """Fewest positions of one pass that it is computed over: with fewer the pass teaches no features."""
        return MINIMUM_POSITIONS if self.is_statistic else 0


TASK_LOSS_FACTS: Final = {
    facts.name: facts
    for facts in (
        TaskLossFacts(
            name="cross_entropy",
            problems=("single_label", "generation"),
            problem_type="single_label_classification",
            is_distribution=True,
        ),
        TaskLossFacts(
            name="binary_cross_entropy", problems=("multi_label",), problem_type="multi_label_classification"
        ),
        TaskLossFacts(name="mse", problems=("regression",), problem_type="regression"),
    )
}
"""Facts of the losses against labels, by name."""

TASK_LOSS_OF: Final = {problem: facts.name for facts in TASK_LOSS_FACTS.values() for problem in facts.problems}
"""The loss against labels of each problem."""

TASK_LOSS_OF_PROBLEM_TYPE: Final = {facts.problem_type: facts.name for facts in TASK_LOSS_FACTS.values()}
"""The same by `config.problem_type` of a classifier."""

LOGIT_LOSS_FACTS: Final = {
    facts.name: facts
    for facts in (
        LogitLossFacts(name="forward_kl", task_losses=("cross_entropy", "binary_cross_entropy")),
        LogitLossFacts(name="reverse_kl", is_reverse=True),
        LogitLossFacts(name="jensen_shannon", options=("beta",), is_finite=True),
        LogitLossFacts(name="skew_kl", options=("alpha",), is_finite=True),
        LogitLossFacts(name="skew_reverse_kl", options=("alpha",), is_finite=True, is_reverse=True),
        LogitLossFacts(name="total_variation", temperature_exponent=1, is_finite=True),
        LogitLossFacts(name="mse", task_losses=("mse",), temperature_exponent=0),
    )
}
"""Facts of the losses between outputs, by name."""

WITHOUT_TEMPERATURE: Final = tuple(name for name, facts in LOGIT_LOSS_FACTS.items() if facts.temperature_exponent == 0)
"""Logit losses between values, for which a temperature has no meaning."""

LOGIT_LOSSES_OF: Final = {
    problem: tuple(name for name, facts in LOGIT_LOSS_FACTS.items() if problem in facts.problems)
    for problem in TASK_LOSS_OF
}
"""Logit losses that fit each problem; the first is the default."""

FEATURE_LOSS_FACTS: Final = {
    facts.name: facts
    for facts in (
        FeatureLossFacts(name="correlation", pairs_units=True, is_statistic=True, has_live_units=True, fits_int8=True),
        FeatureLossFacts(
            name="cross_correlation", pairs_units=True, is_statistic=True, has_live_units=True, fits_int8=True
        ),
        FeatureLossFacts(name="projector", needs_projector=True),
        FeatureLossFacts(name="cka", is_statistic=True, fits_int8=True, reads_values=True),
        FeatureLossFacts(name="mse", pairs_units=True),
        FeatureLossFacts(name="cosine", pairs_units=True, reads_values=True),
        FeatureLossFacts(name="distill_lens", needs_heads=True),
        FeatureLossFacts(name="procrustes", is_statistic=True, fits_int8=True),
        FeatureLossFacts(name="gram", is_statistic=True, fits_int8=True),
        FeatureLossFacts(
            name="functional_cka", is_statistic=True, fits_int8=True, needs_geometry=True, reads_values=True
        ),
    )
}
"""Facts of the losses between hidden states, by name."""


def users_of_option(option: str) -> tuple[str, ...]:
    """Logit losses that take a further setting."""
    return tuple(name for name, facts in LOGIT_LOSS_FACTS.items() if option in facts.options)
