"""ROUGE: its settings move it by points, so each of them is pinned; nothing is drawn."""

import itertools
import re

import numpy as np
import pytest

from flexkd.evaluate.answers import first_sentence, sentences
from flexkd.evaluate.rouge import (
    RougeSettings,
    bootstrap_interval,
    dropped_note,
    dropped_share,
    rouge_means,
    rouge_scores,
    unicode_words,
)
from flexkd.facts.metrics import ROUGE

CHINESE, HINDI, THAI = (
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d",
    "\u0926\u093f\u0928 \u0905\u091a\u094d\u091b\u093e",
    "\u0e27\u0e31\u0e19\u0e19\u0e35\u0e49",
)
CREAM = "caf\u00e9 cr\u00e8me"
PLAIN = RougeSettings(stemmer=False)
UNICODE = RougeSettings(tokenizer="unicode")


def score(answer, *references, settings=PLAIN) -> dict[str, float]:
    (row,) = rouge_scores([answer], [references], settings)
    assert row is not None
    return row


def f1(answer: list[str], reference: list[str], common: int) -> float:
    return 2 * common / (len(answer) + len(reference))


def test_scores_are_f1_of_words_pairs_and_the_longest_common_subsequence():
    answer, reference = "the cat on the mat sat", "the cat sat on the mat"
    found = score(answer, reference)
    a, r = answer.split(), reference.split()
    assert found["rouge1"] == pytest.approx(f1(a, r, 6))
    pairs = set(itertools.pairwise(a)) & set(itertools.pairwise(r))
    assert found["rouge2"] == pytest.approx(f1(a[1:], r[1:], len(pairs)))
    assert found["rougeL"] == pytest.approx(f1(a, r, 5))


def test_the_best_reference_counts_and_rouge_lsum_goes_by_line():
    assert score("red fox", "blue whale", "red fox")["rougeL"] == 1
    swapped = score("It runs fast.\nIt is small.", "It is small.\nIt runs fast.")
    assert swapped["rougeLsum"] == 1
    assert swapped["rougeL"] < 1
    assert score("It runs fast. It is small.", "It is small. It runs fast.")["rougeLsum"] < 1


def test_E01_the_stemmer_is_a_setting_that_is_stated():
    pair = ("the runner is runs fast", "the runners are running fast")
    assert score(*pair)["rougeL"] == pytest.approx(0.4)
    assert score(*pair, settings=RougeSettings())["rougeL"] == pytest.approx(0.8)
    assert RougeSettings() == RougeSettings(stemmer=True, tokenizer="latin")


@pytest.mark.parametrize("text", [CHINESE, HINDI, THAI, CREAM])
def test_E03_identical_text_of_any_script_scores_one(text):
    assert score(text, text, settings=UNICODE)["rougeL"] == 1
    assert score(text, text)["rougeL"] == (1 if text == CREAM else 0)


def test_E03_accents_count_and_what_is_dropped_is_said(caplog):
    assert score("caf\u00e9", "caf")["rougeL"] == 1
    assert score("caf\u00e9", "caf", settings=UNICODE)["rougeL"] == 0
    assert dropped_share([CREAM]) == pytest.approx(2 / 9)
    assert dropped_share(["plain text, no. 7"]) == dropped_share([]) == dropped_share(["?!"]) == 0
    note = dropped_note([CREAM], PLAIN)
    assert note is not None
    assert note.startswith("generation.tokenizer: latin drops 22% of the letters and digits")
    assert note in caplog.text
    assert dropped_note([CREAM], UNICODE) is None
    assert dropped_note(["a" * 200 + "\u00e9"], PLAIN) is None


def test_both_tokenizers_agree_on_plain_english_and_unicode_splits_scripts_without_spaces():
    text, other = "It's 20 runners' un_tested e-mails.", "Runner's test: it mailed 20 times"
    for stemmer in (False, True):
        latin, wide = (RougeSettings(stemmer, name) for name in ("latin", "unicode"))
        assert score(text, other, settings=latin) == score(text, other, settings=wide)
        # One foreign word takes the other path through the tokenizer and must change nothing else.
        longer = score(f"{text} \u00fc", f"{other} \u00fc", settings=wide)
        assert longer["rouge1"] > score(text, other, settings=wide)["rouge1"]
    assert unicode_words("Na\u00efve e\u0301t\u00e9") == ["na\u00efve", "\u00e9t\u00e9"]
    assert unicode_words(f"GPT{CHINESE[:2]}x") == ["gpt", *CHINESE[:2], "x"]
    assert [len(word) for word in unicode_words(THAI)] == [2, 1, 3]


def test_E04_empty_answers_score_zero_and_rows_without_reference_do_not_count():
    answers = ["", "!!!", None, "a fox", "a fox", "a fox"]
    references = [["a fox"], ["a fox"], ["a fox"], [], ["", None, "--"], ["", "a fox"]]
    found = rouge_scores(answers, references)
    assert [None if row is None else row["rougeL"] for row in found] == [0, 0, 0, None, None, 1]
    assert rouge_means(found) == dict.fromkeys(ROUGE, 0.25)
    assert rouge_means(rouge_scores(["a"], [[]])) == dict.fromkeys(ROUGE)


def test_E12_the_same_text_scores_the_same_and_the_interval_is_seeded():
    answers, references = ["a b c", "b c", "x"], [["a c"], ["b c"], ["y"]]
    first = rouge_scores(answers, references)
    np.random.seed(1)
    assert rouge_scores(answers, references) == first
    values = np.random.default_rng(0).random(200).tolist()
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)
    mean, error = np.mean(values), np.std(values) / 200**0.5
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.3 * error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("This package holds a tool. It is small.", "This package holds a tool."),
        ("A tool, e.g. For Debian 12. Second one.", "A tool, e.g. For Debian 12."),
        ("Version 2.0 is out! Really.", "Version 2.0 is out!"),
        ("Title without a stop\n\nThe text.", "Title without a stop"),
        ("One line\nand the next. End.", "One line and the next."),
        ("It ends (here.) Next.", "It ends (here.)"),
        (f"{CHINESE}\u3002{CHINESE}\u3002", f"{CHINESE}\u3002"),
        ("no end", "no end"),
        ("  \n", ""),
        ("", ""),
    ],
)
def test_first_sentence(text, expected):
    assert first_sentence(text) == expected
    joined = re.sub(r"\s", "", "".join(sentences(text)))
    assert joined == re.sub(r"\s", "", text)
