"""Answers hang on the model, the prompt and the settings, and on nothing else."""

import copy
import dataclasses
import re

import pytest
import torch
from transformers import GenerationConfig

from flexkd.errors import RecipeError, UnsupportedModelError
from flexkd.evaluate.generation import (
    Answer,
    GenerationSettings,
    effective_settings,
    generate_answers,
    iterate_answers,
    saved_settings,
)
from flexkd.evaluate.sampling import token_sampler
from tests.evaluate.language import STOP, language_model, prompts, word_tokenizer

LENGTHS = (3, 9, 5, 12, 7)
GREEDY = GenerationSettings(max_new_tokens=6)
DRAWN = GenerationSettings(max_new_tokens=6, do_sample=True, temperature=0.9, top_p=0.95, top_k=20)


def answers(model, settings=GREEDY, rows=None, stop_ids=(STOP,), **options) -> list[Answer]:
    rows = prompts(*LENGTHS) if rows is None else rows
    return generate_answers(model, word_tokenizer(), rows, settings, stop_ids=stop_ids, **options)


def step_by_step(model, ids: list[int], count: int) -> list[int]:
    """Greedy decoding of one prompt without a cache, without padding and without `generate`."""
    encoder_decoder = model.config.is_encoder_decoder
    said = [model.config.decoder_start_token_id] if encoder_decoder else []
    with torch.no_grad():
        for _ in range(count):
            if encoder_decoder:
                logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([said])).logits
            else:
                logits = model(input_ids=torch.tensor([ids + said])).logits
            said.append(int(logits[0, -1].argmax()))
    return said[1:] if encoder_decoder else said


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "t5", "bart"])
def test_E06_a_padded_batch_answers_like_each_prompt_alone(model_type):
    model, rows = language_model(model_type), prompts(*LENGTHS)
    together = answers(model)
    assert [answer.id for answer in together] == ["a", "b", "c", "d", "e"]
    for answer, row in zip(together, rows, strict=True):
        said = step_by_step(model, row["input_ids"], 6)
        end = said.index(STOP) if STOP in said else len(said)
        words = [f"w{token}" for token in said[:end] if token > 3]
        assert answer == Answer(row["id"], " ".join(words), end, STOP not in said)
    assert len({answer.text for answer in together}) > 1, "the prompts must matter"


@pytest.mark.parametrize("model_type", ["llama", "t5"])
@pytest.mark.parametrize("settings", [DRAWN, GenerationSettings(max_new_tokens=6, num_beams=3)])
def test_E12_batch_size_and_order_change_no_answer(model_type, settings):
    model, rows = language_model(model_type), prompts(*LENGTHS)
    one_by_one = dataclasses.replace(settings, batch_size=1)
    assert answers(model, settings) == answers(model, one_by_one, rows[::-1])[::-1]


def test_E12_a_seed_gives_the_same_draws_and_another_seed_others():
    model = language_model("llama")
    first = answers(model, DRAWN)
    torch.manual_seed(17)
    assert answers(model, DRAWN) == first
    assert answers(model, DRAWN, seed=1) != first
    assert answers(model) != first


def test_draws_follow_the_distribution():
    count, logits = 4000, torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    scores = logits.expand(count, 5)
    for processor in token_sampler(0, [str(index) for index in range(count)], temperature=2.0, top_k=4):
        scores = processor(torch.zeros(count, 1, dtype=torch.long), scores)
    shares = torch.bincount(scores.argmax(1), minlength=5) / count
    expected = (logits / 2).masked_fill(torch.tensor([False, False, False, True, False]), -torch.inf).softmax(0)
    assert shares[3] == 0
    # Four standard deviations of a share of 4000 draws.
    torch.testing.assert_close(shares, expected, rtol=0, atol=4 * 0.5 / count**0.5)


def test_E06_defaults_of_a_checkpoint_do_not_leak():
    model = copy.deepcopy(language_model("llama"))
    expected = answers(model)
    assert any(len(set(answer.text.split())) < len(answer.text.split()) for answer in expected), "nothing repeats"
    own = GenerationConfig(
        max_length=20, no_repeat_ngram_size=1, repetition_penalty=5.0, num_beams=2, do_sample=True, top_k=2,
        suppress_tokens=[5, 6], eos_token_id=[5, 6],
    )  # fmt: skip
    model.generation_config = own
    assert answers(model) == expected
    assert model.generation_config is own
    found = effective_settings(model, GREEDY, [STOP])
    assert (found["max_new_tokens"], found["no_repeat_ngram_size"], found["repetition_penalty"]) == (6, 0, 1.0)
    assert "temperature" not in found
    assert found["not_used"] == {
        "max_length": 20, "no_repeat_ngram_size": 1, "repetition_penalty": 5.0, "num_beams": 2, "do_sample": True,
        "top_k": 2, "suppress_tokens": [5, 6],
    }  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "bart"])
