"""The page is one sound file with the record's numbers, and text from data stays text."""

import dataclasses
import html.parser
import math
import re
from pathlib import Path
from typing import Any

import pytest

from flexkd.compare_record import CompareCell, Contrast, PairedDifference, RowContrast
from flexkd.evaluate.significance import contrast_notes, seed_notes
from flexkd.record import LatencyRecord, RunRecord, ScoreRecord
from flexkd.report.card import model_card
from flexkd.report.page import write_compare_report, write_report
from flexkd.report.run_charts import score_charts
from flexkd.report.verdicts import compare_verdict, verdict
from flexkd.terminal import print_comparison, print_summary
from tests.report.records import (
    PLANTS,
    compare_record,
    contrasted_record,
    empty_record,
    generation_record,
    judged_record,
    model,
    rivals_record,
    run_record,
)
from tests.test_record import GENERATION

# Five of the seven charts of a page, which take longer than all else, are of these.
NO_CURVES: dict[str, Any] = {"history": [], "evaluations": [], "scores": []}
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """A parsed page: tags that must balance, attributes, the text of it all and of each kind of element."""

    def __init__(self, path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "small":
            self.handle_data(" ")
        if tag not in VOID:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        if tag in ("td", "th", "small", "span", "b"):
            self.handle_data(" ")

    def handle_data(self, data):
        for tag in set(self.open):
            self.text[tag][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def words(self, tag: str) -> list[str]:
        return [" ".join(text.split()) for text in self.text.get(tag, [])]

    @property
    def body(self) -> str:
        return " ".join(self.text["main"][0].split())


def page_of(tmp_path, *records) -> Page:
    write_report(records, tmp_path / "new" / "report.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    return Page(tmp_path / "new" / "report.html")


def assert_sound(page: Page) -> None:
    """One self-contained file: no script, nothing from elsewhere, no id twice."""
    assert page.source.startswith("<!doctype html>")
    assert (page.count("h1"), page.count("main"), page.count("style")) == (1, 1, 1)
    for tag in ("script", "iframe", "object", "embed", "img", "form", "base"):
        assert page.count(tag) == 0, tag
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value in ("data:,",) or value.startswith("#"), f"<{tag} {name}={value}> leaves the file"
    assert "@import" not in page.text["style"][0]
    assert "url(" not in page.text["style"][0]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def timed(record: RunRecord, tokens: int = 0) -> RunRecord:
    """The record with latencies: the teacher takes 40 ms for a row, its students 8."""
    times = {"teacher": LatencyRecord(64, 40.0, 51.25, tokens=tokens, threads=2)}
    fast = LatencyRecord(64, 8.0, 9.5, tokens=tokens, threads=2)
    models = [
        dataclasses.replace(model, latency=times.get(model.role, fast) if model.parameters else None)
        for model in record.models
    ]
    return dataclasses.replace(record, models=models)


def test_latency_stands_beside_speed_on_page_card_and_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    record = timed(run_record(**NO_CURVES))
    page = page_of(tmp_path, record)
    assert_sound(page)
    rows = page.words("tr")
    assert "teacher teacher-name 20M 384 x 6 80.0 MB 100 40.0 / 51.2 400 MB" in rows
    assert "student after student-name 5M 192 x 3 20.0 MB 500 8.00 / 9.50 100 MB" in rows
    sentence = (
        "Latency: one row at a time; median / 95th percentile of 64 test rows in milliseconds, without padding, after "
        "a warm-up, on 2 CPU threads."
    )
    assert any(sentence in text for text in page.words("p"))
    assert page.words("h3")[:3] == ["Quality against size", "Quality against speed", "Quality against latency"]
    assert "accuracy against milliseconds of one row, median. teacher: 0.800 at 40;" in page.source
    card = model_card(record)
    assert "| 20.0 MB | 500 | 8.00 / 9.50 | 100 MB |" in card
    assert sentence in card
    print_summary(record)
    printed = capsys.readouterr().out
    assert sentence in " ".join(printed.split())
    assert ["teacher", "40.0", "51.2"] in [line.split() for line in printed.splitlines()]


def test_latency_of_an_answer_is_told_for_each_token_too(tmp_path, capsys):
    record = timed(generation_record(**NO_CURVES), tokens=16)
    page = page_of(tmp_path, record)
    assert any("40.0 / 51.2 (2.50 a token)" in row for row in page.words("tr"))
    assert any("one prompt at a time, answered with exactly 16 new tokens" in text for text in page.words("p"))
    print_summary(record)
    assert ["teacher", "40.0", "51.2", "2.5"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_rivals_stand_in_tables_charts_and_sentences(tmp_path, capsys):
    record = rivals_record(**NO_CURVES)
    page = page_of(tmp_path, record)
    assert_sound(page)
    rows = page.words("tr")
    assert "teacher in int8 rival 0.790 0.010 0.600" in rows
    assert "small models/small 6M 192 x 3 24.0 MB 400 10.0 / 60.0 110 MB" in rows
    assert "What else could be used" in page.words("h2")
    int8, small = (text for text in page.words("li") if ": linear" in text or ": fine-tuned" in text)
    assert int8 == (
        "teacher in int8: linear layers in int8. It has accuracy 0.790, where the teacher has 0.800 and the student "
        "0.760; 30.0 MB on disk, 1.5x the student's; in batches 0.90x the teacher's speed and 0.18x the student's, one "
        "at a time 0.80x the teacher's speed and 0.16x the student's. On this machine it is slower than the teacher "
        "itself. The student is ahead in size on disk, speed in batches and speed of single rows, and behind in "
        "accuracy."
    )
    assert "slower than the teacher" not in small
    assert small.endswith(
        "The student is ahead in size on disk, speed in batches and speed of single rows, and behind in accuracy."
    )
    # As many parameters as before: the disk shows what int8 saves.
    assert "accuracy against bytes of weights on disk. teacher: 0.800 at 80M;" in page.source
    assert "teacher in int8: 0.790 at 30M; small: 0.770 at 24M" in page.source
    assert "teacher in int8: 0.790 at 50; small: 0.770 at 10" in page.source
    card = model_card(record)
    assert "| rival teacher in int8 | 0.7900 |" in card
    assert "- small: fine-tuned on the labels alone." in card
    print_summary(record)
    assert any(line.split()[:2] == ["small", "0.7700"] for line in capsys.readouterr().out.splitlines())


def test_rivals_of_several_runs_keep_their_names(tmp_path):
    page = page_of(tmp_path, rivals_record(**NO_CURVES), rivals_record(**{"name": "another", **NO_CURVES}))
    assert_sound(page)
    assert page.words("tr").count("rival models/small 0.770") == 1


def test_structure_and_golden_numbers_of_one_run(tmp_path):
    page = page_of(tmp_path, run_record())
    assert_sound(page)
    assert page.words("h1") == ["tiny run"]
    assert page.words("h2") == [
        "Before and after",
        "Notes",
        "Quality against cost",
        "Class by class",
        "Row by row",
        "What was optimized",
        "Which teacher units or directions were chosen",
        "Data",
        "How it was made",
    ]
    assert page.count("svg") == page.count("figure") == 7
    assert (
        "The student keeps 95.0% of the teacher's accuracy (without an interval; 0.760 against 0.800) with 4.0x fewer "
        "parameters and at 5.0x the speed. Before training it stood at 0.500." in page.words("p")
    )
    rows = page.words("tr")
    assert "model accuracy kl \u2193 matthews correlation" in rows
    assert "student after student-name 0.760 0.123 0.520" in rows
    assert "student before student_before-name 0.500 0.700 n/a" in rows
    assert "teacher teacher-name 20M 384 x 6 80.0 MB 100 n/a 400 MB" in rows
    assert "student after student-name 5M 192 x 3 20.0 MB 500 n/a 100 MB" in rows
    assert "train 6,820 train.jsonl" in rows
    assert "rows left out text is empty: 2" in rows
    assert "train.jsonl:311: text is empty" in page.words("li")
    assert "seed 13" in rows
    assert "train student 2 min 51 s" in rows
    assert "newly initialized weights classifier.bias" in rows
    assert run_record().objective in page.words("pre")
    assert "best 0.775 at step 75" in page.words("text")
    assert "2 chosen units" in page.words("text")
    assert "90% of the score is held by 3 of 5 units; 1 are unused." in page.body
    assert "731" in page.body


def test_text_from_data_is_text(tmp_path):
    hostile = run_record(
        name=PLANTS[0],
        notes=PLANTS,
        objective=PLANTS[1],
        recipe={"name": PLANTS[1]},
        environment={PLANTS[0]: PLANTS[1]},
        models=[dataclasses.replace(entry, name=PLANTS[1], role="baseline") for entry in run_record().models],
        new_parameters=[PLANTS[1]],
        data=dataclasses.replace(run_record().data, labels=PLANTS, skipped={PLANTS[0]: 1}, skipped_examples=PLANTS),
    )
    page = page_of(tmp_path, hostile)
    assert_sound(page)
    assert page.words("h1") == [PLANTS[0]]
    assert [" ".join(plant.split()) for plant in PLANTS] == page.words("blockquote")
    assert page.words("li") == [*PLANTS, *PLANTS]
    assert PLANTS[1] in page.words("pre")
    assert "49" not in page.words("blockquote")[2]

    short = dataclasses.replace(hostile, **NO_CURVES)
    several = page_of(tmp_path, short, short)
    assert_sound(several)
    assert several.source.count("<script") == 0


def test_E10_the_yardsticks_stand_beside_the_student(tmp_path):
    models = [*run_record().models, model("baseline", 5_000_000, 480.0, 100_000_000, accuracy=0.72)]
    page = page_of(tmp_path, run_record(models=models, **NO_CURVES))
    names = [row.split(" ")[0] for row in page.words("tr")]
    assert {"teacher", "student", "baseline"} <= set(names)
    assert "baseline-name 0.720" in page.words("text")


def test_E13_undefined_numbers_are_named_not_drawn(tmp_path):
    models = [
        model("teacher", 10, None, None, accuracy=math.nan),
        model("student", 5, None, None, accuracy=None),
    ]
    history = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.9}]
    page = page_of(tmp_path, run_record(models=models, history=history))
    assert_sound(page)
    assert (
        "The accuracy of teacher or student is not defined: the notes or the log say why. "
        "The student comes with 2.0x fewer parameters." in page.words("p")
    )
    assert "teacher teacher-name 10 384 x 6 40 B n/a n/a n/a" in page.words("tr")
    assert (
        "Quality against speed: left out, fewer than two models have both accuracy and examples a second." in page.body
    )
    assert "1 rows with a loss that is not finite are not drawn." in page.body
    assert "nan" not in page.body.replace("fine-tuned", "").lower().split()


def test_directions_of_a_cut_and_what_was_taught_are_named(tmp_path: Path) -> None:
    values = [4.0, 3.0, 2.0, 0.5, 0.5]
    scores = ScoreRecord(-1, "output", "scores", values, [0, 1], 0, 0, 0, "directions", "index", "abc", of="directions")
    no_curves = {**NO_CURVES, "scores": [scores]}
    record = run_record(**no_curves, cut="cut out of the teacher along PCA directions", taught="these, by correlation")
    page = page_of(tmp_path, record)
    sentence = "The student is cut out of the teacher along PCA directions, and was taught these, by correlation."
    assert sentence in page.words("p")
    assert sentence in model_card(record)
    figures = " ".join(page.words("figure"))
    assert "How few directions hold the score: directions of the head's input" in figures
    assert "90% of the score is held by 3 of 5 directions" in figures
    assert "Chosen by scores: variance x function (how much the output depends on it)." in figures
    # Records of earlier versions say nothing about it.
    earlier = run_record(**{**NO_CURVES, "scores": run_record().scores})
    assert "The student is" not in " ".join(page_of(tmp_path, earlier).words("p"))


def test_what_is_missing_is_a_sentence_and_no_empty_chart(tmp_path):
    page = page_of(tmp_path, empty_record())
    assert_sound(page)
    assert page.count("svg") == page.count("figure") == 0
    assert [text for text in page.words("p") if "left out" in text] == [
        "Tables: left out, the record holds no models.",
        "Quality against size: left out, fewer than two models have both accuracy and parameters.",
        "Quality against speed: left out, fewer than two models have both accuracy and examples a second.",
        "Classes: left out, the record does not hold them.",
        "Examples: left out, the record holds none on which the two differ or are wrong.",
        "Loss, term by term: left out, the history holds fewer than two logged steps.",
        "Validation accuracy while training: left out, the run was evaluated fewer than twice.",
        "Scores: left out, this run scored neither units nor directions.",
    ]


def test_the_page_is_a_pure_function_of_the_record(tmp_path):
    record = run_record()
    record.write(tmp_path / "record.json")
    for name, copy in (("a", record), ("b", RunRecord.read(tmp_path / "record.json"))):
        write_report([copy], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_half_a_character_does_not_stop_the_page(tmp_path):
    page = page_of(tmp_path, run_record(notes=["half an emoji \ud83d"], **NO_CURVES))
    assert any(item.startswith("half an emoji") for item in page.words("li"))


@pytest.mark.parametrize(
    ("problem", "note"),
    [
        ("single_label", "Agreement and kl compare with the teacher."),
        ("regression", "Teacher pearson and teacher mse compare with the teacher."),
    ],
)
def test_the_note_names_the_metrics_of_the_problem_that_compare_with_the_teacher(tmp_path, problem, note):
    assert note in page_of(tmp_path, run_record(problem=problem, **NO_CURVES)).body


def test_the_note_names_the_unit_of_a_divergence_between_tokens(tmp_path):
    note = "Token agreement and kl (nats a token) compare with the teacher."
    assert note in page_of(tmp_path, dataclasses.replace(generation_record(), **NO_CURVES)).body


def lower_better(student: float, teacher: float = 0.3) -> RunRecord:
    return run_record(
        metric="mse",
        problem="regression",
        models=[model("teacher", 10, 10.0, 10, mse=teacher), model("student", 10, 5.0, 5, mse=student)],
    )


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (
            lower_better(0.4),
            "The student reaches mse 0.400 against the teacher's 0.300 with as many parameters and at 0.50x the speed.",
        ),
        (
            run_record(
                models=[model("teacher", 10, None, None, accuracy=0.8), model("student", 20, None, None, accuracy=0.9)]
            ),
            "The student keeps 112.5% of the teacher's accuracy (without an interval; 0.900 against 0.800) with 2.0x "
            "as many parameters.",
        ),
        (
            judged_record(models=[model("teacher", 10, None, None, accuracy=0.8), run_record().models[2]]),
            "The student keeps 95% of the teacher's accuracy (95% interval 92% to 98%; 0.760 against 0.800) with "
            "500000x as many parameters.",
        ),
        (
            run_record(
                metric="matthews_correlation",
                models=[
                    model("teacher", 10, 1.0, None, matthews_correlation=-0.1),
                    model("student", 5, 1.0, None, matthews_correlation=0.2),
                ],
            ),
            "The student reaches matthews correlation 0.200 against the teacher's -0.100 with 2.0x fewer parameters "
            "and at 1.0x the speed.",
        ),
        (run_record(models=[run_record().models[0]]), "This record holds no student and teacher to compare."),
    ],
)
def test_the_verdict_fits_the_metric(record, sentence):
    assert str(verdict(record)) == sentence


def test_the_best_evaluation_of_an_error_is_its_lowest(tmp_path):
    evaluations = [{"step": step, "eval_mse": mse} for step, mse in ((1, 0.5), (2, 0.3), (3, 0.4))]
    page = page_of(tmp_path, dataclasses.replace(lower_better(0.4), **{**NO_CURVES, "evaluations": evaluations}))
    assert "best 0.300 at step 2" in page.words("text")
    assert "Down and left is better." in page.body


def text_record(tokenizer: str) -> RunRecord:
    metrics = [model(role, 5_000_000, 500.0, None, rougeL=0.4, nll=2.0) for role in ("teacher", "student")]
    recipe = {"generation": {"stemmer": True, "tokenizer": tokenizer}}
    answers = {"recipe": recipe, "generation": GENERATION}
    return run_record(problem="generation", metric="rougeL", models=metrics, **answers, **NO_CURVES)


def test_R12_a_figure_that_is_not_its_packages_says_so_beside_it(tmp_path, capsys):
    for tokenizer, sentence in (
        ("latin", "ROUGE: F1 of rouge-score, with Porter's stemmer"),
        ("unicode", "rouge-score itself keeps a-z and 0-9 alone; generation.tokenizer: latin gives its figures."),
    ):
        record = text_record(tokenizer)
        write_report([record], tmp_path / "run.html")
        below_the_table = Page(tmp_path / "run.html").body.split("Metrics on 200 of the 859 rows")[1]
        assert sentence in below_the_table.split("Speed and memory")[0]
        assert sentence in model_card(record).replace("\\", "")
        compared = compare_record(problem="generation", metric="rougeL", recipe=record.recipe)
        write_compare_report(compared, tmp_path / "compare.html")
        assert sentence in Page(tmp_path / "compare.html").body
        capsys.readouterr()
        print_summary(record)
        printed = " ".join(capsys.readouterr().out.split())
        assert ("rouge-score itself keeps" in printed) == (tokenizer == "unicode")
    write_report([text_record("latin"), text_record("unicode")], tmp_path / "both.html")
    assert "Their rougeL is NOT measured alike" in Page(tmp_path / "both.html").body


def test_several_runs_stand_side_by_side(tmp_path):
    other = run_record(
        name="tiny run",
        seed=7,
        models=[run_record().models[0], model("student", 2_000_000, 900.0, 50_000_000, accuracy=0.64)],
        objective="loss = 1 * cross_entropy",
        **NO_CURVES,
    )
    page = page_of(tmp_path, run_record(), other)
    assert_sound(page)
    assert page.words("h1") == ["2 runs side by side"]
    assert page.words("h2")[:2] == ["Side by side", "Each run"]
    rows = page.words("tr")
    assert "tiny run #1 loss = 1 * cross_entropy + 4 * forward_kl(temperature=2) 0.760 95.0% 13 3 min 2 s" in rows
    assert "tiny run #2 loss = 1 * cross_entropy 0.640 80.0% 7 3 min 2 s" in rows
    assert "tiny run #2 2M 192 x 3 8.00 MB 900 n/a 50.0 MB" in rows
    assert sum(row.startswith("teacher teacher-name 0.800") for row in rows) == 1 + 2, "once above, once in each run"
    assert {"teacher 0.800", "tiny run #1 0.760", "tiny run #2 0.640"} <= set(page.words("text"))
    assert page.count("details") >= 2
    assert "All runs have the same data." in page.body


def test_runs_that_cannot_be_compared_say_so(tmp_path):
    data = dataclasses.replace(run_record().data, fingerprint="other")
    page = page_of(tmp_path, run_record(**NO_CURVES), dataclasses.replace(lower_better(0.4), data=data, **NO_CURVES))
    assert_sound(page)
    assert "Quality against cost: left out, the runs have different main metrics." in page.body
    assert "The runs do NOT have the same data: compare with care." in page.body


# ---- comparisons


def compared(tmp_path, **changes) -> Page:
    write_compare_report(compare_record(**changes), tmp_path / "compare.html")
    page = Page(tmp_path / "compare.html")
    assert_sound(page)
    return page


def test_a_comparison_shows_every_method_seed_and_difference(tmp_path):
    page = compared(tmp_path, notes=PLANTS, recipe={"a": PLANTS[1]}, environment={"torch": "2"})
    assert page.words("h1") == ["methods of <b>tiny</b>"]
    rows = page.words("tr")
    assert "teacher 0.800" in rows
    assert "plain reference 0.700 0.014 2 90.5 s" in rows
    assert "units 0.760 0.014 +0.060 +0.020 to +0.100 0.03 2 90.5 s" in rows
    assert "units 1 0.770 0.500 91.0 s" in rows
    assert page.count("svg") == 2
    assert page.words("li") == PLANTS
    assert (
        "units has the best mean accuracy of 3 methods over 2 seeds: 0.760 \u00b1 0.014. Its paired difference to "
        "plain is +0.060, 95% interval +0.020 to +0.100, which does not contain 0." in page.words("p")
    )


def test_a_comparison_shows_the_rows_that_methods_repair_and_break(tmp_path, capsys):
    contrast = RowContrast("units", "plain", "accuracy", 859, 61.5, 40.0, 50, 28, 0.0123, 0.025, 0.004, 0.046)
    page = compared(tmp_path, row_contrasts=[contrast])
    assert "contrast repairs breaks p over rows difference 95% interval over rows" in page.words("tr")
    assert "units against plain 61.5 40.0 0.012 +0.025 +0.004 to +0.046" in page.words("tr")
    assert "Repairs and breaks: of 859 test rows" in page.body
    assert "Row by row" not in compared(tmp_path).body
    print_comparison(compare_record(row_contrasts=[contrast]))
    printed = " ".join(capsys.readouterr().out.split())
    assert "rows: accuracy of 859 test rows, with the same seed" in printed
    assert "units against plain 61.5 40.0 0.012 +0.0040 .. +0.0460" in printed


def test_a_comparison_draws_learning_curves_and_says_when_logit_kd_was_reached(tmp_path):
    values = {"logit_kd": (0.5, 0.7), "units": (0.6, 0.8), "cka": (0.4, 0.6)}
    cells = [
        CompareCell(
            method, seed, {"accuracy": 0.7}, 9, [{"step": 10 * (1 + i), "eval_nll": 2 - v} for i, v in enumerate(curve)]
        )
        for method, curve in values.items()
        for seed in (0, 1)
    ]
    paired = [PairedDifference(method, 0.7, 0.0, None, None, None, None) for method in values]
    page = compared(tmp_path, cells=cells, paired=paired, methods=list(values), reference="logit_kd")
    assert "Validation nll while training" in page.words("h3")
    assert {"logit_kd 20 (20 to 20) 20, 20", "units 15 (15 to 15) 15, 15"} <= set(page.words("tr"))
    assert "cka not reached not reached, not reached" in page.words("tr")
    assert "method steps to logit_kd's final nll seed by seed" in page.words("tr")


def differences(**rows: tuple[float | None, ...]) -> list[PairedDifference]:
    return [PairedDifference(method, *values) for method, values in rows.items()]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {
                "paired": differences(
                    plain=(0.7, 0.1, *[None] * 4),
                    logits=(0.74, 0.1, 0.04, -0.01, 0.09, 0.08),
                    units=(0.71, 0.1, 0.01, 0.0, 0.0, 1.0),
                )
            },
            "+0.040, 95% interval -0.010 to +0.090, which contains 0: chance alone may explain it.",
        ),
        (
            {
                "paired": differences(
                    plain=(0.9, 0.1, *[None] * 4), logits=(0.74, 0.1, *[None] * 4), units=(0.7, 0.1, *[None] * 4)
                )
            },
            "of 3 methods over 2 seeds: 0.900 \u00b1 0.100. It is the reference itself.",
        ),
        (
            {"metric": "nll", "teacher": {}},
            "plain has the best mean nll of 3 methods over 2 seeds: 0.700 \u00b1 0.014. It is the reference itself.",
        ),
        (
            {"paired": differences(plain=(None,) * 6, logits=(None,) * 6, units=(None,) * 6)},
            "The accuracy of no method is defined: the notes or the log say why.",
        ),
    ],
)
def test_the_verdict_of_a_comparison_is_careful(changes, sentence):
    assert str(compare_verdict(compare_record(**changes))).endswith(sentence)


