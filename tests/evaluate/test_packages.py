"""Figures are those of scikit-learn, scipy and rouge-score for the same arrays and strings, whatever these hold."""

import itertools
import logging
import random
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy import special, stats
from sklearn import metrics as sklearn_metrics

from flexkd.compare_record import CompareCell
from flexkd.evaluate.classification import agreement, classification_metrics
from flexkd.evaluate.likelihood import RowLikelihood, likelihood_metrics
from flexkd.evaluate.rouge import RougeSettings, bootstrap_interval, rouge_scores
from flexkd.facts.metrics import METRIC_NAMES, ROUGE, definitions, deviations
from flexkd.pipeline.compare import paired_differences

EXACT = 1e-12
WORDS = (
    *("the runner", "Running", "RUNS", "e.g.", "U.S.", "3.14", "1,000", "x_y", "don't", "co-op", "I", "a", "$x^2$"),
    *(
        "caf\u00e9",
        "na\u00efve",
        "\u0130stanbul",
        "stra\u00dfe",
        "\u212a",
        "\u4eca\u5929\u5929\u6c14",
        "\u0e27\u0e31\u0e19",
    ),
    *(
        "\u0926\u093f\u0928",
        "\u0645\u0631\u062d",
        "\U0001f600",
        "m\u00b2",
        "\u2460",
        "\ufb01ne",
        "<s>",
        "http://a.b/c?d=1",
    ),
)
JOINTS = (
    " ",
    " ",
    " ",
    "\n",
    "\n\n",
    "\r\n",
    "\n- ",
    "\n* ",
    "\n1. ",
    ". ",
    "! ",
    "? ",
    "\t",
    "\u00a0",
    "\u3002",
    "",
    "\u2028",
    "\x0b",
)
SETTINGS = [RougeSettings(stemmer) for stemmer in (True, False)]


def texts(seed: int, count: int, longest: int = 25) -> list[str]:
    """Awkward texts: newlines, bullets, scripts, punctuation, digits, no capitals; some without a word, some empty."""
    draw = random.Random(seed)
    found = ["", " \n ", "-", "\n- one\n- two\n", "no capitals. none at all\nhere"]
    while len(found) < count:
        parts = (draw.choice(WORDS) + draw.choice(JOINTS) for _ in range(draw.randint(1, longest)))
        found.append("".join(parts))
    return found


def package_rouge(answer: str, references: list[str], settings: RougeSettings) -> dict[str, float]:
    scorer = RougeScorer(list(ROUGE), use_stemmer=settings.stemmer)
    return {name: score.fmeasure for name, score in scorer.score_multi(references, answer).items()}


@pytest.mark.parametrize("settings", SETTINGS)
def test_R12_rouge_is_that_of_its_package_on_any_strings(settings: RougeSettings) -> None:
    answers = texts(1, 80)
    references = [list(pair) for pair in zip(texts(2, 80), texts(3, 80), strict=True)]
    random.Random(4).shuffle(references)
    rows = rouge_scores(answers, references, settings)
    compared = 0
    for answer, pair, row in zip(answers, references, rows, strict=True):
        if row is not None:
            assert row == pytest.approx(package_rouge(answer, pair, settings), abs=EXACT), (answer, pair)
            compared += 1
    assert compared > 70, "rows without any reference are none of the package's zeros"


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("it is small\nit runs fast", "it runs fast\nit is small"),
        ("- one tool\n- two tools", "- two tools\n- one tool"),
        ("First it ran. Then it sat.", "Then it sat. First it ran."),
        ("a b c " * 150, "c b a " * 150),
    ],
)
def test_R12_rouge_lsum_has_the_sentences_of_its_package(answer: str, reference: str) -> None:
    for settings in SETTINGS:
        (row,) = rouge_scores([answer], [[reference]], settings)
        assert row == pytest.approx(package_rouge(answer, [reference], settings), abs=EXACT)


