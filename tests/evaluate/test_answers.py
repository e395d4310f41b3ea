"""What models said becomes metrics, notes and examples; every number can be recomputed from the file."""

import json
import math
import statistics

import pytest

from flexkd.evaluate.answer_files import write_answers
from flexkd.evaluate.answers import (
    ModelAnswers,
    Question,
    answer_examples,
    answer_notes,
    answer_questions,
    baseline_answers,
    validation_answers,
)
from flexkd.evaluate.generation import Answer, GenerationSettings
from flexkd.evaluate.likelihood import RowLikelihood, likelihoods
from flexkd.evaluate.rouge import RougeSettings, rouge_scores
from flexkd.facts.metrics import LOWER_IS_BETTER, METRIC_NAMES
from tests.evaluate.language import STOP, language_model, prompts, word_tokenizer
from tests.evaluate.stored import stored_answers, stored_metrics
from tests.tiny import tiny_batch

LENGTHS = (3, 9, 5)
DRAWN = GenerationSettings(max_new_tokens=6, do_sample=True, seeds=(3, 4))
WORDS = " ".join(f"w{index}" for index in range(4, 40))
QUESTIONS = [
    Question("a", "prompt a", (WORDS, "w5 w6")),
    Question("b", "prompt \u2028 b", (WORDS[::2],)),
    Question("c", "", ()),
]


def asked(model, **options) -> ModelAnswers:
    return answer_questions(model, word_tokenizer(), QUESTIONS, prompts(*LENGTHS), DRAWN, stop_ids=[STOP], **options)


def said(texts: list[str], *, cut: int = 0, seeds: int = 1) -> ModelAnswers:
    """The same made-up answers for each seed; the first ones are cut."""
    questions = [Question(f"{index}", f"p{index}", ("one two three four",)) for index in range(len(texts))]
    rows = tuple(
        Answer(one.id, text, 4, index < cut) for index, (one, text) in enumerate(zip(questions, texts, strict=True))
    )
    rouge = rouge_scores(texts, [one.references for one in questions])
    return ModelAnswers(dict.fromkeys(range(seeds), rows), dict.fromkeys(range(seeds), rouge), (None,) * len(texts))


@pytest.fixture(scope="module")
def models() -> dict[str, ModelAnswers]:
    """A teacher and a student under the same settings, and a baseline that no model made."""
    teacher, student = language_model("llama"), language_model("gpt2")
    batch = {**tiny_batch(student, rows=2), "example_id": ["b", "a"]}
    return {
        "teacher": asked(teacher, batches=[batch], teacher=teacher),
        "student": asked(student, batches=[batch], teacher=teacher),
        "first sentence": baseline_answers(["w5 w7", "", "w8"], QUESTIONS),
    }


def test_answers_rouge_and_likelihood_of_each_row(models):
    model = language_model("gpt2")
    student = models["student"]
    assert list(student.answers) == list(student.rouge) == [3, 4]
    assert student.answers[3] != student.answers[4]
    assert [answer.id for answer in student.answers[3]] == ["a", "b", "c"]
    batch = {**tiny_batch(model, rows=2), "example_id": ["b", "a"]}
    b, a = likelihoods(model, [batch], teacher=language_model("llama"))
    assert student.likelihood == (a, b, None)
    metrics = student.metrics()
    assert tuple(metrics)[:6] == METRIC_NAMES["generation"][:6]
    assert set(metrics) == {*METRIC_NAMES["generation"], "kl", "cut_share", "answer_tokens"}
    both = [row for seed in (3, 4) for row in student.rouge[seed] if row is not None]
    assert metrics["rouge1"] == pytest.approx(statistics.fmean(row["rouge1"] for row in both))
    assert metrics["nll"] == pytest.approx((a.nll + b.nll) / (a.tokens + b.tokens))
    assert models["teacher"].metrics()["token_agreement"] == 1
    assert set(models["first sentence"].metrics()) == {"rougeL", "rouge1", "rouge2", "rougeLsum"}
    assert {"nll", "perplexity", "kl", "cut_share"} <= LOWER_IS_BETTER


def test_every_reported_number_comes_back_from_the_file(tmp_path, models):
    path = tmp_path / "new" / "predictions.jsonl"
    write_answers(path, QUESTIONS, models)
    assert stored_answers(path) == (QUESTIONS, models)
    assert stored_metrics(path) == {name: model.metrics() for name, model in models.items()}
    # ROUGE does not rest on what was written beside the texts either.
    for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        row = json.loads(line)
        for answer in row["models"]["student"]["answers"].values():
            assert rouge_scores([answer["text"]], [row["references"]])[0] == answer["rouge"]


def test_E13_a_sum_that_is_not_finite_is_null_in_strict_json(tmp_path):
    path = tmp_path / "predictions.jsonl"
    broken = baseline_answers(["one"], [Question("a", "p", ("one",))])
    broken = ModelAnswers(broken.answers, broken.rouge, (RowLikelihood("a", 2, math.inf, 1, math.nan),))
    write_answers(path, [Question("a", "p", ("one",))], {"student": broken})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    row = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert row["models"]["student"]["likelihood"] == {"tokens": 2, "nll": None, "agreements": 1, "kl": None}
    assert stored_metrics(path) == {"student": broken.metrics()}
    assert stored_metrics(path)["student"]["nll"] is None