def test_contrasts_stand_in_a_table_with_what_they_allow_to_say(tmp_path):
    record = contrasted_record()
    write_compare_report(record, tmp_path / "compare.html")
    page = Page(tmp_path / "compare.html")
    assert_sound(page)
    assert page.words("h2")[:2] == ["Methods", "Contrasts"]
    rows = page.words("tr")
    assert "contrast reading difference 95% interval paired t p exact p Holm p effect size seeds needed" in rows
    assert "units against plain significant +0.060 +0.020 to +0.100 0.003 0.016 0.031 +1.40 7" in rows
    assert "units against logits may be chance +0.020 -0.010 to +0.050 0.2 0.25 0.25 +0.52 32" in rows
    assert "Differences of the contrasts" in page.words("h3")
    assert {"+0.060, p = 0.031", "+0.020, p = 0.25"} <= set(page.words("text"))
    for sentence in contrast_notes(record):
        assert sentence in page.words("p")
    assert str(compare_verdict(record)).endswith("exact p 0.031 after Holm's correction: significant.")


def test_significant_is_said_only_where_the_corrected_exact_test_allows_it(tmp_path, capsys):
    """Of a t-test with p = 0.003 and an interval without 0 it is not said where the seeds are too few."""
    few = contrasted_record(
        seeds=[0, 1, 2],
        smallest_p_value=0.25,
        contrasts=[
            dataclasses.replace(contrast, exact_p_value=0.25, holm_p_value=0.5)
            for contrast in contrasted_record().contrasts
        ],
    )
    undefined = contrasted_record(contrasts=[Contrast("units", "plain"), Contrast("units", "logits")])
    just_above = contrasted_record(
        contrasts=[dataclasses.replace(contrasted_record().contrasts[0], holm_p_value=0.0501)]
    )
    for record, says in ((contrasted_record(), True), (few, False), (undefined, False), (just_above, False)):
        write_compare_report(record, tmp_path / "compare.html")
        print_comparison(record)
        printed = " ".join(capsys.readouterr().out.split())
        page = Page(tmp_path / "compare.html").body
        assert [("significant" in text.lower()) for text in (page, printed)] == [says, says]
        for text in (page, printed):
            assert " ".join(contrast_notes(record)) in text
    assert "Another seed of the 3 methods takes about 5 min, as these did." in contrast_notes(few)[-1]
    assert "The smallest exact p that 3 seeds can give is 0.25" in " ".join(contrast_notes(few))
    assert "with fewer than 7 seeds, chance alone may explain any difference" in " ".join(contrast_notes(few))
    assert str(compare_verdict(few)).endswith("exact p 0.5 after Holm's correction: chance alone may explain it.")


