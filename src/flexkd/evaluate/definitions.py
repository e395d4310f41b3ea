"""How each metric is computed, and where it differs on purpose from the package that is known for it, in words."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class _Definition:
    problems: tuple[str, ...]
    metrics: tuple[str, ...]
    text: str
    deviates: bool = False


_CLASSES: Final = ("single_label",)
_FLAGS: Final = ("multi_label",)
_NUMBERS: Final = ("regression",)
_WORDS: Final = ("generation",)

_DEFINITIONS: Final = (
    _Definition(_CLASSES, ("accuracy", "macro_f1"), "Accuracy and macro F1 are those of scikit-learn."),
    _Definition(
        _CLASSES,
        ("matthews_correlation",),
        "Matthews correlation is that of scikit-learn, but n/a instead of 0 where all labels or all predictions are "
        "the same.",
        deviates=True,
    ),
    _Definition(
        _CLASSES,
        ("nll",),
        "Nll: mean over rows in nats, of log-probabilities that are not cut off at 1e-16 as scikit-learn's log_loss "
        "does.",
        deviates=True,
    ),
    _Definition(
        _FLAGS,
        ("micro_f1", "macro_f1", "subset_accuracy"),
        "F1 and subset accuracy are those of scikit-learn for decisions at a probability of 0.5; a label that never "
        "occurs and is never predicted has F1 0.",
    ),
    _Definition(
        (*_CLASSES, *_FLAGS),
        ("calibration_error",),
        "Calibration error: the gap between confidence and accuracy in 15 bins of equal width, weighted by their size.",
    ),
    _Definition(
        _NUMBERS,
        ("pearson", "spearman"),
        "Pearson and Spearman are those of scipy; n/a where predictions or labels are constant.",
    ),
    _Definition(_NUMBERS, ("mse",), "Mse is that of scikit-learn."),
    _Definition(
        _WORDS,
        ("nll", "perplexity"),
        "Nll: mean over the tokens of all references in nats, each token the same weight; perplexity is its "
        "exponential.",
    ),
)


def definitions(problem: str, metrics: Collection[str], recipe: Mapping[str, Any]) -> list[str]:
    """A sentence or two for each group of these metrics.

    Args:
        problem: As in a recipe; decides what `nll` and `macro_f1` mean.
        metrics: Names that a table shows.
        recipe: As plain data; its section `generation` holds the settings of ROUGE.
    """
    return [definition.text for definition in _of(problem, metrics, recipe)]


def deviations(problem: str, metrics: Collection[str], recipe: Mapping[str, Any]) -> list[str]:
    """Those of `definitions` by which a figure is not its package's for every input."""
    return [definition.text for definition in _of(problem, metrics, recipe) if definition.deviates]


def _of(problem: str, metrics: Collection[str], recipe: Mapping[str, Any]) -> list[_Definition]:
    section = recipe.get("generation") or {}
    candidates = [_rouge(section.get("stemmer", True), section.get("tokenizer", "latin")), *_DEFINITIONS]
    return [
        definition
        for definition in candidates
        if problem in definition.problems and any(name in metrics for name in definition.metrics)
    ]


def _rouge(stemmer: bool, tokenizer: str) -> _Definition:
    names = ("rougeL", "rouge1", "rouge2", "rougeLsum")
    stems = "with Porter's stemmer" if stemmer else "without a stemmer"
    if tokenizer == "unicode":
        text = (
            f"ROUGE: F1 over words of every script, {stems}. rouge-score itself keeps a-z and 0-9 alone; "
            "generation.tokenizer: latin gives its figures."
        )
        return _Definition(_WORDS, names, text, deviates=True)
    return _Definition(
        _WORDS, names, f"ROUGE: F1 of rouge-score, {stems}, best over the references; rougeLsum goes line by line."
    )
