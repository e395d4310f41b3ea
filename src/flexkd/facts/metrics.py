"""What is true of each metric: which problems have it, which way is better, what it means in words."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Definition:
    """How metrics are computed, in a sentence or two.

    Attributes:
        deviates: For some inputs the figure differs, on purpose, from that of the package which is known for it.
    """

    text: str
    deviates: bool = False


@dataclass(frozen=True, kw_only=True)
class MetricFacts:
    """What is true of a metric; one that means something else for another problem has a row for each.

    Attributes:
        name: As in a recipe's `task.metric` and in the metrics of a record.
        problems: Values of a recipe's `task.problem` that have it.
        is_choice: It can be a recipe's `task.metric`, by which a run is evaluated and its best checkpoint chosen.
        lower_is_better: Of two models the one with the smaller value is better.
        reads_answers: It is computed from answers that a model wrote, so that generating them costs time.
        compares_with_teacher: It measures how close a model is to the teacher, not to the labels.
        is_in_terminal: The terminal shows it beside the metric of the task; a page shows all.
        definition: Shared with metrics that the same sentence explains; of ROUGE a function of `generation.stemmer`
            and `generation.tokenizer`. None where the name says it.
    """

    name: str
    problems: tuple[str, ...]
    is_choice: bool = True
    lower_is_better: bool = False
    reads_answers: bool = False
    compares_with_teacher: bool = False
    is_in_terminal: bool = False
    definition: Definition | Callable[[bool, str], Definition] | None = None

    def definition_for(self, *, stemmer: bool, tokenizer: str) -> Definition | None:
        """Its definition under the settings of ROUGE."""
        return self.definition(stemmer, tokenizer) if callable(self.definition) else self.definition


def _rouge(stemmer: bool, tokenizer: str) -> Definition:
    stems = "with Porter's stemmer" if stemmer else "without a stemmer"
    if tokenizer == "unicode":
        text = (
            f"ROUGE: F1 over words of every script, {stems}. rouge-score itself keeps a-z and 0-9 alone; "
            "generation.tokenizer: latin gives its figures."
        )
        return Definition(text, deviates=True)
    return Definition(f"ROUGE: F1 of rouge-score, {stems}, best over the references; rougeLsum goes line by line.")


_CLASSES: Final = ("single_label",)
_FLAGS: Final = ("multi_label",)
_NUMBERS: Final = ("regression",)
_TEXT: Final = ("generation",)

_ACCURACY_AND_F1: Final = Definition("Accuracy and macro F1 are those of scikit-learn.")
_MATTHEWS: Final = Definition(
    "Matthews correlation is that of scikit-learn, but n/a instead of 0 where all labels or all predictions are the "
    "same.",
    deviates=True,
)
_DECISIONS: Final = Definition(
    "F1 and subset accuracy are those of scikit-learn for decisions at a probability of 0.5; a label that never "
    "occurs and is never predicted has F1 0."
)
_CALIBRATION: Final = Definition(
    "Calibration error: the gap between confidence and accuracy in 15 bins of equal width, weighted by their size."
)
_NLL_OF_CLASSES: Final = Definition(
    "Nll: mean over rows in nats, of log-probabilities that are not cut off at 1e-16 as scikit-learn's log_loss does.",
    deviates=True,
)
_CORRELATIONS: Final = Definition(
    "Pearson and Spearman are those of scipy; n/a where predictions or labels are constant."
)
_MSE: Final = Definition("Mse is that of scikit-learn.")
_NLL_OF_TOKENS: Final = Definition(
    "Nll: mean over the tokens of all references in nats, each token the same weight; perplexity is its exponential."
)

METRIC_FACTS: Final = (
    MetricFacts(name="accuracy", problems=_CLASSES, definition=_ACCURACY_AND_F1),
    MetricFacts(name="macro_f1", problems=_CLASSES, definition=_ACCURACY_AND_F1),
    MetricFacts(name="matthews_correlation", problems=_CLASSES, definition=_MATTHEWS),
    MetricFacts(name="micro_f1", problems=_FLAGS, definition=_DECISIONS),
    MetricFacts(name="macro_f1", problems=_FLAGS, definition=_DECISIONS),
    MetricFacts(name="subset_accuracy", problems=_FLAGS, definition=_DECISIONS),
    MetricFacts(name="calibration_error", problems=(*_CLASSES, *_FLAGS), lower_is_better=True, definition=_CALIBRATION),
    MetricFacts(name="nll", problems=_CLASSES, lower_is_better=True, definition=_NLL_OF_CLASSES),
    MetricFacts(name="pearson", problems=_NUMBERS, definition=_CORRELATIONS),
    MetricFacts(name="spearman", problems=_NUMBERS, definition=_CORRELATIONS),
    MetricFacts(name="mse", problems=_NUMBERS, lower_is_better=True, definition=_MSE),
    MetricFacts(name="rougeL", problems=_TEXT, reads_answers=True, definition=_rouge),
    MetricFacts(name="rouge1", problems=_TEXT, reads_answers=True, definition=_rouge),
    MetricFacts(name="rouge2", problems=_TEXT, reads_answers=True, definition=_rouge),
    MetricFacts(name="rougeLsum", problems=_TEXT, reads_answers=True, definition=_rouge),
    MetricFacts(name="nll", problems=_TEXT, lower_is_better=True, is_in_terminal=True, definition=_NLL_OF_TOKENS),
    MetricFacts(name="perplexity", problems=_TEXT, lower_is_better=True, definition=_NLL_OF_TOKENS),
    MetricFacts(name="token_agreement", problems=_TEXT, compares_with_teacher=True, is_in_terminal=True),
    # Closeness to the teacher, and the effect of the limit of new tokens, do not choose a checkpoint.
    MetricFacts(
        name="agreement",
        problems=(*_CLASSES, *_FLAGS),
        is_choice=False,
        compares_with_teacher=True,
        is_in_terminal=True,
    ),
    MetricFacts(
        name="kl",
        problems=(*_CLASSES, *_FLAGS, *_TEXT),
        is_choice=False,
        lower_is_better=True,
        compares_with_teacher=True,
    ),
    MetricFacts(name="teacher_pearson", problems=_NUMBERS, is_choice=False, compares_with_teacher=True),
    MetricFacts(
        name="teacher_mse", problems=_NUMBERS, is_choice=False, lower_is_better=True, compares_with_teacher=True
    ),
    MetricFacts(name="cut_share", problems=_TEXT, is_choice=False, lower_is_better=True, reads_answers=True),
    MetricFacts(name="answer_tokens", problems=_TEXT, is_choice=False, reads_answers=True),
)
"""Every metric, in the order of a report."""

CLASSIFIER_PROBLEMS: Final = (*_CLASSES, *_FLAGS, *_NUMBERS)
"""Problems of a model with one answer a row."""

PROBLEMS: Final = (*CLASSIFIER_PROBLEMS, *_TEXT)

METRIC_NAMES: Final[dict[str, tuple[str, ...]]] = {
    problem: tuple(metric.name for metric in METRIC_FACTS if metric.is_choice and problem in metric.problems)
    for problem in PROBLEMS
}
"""Metrics of each problem that can be a recipe's `task.metric`; the first is the default."""