def test_contrasts_that_were_named_after_results_are_called_exploratory(tmp_path, capsys):
    record = contrasted_record(named_after_results=True)
    write_compare_report(record, tmp_path / "compare.html")
    print_comparison(record)
    page = Page(tmp_path / "compare.html")
    assert "units against plain exploratory +0.060 +0.020 to +0.100 0.003 0.016 0.031 +1.40 7" in page.words("tr")
    sentence = "The contrasts were named after results were there: their p values are exploratory and test nothing."
    for text in (page.body, " ".join(capsys.readouterr().out.split())):
        assert sentence in text
        assert "significant" not in text.lower()
    assert str(compare_verdict(record)).endswith("exploratory, for the contrasts were named after results were there.")


def test_a_difference_that_no_contrast_names_is_called_untested():
    contrasts = contrasted_record().contrasts[1:]
    sentence = str(compare_verdict(contrasted_record(contrasts=contrasts)))
    assert sentence.endswith("does not contain 0, but no contrast names it: a difference to test, not a tested one.")


def test_a_comparison_without_numbers_draws_nothing(tmp_path):
    cells = [dataclasses.replace(cell, metrics={"accuracy": None}) for cell in compare_record().cells]
    paired = differences(plain=(None,) * 6, logits=(None,) * 6, units=(None,) * 6)
    page = compared(tmp_path, cells=cells, paired=paired, teacher={"accuracy": None})
    assert page.count("svg") == 0
    assert len(re.findall("left out, no", page.body)) == 3


