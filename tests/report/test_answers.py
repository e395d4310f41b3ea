"""A run of language models as page, card and terminal show it: answers as they are, decoding, plain code that runs."""

import contextlib
import dataclasses
import io

import pytest
import yaml
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from flexkd.record import GenerationRecord
from flexkd.report.answers import decoding_text, example_prompt, generation_facts
from flexkd.report.card import model_card
from flexkd.terminal import print_summary
from tests.evaluate.language import language_model
from tests.report.records import PLANTS, generation_record, run_record
from tests.report.test_card import blocks, header
from tests.report.test_page import Page, assert_sound, page_of

RECORD = generation_record()
assert RECORD.generation is not None
GENERATION: GenerationRecord = RECORD.generation


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    return page_of(tmp_path_factory.mktemp("page"), RECORD)


def test_E10_the_page_shows_answers_as_they_are_beside_the_first_sentence(page):
    assert_sound(page)
    assert page.words("h2")[3] == "What they answer"
    assert "Row by row" not in page.body
    rows = page.words("tr")
    assert "model rougeL nll \u2193 perplexity \u2193 token agreement kl \u2193 cut share \u2193" in rows
    assert "student after student-name 0.360 2.300 10.000 0.710 0.400 0.030" in rows
    assert "baseline first sentence 0.276 n/a n/a n/a n/a n/a" in rows
    assert sum(row.startswith("baseline") for row in rows) == 1, "a rule costs nothing and is in no table of costs"
    said = list(zip(page.words("dt"), page.words("dd"), strict=True))
    assert said[:4] == [
        ("reference", "command line music player"),
        ("reference", PLANTS[1]),
        ("teacher rougeL 0.440", "plays music from the command line"),
        ("student before rougeL 0.000", "the the the (cut at the limit)"),
    ]
    assert said[-1] == ("student after", "(nothing)")
    assert "Metrics on 200 of the 859 rows of the test split." in page.body
    assert "An example is a prompt answered with exactly 24 new tokens." in page.body
    assert "labels" not in page.words("th")


def test_E06_the_page_states_how_all_were_decoded_and_what_was_not_used(page):
    rows = page.words("tr")
    assert "decoding, of every model greedy, at most 32 new tokens" in rows
    assert "defaults of checkpoints that were not used teacher: no repeat ngram size 6" in rows
    assert "ROUGE F1, with Porter's stemmer, tokenizer latin" in rows
    assert 'prompt plain text: "{document}\\n\\nSummary:\\n"' in rows


def test_charts_hold_a_rule_as_a_level_and_fall_back_to_nll(page, tmp_path):
    words = page.words("text")
    assert words.count("first sentence 0.276") == 2
    assert "best 2.250 at step 75" in words
    empty = page_of(tmp_path, generation_record(evaluations=[], answers=[], history=[], scores=[]))
    assert "Validation rougeL while training: left out, the run was evaluated fewer than twice." in empty.words("p")
    assert "Answers: left out, the record holds none." in empty.words("p")


def test_models_that_were_decoded_unequally_are_told_apart():
    decoding = {role: {"max_new_tokens": 8, "num_beams": beams} for role, beams in (("teacher", 4), ("student", 1))}
    facts = dict(generation_facts(dataclasses.replace(GENERATION, decoding=decoding, stemmer=False, is_chat=True)))
    assert facts["decoding, teacher"] == "4 beams, at most 8 new tokens"
    assert facts["decoding, student after"] == "greedy, at most 8 new tokens"
    assert facts["ROUGE"] == "F1, without a stemmer, tokenizer latin"
    assert facts["prompt"].startswith("the user's turn of the chat template: ")
    drawn = {"do_sample": True, "max_new_tokens": 8, "temperature": 0.7, "seeds": [0, 1], "repetition_penalty": 1.2}
    assert (
        decoding_text(drawn)
        == "sampling with seeds 0, 1, at most 8 new tokens, temperature 0.7, repetition penalty 1.2"
    )


def test_a_prompt_is_shown_as_the_run_wrote_it():
    assert example_prompt(GENERATION) == "A long text.\n\nSummary:\n"
    layout = "Instruction:\n{prompt}\n\nInput:\n{context}\n\nAnswer:\n"
    assert (
        example_prompt(dataclasses.replace(GENERATION, layout=layout))
        == "Instruction:\nName three colours.\n\nAnswer:\n"
    )


TEMPLATE = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}<assistant>"


def save_student(folder, model_type: str) -> None:
    model = language_model(model_type)
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "Name", "three", "colours", "A", "long", "text"]
    words += [f"w{index}" for index in range(len(words), model.config.vocab_size)]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.decoder = decoders.WordPiece()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "model_type", "is_chat"), [("causal", "llama", False), ("causal", "llama", True), ("seq2seq", "t5", False)]
)
def test_three_lines_of_the_card_run_with_plain_transformers(tmp_path, monkeypatch, kind, model_type, is_chat):
    save_student(tmp_path, model_type)
    monkeypatch.chdir(tmp_path)
    record = generation_record(
        generation=dataclasses.replace(GENERATION, kind=kind, is_chat=is_chat, max_new_tokens=5, layout="{prompt}")
    )
    card = model_card(record)
    lines = blocks(card)["python"].splitlines()
    assert len(lines) == 3
    assert ('"role": "user"' in lines[2]) == is_chat
    assert ("do_sample=False" in lines[2]) == (kind == "causal")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec("\n".join(lines), {})
    words = said.getvalue().split()
    assert 1 <= len(words) <= 5
    assert "Name" not in words, "the prompt is not part of the answer"


def test_the_card_says_what_the_student_writes_and_how():
    card = model_card(RECORD)
    assert header(card)["pipeline_tag"] == "text-generation"
    assert header(card)["metrics"] == ["rouge"]
    assert "A small language model, 3 layers with hidden size 192" in card
    assert "It writes the summary of a text." in card
    assert "- decoding, of every model: greedy, at most 32 new tokens" in card
    assert "| baseline first sentence | 0.2760 | n/a | n/a | n/a | n/a | n/a | - | - | - | - | - | - |" in card
    assert "What it writes can be false" in card
    assert "confidence" not in card
    assert yaml.safe_load(blocks(card)["yaml"]) == RECORD.recipe
    for task, tag in (("summarization", "summarization"), ("instruction", "text-generation")):
        seq2seq = generation_record(task=task, generation=dataclasses.replace(GENERATION, kind="seq2seq"))
        assert header(model_card(seq2seq))["pipeline_tag"] == tag
    assert header(model_card(run_record()))["pipeline_tag"] == "text-classification"


def test_the_terminal_shows_quality_cost_and_answers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_summary(RECORD)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model", "rougeL", "nll", "agreement", "parameters", "(MB)", "examples/s", "(MB)"] in lines
    assert ["student", "0.3600", "2.3000", "0.7100", "5,000,000", "20.0", "2,500.0", "20.0"] in lines
    assert ["first", "sentence", "0.2760", *"------"] in lines
    assert ["student", "before", "the", "the", "the", "(cut)", "[0.00]"] in lines
    assert ["student", "(nothing)"] in lines
    assert lines.count(["prompt", "Another", "one."]) == 1
    long = dataclasses.replace(RECORD.answers[0], prompt=f"start {'x' * 999} end")
    print_summary(generation_record(answers=[long]))
    printed = "".join(capsys.readouterr().out.split())
    assert "startxxx" in printed
    assert "xxx...xxx" in printed
    assert "xxxend" in printed
