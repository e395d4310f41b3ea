"""Answers end where the checkpoint says: in a run's answers, its labels, and the student that it saves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from flexkd.errors import UnsupportedModelError
from flexkd.evaluate.generation import GenerationSettings, generate_answers
from flexkd.evaluate.stopping import ends_of, model_ends, source_ends
from flexkd.models.loading.language import load_language_model, take_special_tokens
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.start import start_student
from flexkd.preflight import preflight
from flexkd.tasks.generation import GenerationTask
from tests.evaluate.language import language_model, word_tokenizer
from tests.job_files import text_job
from tests.tiny import tiny_model

PLAIN: dict[str, Any] = {"teacher__fine_tune": None, "training__precision": "float32", "teacher__precision": "float32"}


def set_json(file: Path, **entries: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**content, **entries}), encoding="utf-8")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))


def answers_of(job: Job, model: Any) -> list[Any]:
    task = job.task
    assert isinstance(task, GenerationTask)
    _, prompts = task.questions("test", job.encoded.ids("test")[:4])
    return generate_answers(model, job.tokenizer, prompts, task.settings, stop_ids=task.stop_ids(model))


def test_R04_answers_end_at_each_end_of_the_checkpoint_and_the_student_inherits_them(tmp_path: Path) -> None:
    recipe = text_job(tmp_path, **PLAIN, student__basis="coordinates")
    file = tmp_path / "teacher" / "generation_config.json"
    job = prepare(recipe)
    before = answers_of(job, job.teacher)
    end = job.tokenizer.eos_token_id
    assert job.task.stop_ids(job.teacher) == [end]  # type: ignore[attr-defined]
    longest = max(before, key=lambda answer: len(answer.text.split()))
    assert longest.is_cut
    word = longest.text.split()[0]
    other = job.tokenizer.convert_tokens_to_ids(word)
    set_json(file, eos_token_id=[end, other], _from_model_config=False)
    job = prepare(recipe)
    after = {answer.id: answer for answer in answers_of(job, job.teacher)}
    assert (after[longest.id].text, after[longest.id].num_tokens, after[longest.id].is_cut) == ("", 0, False)
    assert any(f"{other} ('{word}') is an ordinary token" in note for note in job.notes)
    # Rows still teach the tokenizer's end, and the student that is saved stops at both.
    assert all(row["labels"][-1] == end for row in job.encoded.splits["train"])
    start = start_student(job, recipe, torch.arange(16))
    start.student.save_pretrained(tmp_path / "student")
    saved = json.loads((tmp_path / "student" / "generation_config.json").read_text(encoding="utf-8"))
    assert saved["eos_token_id"] == [end, other]
    decoding = job.task.decoding_of(start.student)  # type: ignore[attr-defined]
    assert decoding["stop_ids"] == [end, other]


def test_R04_a_fresh_student_begins_and_ends_as_its_teacher_does() -> None:
    teacher = tiny_model("llama", "causal")
    teacher.generation_config.eos_token_id = [2, 7]
    student = tiny_model("gpt2", "causal", eos_token_id=50, bos_token_id=51, pad_token_id=52)
    take_special_tokens(student, teacher)
    config = student.config
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (2, 1, 0)
    assert model_ends(student).ids == (2, 7)


def test_R04_a_student_by_name_ends_where_it_or_its_teacher_does(tmp_path: Path) -> None:
    recipe = text_job(tmp_path, **PLAIN)
    job = prepare(recipe)
    job.teacher.generation_config.eos_token_id = [2, 7]
    student = tiny_model("llama", "causal", seed=5)
    student.generation_config = GenerationConfig(eos_token_id=[9, 8])
    job.task.loader.make_ready(student, job.teacher)
    assert student.generation_config.eos_token_id == [2, 9, 8, 7]


def test_R04_ends_of_a_model_and_of_its_folder_are_the_same(tmp_path: Path) -> None:
    model = tiny_model("llama", "causal")
    for ends in ([2, 7], 7, None):
        model.generation_config.eos_token_id = ends
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert model_ends(loaded) == source_ends(str(tmp_path), where="teacher.model")
        assert ends_of(loaded, word_tokenizer(), "w2").ids == ((2, 7) if ends is not None else (2,))
    (tmp_path / "generation_config.json").unlink()
    set_json(tmp_path / "config.json", eos_token_id=[5, 2])
    assert source_ends(str(tmp_path), where="teacher.model").ids == (5, 2)
    assert AutoConfig.from_pretrained(tmp_path).eos_token_id == [5, 2]


@pytest.mark.parametrize("pad", [-1, 10_000])
def test_R04_a_pad_id_that_is_no_token_pads_with_an_end(pad: int) -> None:
    model = language_model("llama")
    rows = [{"id": name, "input_ids": ids} for name, ids in (("a", [5, 6, 7]), ("b", [9]))]
    settings = GenerationSettings(max_new_tokens=3)
    before = model.config.pad_token_id
    first = generate_answers(model, word_tokenizer(), rows, settings, stop_ids=[2])
    model.config.pad_token_id = pad
    try:
        assert generate_answers(model, word_tokenizer(), rows, settings, stop_ids=[2]) == first
    finally:
        model.config.pad_token_id = before


def test_R04_a_tokenizer_without_an_end_of_text_takes_that_of_the_checkpoint(tmp_path: Path) -> None:
    recipe = text_job(tmp_path, **PLAIN)
    settings = json.loads((tmp_path / "teacher" / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["eos_token"]
    (tmp_path / "teacher" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    special = tmp_path / "teacher" / "special_tokens_map.json"
    special.unlink(missing_ok=True)
    set_json(tmp_path / "teacher" / "generation_config.json", eos_token_id=2, _from_model_config=False)
    assert prepare(recipe).tokenizer.eos_token_id == 2


def test_R04_check_and_run_refuse_an_end_that_is_no_number(tmp_path: Path) -> None:
    recipe = text_job(tmp_path, **PLAIN)
    set_json(tmp_path / "teacher" / "generation_config.json", eos_token_id=["[EOS]"])
    (problem,) = preflight(recipe).problems
    assert problem == (
        "teacher.model: generation_config.eos_token_id: ['[EOS]'] are no token ids. Give the number of a token, or a "
        "list."
    )
    with pytest.raises(UnsupportedModelError):
        prepare(recipe)


def test_R04_a_generation_config_that_is_not_json_is_not_passed_over(tmp_path: Path) -> None:
    recipe = text_job(tmp_path, **PLAIN)
    (tmp_path / "teacher" / "generation_config.json").write_text("{eos: 2}", encoding="utf-8")
    (problem,) = preflight(recipe).problems
    assert "generation_config.json is not JSON" in problem
    (tmp_path / "teacher" / "generation_config.json").unlink()
    assert preflight(recipe).problems == []


def test_R04_a_decoder_starts_with_the_token_that_the_checkpoint_names_anywhere(tmp_path: Path) -> None:
    model = tiny_model("t5", "seq2seq")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["decoder_start_token_id"]
    file.write_text(json.dumps(content), encoding="utf-8")
    said = tmp_path / "generation_config.json"
    said.write_text(json.dumps({"decoder_start_token_id": 3, "eos_token_id": 2}), encoding="utf-8")
    assert load_language_model(str(tmp_path)).config.decoder_start_token_id == 3
    take_special_tokens(fresh := tiny_model("t5", "seq2seq", decoder_start_token_id=None), model)
    assert fresh.config.decoder_start_token_id == 0


def test_R04_a_run_refuses_a_decoder_without_a_start_before_it_trains(tmp_path: Path) -> None:
    recipe = text_job(tmp_path, "t5", student__basis="coordinates")
    for name in ("config.json", "generation_config.json"):
        file = tmp_path / "teacher" / name
        content = json.loads(file.read_text(encoding="utf-8"))
        content.pop("decoder_start_token_id", None)
        file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="its config names no decoder_start_token_id"):
        prepare(recipe)
