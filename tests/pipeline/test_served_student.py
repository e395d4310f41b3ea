"""What a student is asked in training, in check, in evaluation and from its folder: one prompt on every day."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from flexkd.data.encoding.generation import encode_prompts
from flexkd.errors import FlexKDError
from flexkd.pipeline.job import Job, prepare
from flexkd.preflight import preflight
from tests.job_files import text_job, write_text_tokenizer
from tests.tiny import tiny_model

EXACT = {"teacher__fine_tune": None, "teacher__precision": "float32", "training__precision": "float32"}
THOUGHT = (
    "{{ 'Answer' if strftime_now('%d') == '01' else 'Summary' }} {% for m in messages %}<|{{ m.role }}|> "
    "{% if m.role == 'assistant' %}<think> {% endif %}{{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
NO_ROW = "{{ raise_exception('never') }}"


def recipe_of(folder: Path, template: str, **changes: Any) -> Any:
    recipe = text_job(folder, chat=True, **EXACT, **changes)
    (folder / "teacher" / "chat_template.jinja").write_text(template, encoding="utf-8")
    return recipe


def job_on(day: int, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Job:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Clock":
            return cls(2031, 5, day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return prepare(recipe_of(folder, THOUGHT, **changes))


def test_R03_one_prompt_in_training_check_and_from_the_folder_on_every_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, next_day = (job_on(day, tmp_path, monkeypatch) for day in (1, 2))
    assert job.splits == next_day.splits
    assert job.fingerprints == next_day.fingerprints
    assert job.fingerprints["date"] == "2026-01-01"
    assert "writes '<think> ' before an answer in a conversation and '' as the generation prompt" in " ".join(job.notes)
    checked = preflight(job.recipe)
    assert checked.problems == []
    assert [note for note in checked.notes if "today's date: it always writes 2026-01-01" in note]
    assert not [note for note in job.notes if job.notes.count(note) > 1 or f"data: {note}" in job.notes]

    job.task.loader.make_ready(job.teacher, job.teacher)
    job.tokenizer.save_pretrained(tmp_path / "student")
    served = AutoTokenizer.from_pretrained(tmp_path / "student")
    for example, row in zip(job.data.test, job.splits["test"], strict=True):
        turn = {"role": "user", "content": f"Summarize the following text.\n\n{example.document}"}  # type: ignore[union-attr]
        ids = served.apply_chat_template([turn], add_generation_prompt=True)["input_ids"]
        assert row["input_ids"][: len(ids)] == ids
        assert row["labels"].count(-100) == len(ids)

    other = job_on(1, tmp_path, monkeypatch, data__date="2027-01-30")
    assert other.splits != job.splits
    assert {key for key in job.fingerprints if other.fingerprints[key] != job.fingerprints[key]} == {
        "chat_template",
        "date",
    }


def test_R03_check_refuses_a_template_in_the_words_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, NO_ROW)
    (problem,) = preflight(recipe).problems
    assert problem.startswith("data: the chat template of teacher writes none of 80 rows. The first, ")
    assert "it refuses the turns user (never). Set data.chat: never" in problem
    monkeypatch.setattr("flexkd.preflight.checking.CHECKS", ())
    with pytest.raises(FlexKDError) as caught:
        prepare(recipe)
    assert str(caught.value) == problem
    assert preflight(recipe_of(tmp_path, NO_ROW, data__chat="never")).problems == []


@pytest.mark.parametrize("stored", ["file", "named", "string"])
def test_R03_check_reads_a_template_wherever_it_is_stored(tmp_path: Path, stored: str) -> None:
    recipe = text_job(tmp_path, chat=True, **EXACT)
    folder = tmp_path / "teacher"
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if stored == "file":
        (folder / "chat_template.jinja").write_text(NO_ROW, encoding="utf-8")
    elif stored == "named":
        settings["chat_template"] = [{"name": "default", "template": NO_ROW}, {"name": "tool_use", "template": ""}]
    else:
        settings["chat_template"] = NO_ROW
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (problem,) = preflight(recipe).problems
    assert "writes none of 80 rows" in problem


def test_R03_a_tokenizer_that_was_never_fetched_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = text_job(tmp_path, **EXACT, data__chat="always")
    assert "no chat template" in preflight(recipe).problems[0]
    (tmp_path / "snapshots" / "a1b2").mkdir(parents=True)
    monkeypatch.setattr("flexkd.preflight.generation.tokenizer_folder", lambda *_: tmp_path / "snapshots" / "a1b2")
    assert preflight(recipe).problems == []


def test_R03_any_other_model_is_asked_with_its_own_template(tmp_path: Path) -> None:
    job = prepare(text_job(tmp_path, chat=True, **EXACT))
    write_text_tokenizer(tmp_path / "other", chat=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.chat_template = "{% for m in messages %}Instruction : {{ m.content }} Answer : {% endfor %}"
    other = job.for_model(tiny_model("llama", "causal", seed=1), tokenizer)
    prompt = tokenizer.decode(other.splits["test"][0]["input_ids"])
    assert prompt.startswith("Instruction : Summarize the following")
    assert job.task is not other.task
    questions, prompts = other.task.questions("test", other.encoded.ids("test")[:1])  # type: ignore[attr-defined]
    assert questions[0].prompt.startswith("Instruction : Summarize")
    assert (
        encode_prompts(job.data.test[:1], tokenizer, other.task.format, max_length=32, max_answer_length=6).rows
        == prompts
    )  # type: ignore[attr-defined, arg-type]
    # A model of the same words without a template is asked as the run asks.
    tokenizer.chat_template = None
    assert job.for_model(tiny_model("llama", "causal", seed=1), tokenizer).splits["test"] == job.splits["test"]