def test_R12_the_unicode_tokenizer_is_the_packages_on_ascii_and_says_elsewhere_that_it_is_not() -> None:
    for answer, reference in itertools.pairwise(text for text in texts(5, 120) if text.isascii()):
        found = [rouge_scores([answer], [[reference]], RougeSettings(True, name)) for name in ("latin", "unicode")]
        assert found[0] == found[1]
    (note,) = deviations("generation", ["rougeL"], {"generation": {"stemmer": False, "tokenizer": "unicode"}})
    assert "words of every script, without a stemmer" in note
    assert "generation.tokenizer: latin gives its figures" in note
    assert deviations("generation", ["rougeL"], {"generation": {"stemmer": True, "tokenizer": "latin"}}) == []


def test_R12_every_metric_has_a_definition() -> None:
    for problem, names in METRIC_NAMES.items():
        for name in names:
            assert definitions(problem, [name], {}) or name == "token_agreement", (problem, name)


def test_R12_the_interval_over_rows_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(0).random(37)
    drawn = stats.bootstrap(
        (values,), np.mean, n_resamples=1000, batch=100, method="percentile", rng=np.random.default_rng(3)
    )
    assert bootstrap_interval(values.tolist(), seed=3) == pytest.approx(tuple(drawn.confidence_interval), abs=EXACT)
    assert bootstrap_interval([0.25]) == (0.25, 0.25)


def awkward_logits(rows: int, classes: int, seed: int) -> torch.Tensor:
    """Rounded so that some tie, some far apart, some as close as float32 has them."""
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)).mul(4).round().div(2)
    logits[0], logits[1] = 0, 80.0
    logits[2, -1] += 1e-30
    logits[3] = torch.linspace(-1, 1, classes) * 1e-30
    return logits


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rows", "classes"), [(40, 2), (40, 5), (6, 9), (5, 2)])
def test_R12_metrics_of_single_labels_are_those_of_scikit_learn(rows: int, classes: int, seed: int) -> None:
    """With classes that no label and no prediction has."""
    logits = awkward_logits(rows, classes, seed)
    labels = torch.randint(max(classes - 1, 1), (rows,), generator=torch.Generator().manual_seed(seed + 50))
    truth, chosen = labels.numpy(), logits.numpy().argmax(-1)
    found = classification_metrics(logits, labels, "single_label")
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, chosen), abs=EXACT)
    assert found["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(truth, chosen, average="macro"), abs=EXACT)
    log_probs = special.log_softmax(logits.double().numpy(), axis=-1)
    assert found["nll"] == pytest.approx(-log_probs[np.arange(rows), truth].mean(), rel=EXACT)
    if len(set(truth)) > 1 and len(set(chosen)) > 1:
        assert found["matthews_correlation"] == pytest.approx(
            sklearn_metrics.matthews_corrcoef(truth, chosen), abs=EXACT
        )
    assert agreement(logits, logits, "single_label")["agreement"] == 1


def test_R12_kl_to_the_teacher_is_scipys_relative_entropy() -> None:
    student, teacher = (awkward_logits(20, 4, seed).clamp(-9, 9) for seed in (1, 2))
    p, q = (special.softmax(one.double().numpy(), axis=-1) for one in (teacher, student))
    expected = special.rel_entr(p, q).sum(-1).mean()
    assert agreement(student, teacher, "single_label")["kl"] == pytest.approx(expected, rel=EXACT)
    p, q = (special.expit(one.double().numpy()) for one in (teacher, student))
    expected = (special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q)).sum(-1).mean()
    # 1 - p has lost four digits where p is 0.9999.
    assert agreement(student, teacher, "multi_label")["kl"] == pytest.approx(expected, rel=1e-10)
    far = agreement(100 * student, 100 * teacher, "single_label")["kl"]
    assert far is not None
    assert np.isfinite(far)


def test_R12_nll_is_log_loss_where_no_probability_is_cut_off() -> None:
    logits, labels = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    expected = sklearn_metrics.log_loss(labels, logits.double().softmax(-1).numpy(), labels=range(4))
    assert classification_metrics(logits, labels, "single_label")["nll"] == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("what", ["label", "prediction"])