def test_E06_a_saved_student_decodes_as_it_was_judged(tmp_path, model_type):
    model = copy.deepcopy(language_model(model_type))
    settings = GenerationSettings(max_new_tokens=6, no_repeat_ngram_size=1)
    model.generation_config.no_repeat_ngram_size = 3
    (row,) = prompts(9)
    (judged,) = answers(model, settings, [row], [60])
    model.generation_config = saved_settings(model, settings, [60])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    said = loaded.generate(torch.tensor([row["input_ids"]]))[0, 1 if model_type == "bart" else 9 :]
    assert word_tokenizer().decode(said, skip_special_tokens=True) == judged.text
    drawn = saved_settings(model, DRAWN, [60])
    assert (drawn.do_sample, drawn.temperature, drawn.top_p, drawn.top_k) == (True, 0.9, 0.95, 20)


def test_E06_settings_of_the_run_are_used():
    model, rows = language_model("gpt2"), prompts(9)
    plain = answers(model, rows=rows)[0].text.split()
    assert len(set(plain)) < len(plain), "nothing repeats"
    once = answers(model, GenerationSettings(max_new_tokens=6, no_repeat_ngram_size=1), rows)[0].text.split()
    assert len(set(once)) == len(once) == 6
    assert answers(model, GenerationSettings(max_new_tokens=6, repetition_penalty=50.0), rows)[0].text.split() == once


def test_a_decoder_starts_as_its_architecture_does_and_no_forced_end_hides_a_cut():
    model = copy.deepcopy(language_model("bart"))
    model.generation_config.forced_bos_token_id = 1
    assert model.generation_config.forced_eos_token_id == STOP
    found = answers(model, stop_ids=[60])
    assert all(answer.is_cut for answer in found)
    # The forced start is one of the six new tokens, and no word of the answer.
    assert {answer.num_tokens for answer in found} == {5}
    settings = effective_settings(model, GREEDY, [60])
    assert (settings["decoder_start_token_id"], settings["forced_bos_token_id"]) == (STOP, 1)
    assert settings["not_used"] == {"forced_eos_token_id": STOP}
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(UnsupportedModelError, match="names no decoder_start_token_id"):
        answers(model)


def test_E10_an_answer_is_cut_unless_a_stop_token_ends_it():
    model, rows = language_model("gpt2"), prompts(9)
    (full,) = answers(model, rows=rows)
    assert (full.is_cut, full.num_tokens) == (True, 6)
    last = int(full.text.split()[-1][1:])
    at = [word == f"w{last}" for word in full.text.split()].index(True)
    (stopped,) = answers(model, rows=rows, stop_ids=[STOP, last])
    assert stopped == Answer("a", " ".join(full.text.split()[:at]), at, False)


def test_batches_come_longest_first_and_leave_the_model_as_it_was():
    model = copy.deepcopy(language_model("llama"))
    model.train()
    model.lm_head.eval()
    before = copy.deepcopy(model.config.to_dict())
    settings = dataclasses.replace(GREEDY, batch_size=2)
    found = iterate_answers(model, word_tokenizer(), prompts(*LENGTHS), settings, stop_ids=[STOP])
    ids = []
    for batch in found:
        ids.append("".join(answer.id for answer in batch))
        assert torch.is_grad_enabled()
        assert model.training
        assert not model.lm_head.training
    assert ids == ["db", "ec", "a"]
    assert model.config.to_dict() == before


def test_bfloat16_runs_under_autocast():
    model = language_model("llama")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    answers(model, rows=prompts(4), precision="bfloat16")
    handle.remove()
    assert set(seen) == {torch.bfloat16}


def test_a_prompt_without_room_for_its_answer_is_refused(caplog):
    settings = GenerationSettings(max_new_tokens=30)
    message = "generation.max_new_tokens: the longest prompt has 12 tokens; with 30 new ones that is more than the 40 "
    with pytest.raises(RecipeError, match=re.escape(message)):
        answers(language_model("gpt2"), settings)
    # Rotary positions run past their training, an encoder-decoder's prompt takes none of the answer's room.
    answers(language_model("llama"), settings, prompts(12))
    assert message in caplog.text
    assert len(answers(language_model("bart"), settings, prompts(12))) == 1


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(RecipeError, match=re.escape("generation.do_sample: cannot go with num_beams 2.")):
        GenerationSettings(max_new_tokens=5, do_sample=True, num_beams=2)
    with pytest.raises(RecipeError, match=re.escape("generation.seeds: [0, 1] where do_sample is False.")):
        GenerationSettings(max_new_tokens=5, seeds=(0, 1))


def test_no_prompts_no_answers():
    assert answers(language_model("llama"), rows=[]) == []
