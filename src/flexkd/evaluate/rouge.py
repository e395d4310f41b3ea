"""ROUGE of answers against their references, with every setting that affects it."""

import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer
from scipy import stats

from flexkd.facts.metrics import ROUGE

_log = logging.getLogger(__name__)

DROPPED_SHARE: Final = 0.01
"""Share of letters and digits dropped by the latin tokenizer above which a warning is given."""

TokenizerName = Literal["latin", "unicode"]
_WORD: Final = "LNM"
# Scripts that put no space between words: ideographs, kana, Thai, Lao, Tibetan, Burmese, Khmer.
_UNSPACED: Final = re.compile(
    "[\u0e01-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
_ASCII_WORD: Final = re.compile(r"[a-z0-9]+")
_RESAMPLE_BATCH: Final = 100
"""Resamples that stand in memory together, each a copy of all rows."""


@dataclass(frozen=True)
class RougeSettings:
    """Settings that change ROUGE by whole points.

    Attributes:
        stemmer: Porter's stemmer for English: "runners" matches "runner".
        tokenizer: "latin" keeps only a-z and 0-9, as in most papers; "unicode" keeps letters of every script, and
            treats each character of a script without spaces as a word.
    """

    stemmer: bool = True
    tokenizer: TokenizerName = "latin"


def rouge_means(by_row: Sequence[Mapping[str, float] | None]) -> dict[str, float | None]:
    """Mean of each ROUGE over the rows that have a reference; None if no row has one."""
    scored = [scores for scores in by_row if scores is not None]
    return {name: float(np.mean([scores[name] for scores in scored])) if scored else None for name in ROUGE}


def rouge_scores(
    answers: Sequence[str | None], references: Sequence[Sequence[str | None]], settings: RougeSettings | None = None
) -> tuple[dict[str, float] | None, ...]:
    """ROUGE of each answer in 0..1, the best over its references; None for a row without a reference.

    With the latin tokenizer the values are those of rouge-score for the same strings, except that it gives 0 for a row
    without a reference. An answer without a word scores 0. Texts are not changed, so that for `rougeLsum` each line is
    a sentence.

    Args:
        answers: None, or a text without a word, is an empty answer.
        references: The references of each answer; None, or a text without a word, is ignored.
        settings: None: Porter's stemmer and the latin tokenizer.

    Source:
        Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", sec. 2 and 3.

    Example:
        >>> settings = RougeSettings(stemmer=False)
        >>> rouge_scores(["the runner is runs fast"], [["the runners are running fast"]], settings)[0]["rougeL"]
        0.4000000000000001
    """
    settings = settings or RougeSettings()
    scorer = RougeScorer(list(ROUGE), tokenizer=_tokenizer(settings))
    with_words = [[text for text in row if text is not None and unicode_words(text)] for row in references]
    texts = [answer if answer is not None and unicode_words(answer) else "" for answer in answers]
    return tuple(_best(scorer, text, row) for text, row in zip(texts, with_words, strict=True))


def _best(scorer: RougeScorer, answer: str, references: Sequence[str]) -> dict[str, float] | None:
    if not references:
        return None
    best = scorer.score_multi(references, answer)
    return {name: float(best[name].fmeasure) for name in ROUGE}


def _tokenizer(settings: RougeSettings) -> Tokenizer:
    return DefaultTokenizer(settings.stemmer) if settings.tokenizer == "latin" else _UnicodeTokenizer(settings.stemmer)


class _UnicodeTokenizer(Tokenizer):  # type: ignore[misc]
    """Gives the same tokens as the latin tokenizer for text of a-z and 0-9."""

    def __init__(self, stemmer: bool) -> None:
        self.latin = DefaultTokenizer(stemmer)

    def tokenize(self, text: str) -> list[str]:
        return [
            part for word in unicode_words(text) for part in (self.latin.tokenize(word) if word.isascii() else [word])
        ]


def unicode_words(text: str) -> list[str]:
    """Words in lower case: runs of letters, digits and combining marks; single characters in scripts without spaces.

    Example:
        >>> unicode_words("Caf\u00e9 no. 7, \u4eca\u5929")
        ['caf\u00e9', 'no', '7', '\u4eca', '\u5929']
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    words: list[str] = []
    inside = False
    for character in unicodedata.normalize("NFC", text).lower():
        category = unicodedata.category(character)[0]
        if category not in _WORD:
            inside = False
        elif category == "M" and inside:
            words[-1] += character
        elif _UNSPACED.match(character):
            words.append(character)
            inside = True
        elif inside and not _UNSPACED.match(words[-1]):
            words[-1] += character
        else:
            words.append(character)
            inside = True
    return words


def dropped_note(texts: Iterable[str], settings: RougeSettings) -> str | None:
    """A note if the tokenizer drops more than 1 % of the letters and digits, which is also logged; else None."""
    dropped = dropped_share(texts) if settings.tokenizer == "latin" else 0.0
    if dropped <= DROPPED_SHARE:
        return None
    text = (
        f"generation.tokenizer: latin drops {dropped:.0%} of the letters and digits of the references, as rouge-score "
        "does, so that ROUGE does not see them. Use generation.tokenizer: unicode."
    )
    _log.warning(text)
    return text


def dropped_share(texts: Iterable[str]) -> float:
    """Share of letters, digits and combining marks that the latin tokenizer drops.

    Example:
        >>> dropped_share(["caf\u00e9"])
        0.25
    """
    letters = [character for text in texts for character in text.lower() if unicodedata.category(character)[0] in _WORD]
    return sum(not character.isascii() for character in letters) / len(letters) if letters else 0.0


def bootstrap_interval(
    values: Sequence[float], *, seed: int = 0, resamples: int = 1000, share: float = 0.95
) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean over rows.

    Example:
        >>> bootstrap_interval([1.0, 1.0])
        (1.0, 1.0)
    """
    rows = np.asarray(values, dtype=np.float64)
    if len(rows) < 2:
        return float(rows[0]), float(rows[0])
    bootstrap = stats.bootstrap(
        (rows,),
        np.mean,
        n_resamples=resamples,
        batch=_RESAMPLE_BATCH,
        confidence_level=share,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = bootstrap.confidence_interval
    return float(interval.low), float(interval.high)
