"""ROUGE of answers against their references, with everything stated that moves it."""

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

"""F1 of the longest common subsequence, of words, of pairs of words; `rougeLsum` line by line, as in rouge-score."""

DROPPED_SHARE: Final = 0.01
"""A warning is given where the latin tokenizer drops more of the letters and digits than this."""

TokenizerName = Literal["latin", "unicode"]
_WORD: Final = "LNM"
# Scripts that put no space between words: ideographs, kana, Thai, Lao, Tibetan, Burmese, Khmer.
_UNSPACED: Final = re.compile(
    "[\u0e01-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
_ASCII_WORD: Final = re.compile(r"[a-z0-9]+")
_RESAMPLES_TOGETHER: Final = 100
"""Each is a copy of all rows in memory."""


@dataclass(frozen=True)
class RougeSettings:
    """What moves ROUGE by points.

    Attributes:
        stemmer: Porter's, for English: "runners" matches "runner".
        tokenizer: "latin" keeps a-z and 0-9 alone, as in most papers; "unicode" keeps letters of every script, and
            takes each character of a script without spaces for a word.
    """

    stemmer: bool = True
    tokenizer: TokenizerName = "latin"


@dataclass(frozen=True)
class RougeScores:
    """ROUGE of each answer in 0..1, best over its references; None for a row that has no reference.

    `num_empty` answers hold no word: they score 0.
    """

    rows: tuple[dict[str, float] | None, ...]
    num_empty: int
    settings: RougeSettings

    @property
    def num_without_reference(self) -> int:
        """Rows that are in no mean."""
        return sum(row is None for row in self.rows)

    def means(self) -> dict[str, float | None]:
        """Mean of each ROUGE over the rows that have a reference; None where no row has one."""
        return rouge_means(self.rows)


def rouge_means(rows: Sequence[Mapping[str, float] | None]) -> dict[str, float | None]:
    """Mean of each ROUGE over the rows that have one."""
    scored = [row for row in rows if row is not None]
    return {name: float(np.mean([row[name] for row in scored])) if scored else None for name in ROUGE}


def rouge_scores(
    answers: Sequence[str | None], references: Sequence[Sequence[str | None]], settings: RougeSettings | None = None
) -> RougeScores:
    """ROUGE of each answer; the same input gives the same numbers, nothing is drawn.

    With the latin tokenizer they are those of rouge-score for the same strings, best over the references: texts reach
    it as they are, so that a sentence is what stands on a line. A row without a reference, which rouge-score would
    count as 0, has none.

    Args:
        answers: None and texts without a word are empty.
        references: Of each answer; those that are None or hold no word do not count.
        settings: Left out: with Porter's stemmer, latin.

    Source:
        Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", sec. 2 and 3.

    Example:
        >>> settings = RougeSettings(stemmer=False)
        >>> rouge_scores(["the runner is runs fast"], [["the runners are running fast"]], settings).rows[0]["rougeL"]
        0.4000000000000001
    """
    settings = settings or RougeSettings()
    scorer = RougeScorer(list(ROUGE), tokenizer=_tokenizer(settings))
    with_words = [[text for text in row if text is not None and unicode_words(text)] for row in references]
    texts = [answer if answer is not None and unicode_words(answer) else "" for answer in answers]
    rows = [_row(scorer, text, row) for text, row in zip(texts, with_words, strict=True)]
    return RougeScores(tuple(rows), sum(not text for text in texts), settings)


def _row(scorer: RougeScorer, answer: str, references: Sequence[str]) -> dict[str, float] | None:
    if not references:
        return None
    best = scorer.score_multi(references, answer)
    return {name: float(best[name].fmeasure) for name in ROUGE}


def _tokenizer(settings: RougeSettings) -> Tokenizer:
    return DefaultTokenizer(settings.stemmer) if settings.tokenizer == "latin" else _UnicodeTokenizer(settings.stemmer)


class _UnicodeTokenizer(Tokenizer):  # type: ignore[misc]
    """On text of a-z and 0-9 the same as the latin one."""

    def __init__(self, stemmer: bool) -> None:
        self.latin = DefaultTokenizer(stemmer)

    def tokenize(self, text: str) -> list[str]:
        return [
            part for word in unicode_words(text) for part in (self.latin.tokenize(word) if word.isascii() else [word])
        ]


def unicode_words(text: str) -> list[str]:
    """Words in lower case: runs of letters, digits and their marks; single characters in scripts without spaces.

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
    """What the tokenizer keeps from ROUGE, where that is more than 1 % of the letters and digits; also logged."""
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
    """Share of letters, digits and their marks that the latin tokenizer drops.

    Example:
        >>> dropped_share(["caf\u00e9"])
        0.25
    """
    counted = [character for text in texts for character in text.lower() if unicodedata.category(character)[0] in _WORD]
    return sum(not character.isascii() for character in counted) / len(counted) if counted else 0.0


def bootstrap_interval(
    values: Sequence[float], *, seed: int = 0, resamples: int = 1000, share: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over rows drawn with replacement; the seed makes it the same every time.

    Example:
        >>> bootstrap_interval([1.0, 1.0])
        (1.0, 1.0)
    """
    rows = np.asarray(values, dtype=np.float64)
    if len(rows) < 2:
        return float(rows[0]), float(rows[0])
    drawn = stats.bootstrap(
        (rows,),
        np.mean,
        n_resamples=resamples,
        batch=_RESAMPLES_TOGETHER,
        confidence_level=share,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = drawn.confidence_interval
    return float(interval.low), float(interval.high)