def test_R12_a_matthews_correlation_that_the_package_calls_0_is_null_and_the_table_says_so(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    logits, labels = torch.eye(2), torch.tensor([0, 1])
    if what == "label":
        labels = torch.tensor([1, 1])
    else:
        logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert sklearn_metrics.matthews_corrcoef(labels, logits.argmax(-1)) == 0
    assert classification_metrics(logits, labels, "single_label")["matthews_correlation"] is None
    assert f"every {what} is the same" in caplog.text
    (note,) = deviations("single_label", ["matthews_correlation"], {})
    assert "n/a instead of 0" in note


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("labels", [2, 6])
def test_R12_metrics_of_several_labels_are_those_of_scikit_learn(labels: int, seed: int) -> None:
    """Rows with no label and with all, a label that never occurs."""
    logits = awkward_logits(20, labels, seed)
    truth = (torch.rand(20, labels, generator=torch.Generator().manual_seed(seed)) > 0.6).float()
    truth[0], truth[1], truth[:, -1] = 0, 1, 0
    logits[0] = -3
    chosen = (logits > 0).numpy()
    found = classification_metrics(logits, truth, "multi_label")
    for name in ("micro", "macro"):
        expected = sklearn_metrics.f1_score(truth.numpy(), chosen, average=name, zero_division=0)
        assert found[f"{name}_f1"] == pytest.approx(expected, abs=EXACT)
    assert found["subset_accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth.numpy(), chosen), abs=EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_R12_metrics_of_numbers_are_those_of_scipy_and_scikit_learn(seed: int) -> None:
    """With ties, far from zero."""
    draw = np.random.default_rng(seed)
    predicted, truth = draw.integers(0, 6, 40).astype("float32"), draw.integers(0, 6, 40) + 1e4
    found = classification_metrics(torch.tensor(predicted)[:, None], torch.tensor(truth), "regression")
    assert found["pearson"] == pytest.approx(stats.pearsonr(predicted.astype("float64"), truth)[0], abs=EXACT)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predicted, truth)[0], abs=EXACT)
    assert found["mse"] == pytest.approx(sklearn_metrics.mean_squared_error(truth, predicted), rel=EXACT)


def test_R12_a_constant_has_no_correlation_and_the_table_says_so(caplog: pytest.LogCaptureFixture) -> None:
    found = classification_metrics(torch.full((4, 1), 0.1), torch.arange(4.0), "regression")
    assert (found["pearson"], found["spearman"]) == (None, None)
    assert np.isnan(stats.pearsonr([0.1] * 4, range(4))[0])
    assert "the predictions or the labels are constant" in caplog.text
    assert "n/a where predictions or labels are constant" in definitions("regression", ["pearson"], {})[0]


def test_R12_perplexity_weighs_tokens_and_one_that_no_number_holds_says_why(caplog: pytest.LogCaptureFixture) -> None:
    rows = [RowLikelihood("a", 1, 2.0), RowLikelihood("b", 9, 3.0)]
    found = likelihood_metrics(rows)
    assert found == pytest.approx({"nll": 0.5, "perplexity": np.exp(0.5)}, rel=EXACT)
    with caplog.at_level(logging.WARNING):
        assert likelihood_metrics([RowLikelihood("a", 1, 800.0)])["perplexity"] is None
    assert "perplexity is not defined: no number is as large as exp(800)" in caplog.text


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_R12_paired_differences_are_scipys(scale: float) -> None:
    draw = np.random.default_rng(1)
    values = {method: draw.random(4) * scale for method in ("fine_tuning", "flexkd")}
    cells = [CompareCell(m, seed, {"mse": float(x)}, 1.0) for m, row in values.items() for seed, x in enumerate(row)]
    _, found = paired_differences(cells, list(values), range(4), "mse", "fine_tuning")
    test = stats.ttest_rel(values["flexkd"], values["fine_tuning"])
    low, high = test.confidence_interval(0.95)
    assert found.p_value == pytest.approx(test.pvalue, rel=EXACT)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert found.std == pytest.approx(np.std(values["flexkd"], ddof=1), rel=1e-9)