def test_R13_the_scores_of_two_runs_are_told_apart_by_their_hash():
    (scores,) = run_record().scores
    assert scores.scores_hash == "", "as records of earlier versions have it"
    earlier = score_charts([scores], "")[0].caption
    assert earlier.endswith("Basis units, mapping index, selection abcdef.")
    now = score_charts([dataclasses.replace(scores, scores_hash="0123456789abcdef")], "")[0].caption
    assert now == f"{earlier[:-1]}, scores 0123456789ab."


def test_seeds_that_were_changed_after_results_are_marked(tmp_path, capsys):
    record = contrasted_record(
        seeds=[0, 1, 3, 4, 5, 6, 7],
        late_seeds=[1, 7],
        left_out_seeds=[2],
    )
    write_compare_report(record, tmp_path / "compare.html")
    print_comparison(record)
    page, printed = Page(tmp_path / "compare.html"), " ".join(capsys.readouterr().out.split())
    changed = "seeds 1, 7 added after results and seed 2 left out after results"
    (sentence,) = seed_notes(record)
    assert sentence.startswith(f"With {changed}: whoever chooses seeds by results finds differences too often")
    assert sentence in page.words("p")
    assert sentence in printed
    assert f"accuracy over 7 seeds ({changed}); differences" in printed
    assert any(row.startswith("units against plain significant, seeds changed +0.060") for row in page.words("tr"))
    assert str(compare_verdict(record)).endswith(f"after Holm's correction: significant, with {changed}.")
    rows = page.words("tr")
    assert any(row.startswith("plain 1, added after results 0.710") for row in rows)
    assert any(row.startswith("plain 0 0.690") for row in rows)
    for unchanged in (contrasted_record(), compare_record()):
        write_compare_report(unchanged, tmp_path / "compare.html")
        assert "after results" not in Page(tmp_path / "compare.html").body


def test_changed_seeds_are_marked_without_contrasts_too(tmp_path, capsys):
    record = compare_record(late_seeds=[1])
    write_compare_report(record, tmp_path / "compare.html")
    print_comparison(record)
    for text in (Page(tmp_path / "compare.html").body, " ".join(capsys.readouterr().out.split())):
        assert "With seed 1 added after results: whoever" in text