def test_E10_a_model_whose_answers_are_cut_is_named(caplog):
    model = language_model("gpt2")
    questions = QUESTIONS[:1]
    short = GenerationSettings(max_new_tokens=5)
    found = answer_questions(model, word_tokenizer(), questions, prompts(3), short, stop_ids=[STOP])
    assert found.metrics()["cut_share"] == 1
    assert found.metrics()["answer_tokens"] == 5
    notes = answer_notes(questions, {"student": found, "first sentence": baseline_answers(["w5"], questions)})
    warning = next(note for note in notes if "cut" in note)
    assert warning.startswith("student: the limit of new tokens cut 100.0% of its answers")
    assert warning in caplog.text
    assert sum("cut" in note for note in notes) == 1


def test_E10_one_cut_answer_in_twenty_is_no_warning():
    texts = ["one two three four"] * 20
    questions = [Question(str(index), "", ("one two three four",)) for index in range(20)]
    assert not any("cut" in note for note in answer_notes(questions, {"student": said(texts, cut=1)}))
    assert any("cut 10.0%" in note for note in answer_notes(questions, {"student": said(texts, cut=2)}))


def test_E03_E04_notes_state_what_moves_rouge(models):
    plain = answer_notes(QUESTIONS, models)
    assert "first sentence: 1 of 3 answers hold no word; they score 0." in plain
    assert plain[-1] == "1 of 3 rows have no reference; they are in no ROUGE."
    spread = next(note for note in plain if note.startswith("student: rougeL"))
    assert "over 2 decoding seeds its standard deviation is" in spread
    assert answer_notes(QUESTIONS, models) == plain
    foreign = [Question("a", "", ("\u4eca\u5929",))]
    said_there = {"student_before": baseline_answers(["a"], foreign)}
    first, second = answer_notes(foreign, said_there)
    assert first.startswith("generation.tokenizer: latin drops 100%")
    assert second.startswith("student before: rougeL 0.0000")
    assert answer_notes(foreign, said_there, RougeSettings(tokenizer="unicode")) == [second]


def test_examples_run_from_the_worst_to_the_best_answer():
    texts = ["one two three four", "five", "one two", "one", "one two three", ""]
    questions = [Question(f"{index}", f"p{index}", ("one two three four",)) for index in range(6)]
    models = {"teacher": said(["one"] * 6, seeds=2), "student": said(texts, cut=2)}
    found = answer_examples(questions, models, limit=3)
    assert [one.answers["student"] for one in found] == ["five", "one", "one two three four"]
    assert [one.cut for one in found] == [["student"], [], ["student"]]
    assert found[1].rouge == {"teacher": pytest.approx(0.4), "student": pytest.approx(0.4)}
    assert (found[1].prompt, found[1].references) == ("p3", ["one two three four"])
    assert [one.id for one in answer_examples(questions, models, limit=99)] == ["1", "5", "3", "2", "4", "0"]
    bare = [Question("x", "p", ())]
    (only,) = answer_examples(bare, {"student": baseline_answers(["y"], bare)})
    assert only.rouge == {"student": None}


def test_E06_validation_decodes_as_the_test_does_on_fewer_rows():
    model, settings = language_model("gpt2"), GenerationSettings(max_new_tokens=6)
    options = {"stop_ids": [STOP], "rouge": RougeSettings(stemmer=False)}
    rows, questions = prompts(*LENGTHS), [*QUESTIONS[:2], Question("c", "", (WORDS,))]
    whole = validation_answers(model, word_tokenizer(), questions, rows, settings, **options)[1].metrics()
    assert whole == answer_questions(model, word_tokenizer(), questions, rows, settings, **options).metrics()
    half = validation_answers(model, word_tokenizer(), questions, rows, settings, limit=2, **options)[1].metrics()
    kept = [questions[0], questions[1]]
    assert half == answer_questions(model, word_tokenizer(), kept, rows[:2], settings, **options).metrics()


def test_a_model_that_answers_few_rows_is_judged_on_these_and_says_so(tmp_path):
    """Likelihoods are of all rows; examples are rows that every model answered."""
    student, whole = language_model("gpt2"), asked(language_model("llama"))
    batch = {**tiny_batch(student, rows=2), "example_id": ["b", "a"]}
    few = asked(student, limit=1, batches=[batch])
    every = asked(student, batches=[batch])
    assert few.num_answered == 1
    assert {seed: rows[1:] for seed, rows in few.answers.items()} == {3: (None, None), 4: (None, None)}
    assert few.likelihood == every.likelihood
    for seed, rows in few.rouge.items():
        assert rows == (every.rouge[seed][0], None, None)
    both = [every.rouge[seed][0]["rougeL"] for seed in (3, 4)]
    assert few.metrics()["rougeL"] == pytest.approx(statistics.fmean(both))
    assert few.metrics()["nll"] == every.metrics()["nll"]
    models = {"teacher": whole, "student_before": few, "student": every}
    notes = answer_notes(QUESTIONS, models)
    assert (
        "student before: it answered 1 of the 3 rows, at equal distances, which its ROUGE, its cut answers and their "
        "length are of; its likelihood is of all rows."
    ) in notes
    assert not any(note.startswith("student: it answered") for note in notes)
    assert [example.id for example in answer_examples(QUESTIONS, models)] == ["a"]
    write_answers(tmp_path / "answers.jsonl", QUESTIONS, models)
    assert stored_metrics(tmp_path / "answers.jsonl")["student_before"] == few.metrics()
    assert stored_answers(tmp_path / "answers.jsonl")[1]["student_before"] == few