ROUGE: Final = tuple(metric.name for metric in METRIC_FACTS if metric.is_choice and metric.reads_answers)

SHARES_OF_ROWS: Final = {"accuracy": "single_label", "subset_accuracy": "multi_label"}
"""Metrics that are the share of right rows, each with its problem."""

LOSS: Final = "loss"
"""Name of the objective's own value among the figures of a validation; lower is better."""

LOWER_IS_BETTER: Final = {metric.name for metric in METRIC_FACTS if metric.lower_is_better}
"""Names of metrics; `own_metrics` adds those of users."""


def validation_names(problem: str, *, answers: bool) -> tuple[str, ...]:
    """The figures that every evaluation of a training has of the validation rows.

    Args:
        problem: As in a recipe.
        answers: Whether validation rows are answered, where text is written.
    """
    if problem in CLASSIFIER_PROBLEMS:
        return (LOSS, *METRIC_NAMES[problem])
    return (LOSS, "nll", *(ROUGE if answers else ()))


def definitions(problem: str, metrics: Collection[str], recipe: Mapping[str, Any]) -> list[str]:
    """A sentence or two for each group of these metrics.

    Args:
        problem: As in a recipe; decides what `nll` and `macro_f1` mean.
        metrics: Names that a table shows.
        recipe: As plain data; its section `generation` holds the settings of ROUGE.
    """
    return [definition.text for definition in _definitions(problem, metrics, recipe)]


def deviations(problem: str, metrics: Collection[str], recipe: Mapping[str, Any]) -> list[str]:
    """Those of `definitions` for figures that differ, for some inputs, from the package which is known for them."""
    return [definition.text for definition in _definitions(problem, metrics, recipe) if definition.deviates]


def _definitions(problem: str, metrics: Collection[str], recipe: Mapping[str, Any]) -> list[Definition]:
    section = recipe.get("generation") or {}
    settings = {"stemmer": section.get("stemmer", True), "tokenizer": section.get("tokenizer", "latin")}
    in_table = [facts for facts in METRIC_FACTS if problem in facts.problems and facts.name in metrics]
    # Metrics of this problem alone come first.
    in_table.sort(key=lambda facts: len(facts.problems))
    explanations = [facts.definition_for(**settings) for facts in in_table]
    return list(dict.fromkeys(definition for definition in explanations if definition is not None))


def metric_label(name: str) -> str:
    """A metric as people read it."""
    return name.replace("_", " ")
