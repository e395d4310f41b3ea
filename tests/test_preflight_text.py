"""What is found of a task that writes text before any model is loaded: one clear error each."""

import json
import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexkd.cli import app
from flexkd.errors import RecipeError, VocabularyError
from flexkd.pipeline.job import prepare
from flexkd.preflight import preflight
from flexkd.recipe import Recipe
from flexkd.tasks import language_models
from tests.job_files import text_job

EXACT = {"teacher__fine_tune": None, "teacher__precision": "float32", "training__precision": "float32"}
NO_SHAPE = {"student__hidden_size": None, "student__num_layers": None}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    text_job(folder)
    return folder


def problem_of(recipe: Recipe) -> str:
    result = preflight(recipe)
    assert len(result.problems) == 1, result.problems
    return result.problems[0]


def test_a_text_recipe_that_can_run_has_no_problem_and_brings_its_rows(llama: Path) -> None:
    result = preflight(text_job(llama, **EXACT))
    assert (result.problems, result.notes) == ([], ())
    assert result.data is not None
    assert sum(result.data.num_rows.values()) == 80


def test_a_teacher_without_a_language_head_is_named(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    folder.mkdir()
    for path in (llama / "teacher").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}), encoding="utf-8")
    problem = problem_of(text_job(llama, **EXACT, teacher__model=str(folder)))
    assert problem.startswith("teacher.model: ")
    assert "no language model head (LlamaModel)" in problem


def test_D09_chat_needs_a_template(llama: Path, tmp_path: Path) -> None:
    assert "data.chat: " in problem_of(text_job(llama, **EXACT, data__chat="always"))
    rows = tmp_path / "messages.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for index in range(20):
            turns = [{"role": "user", "content": f"film {index}"}, {"role": "assistant", "content": "bright"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    changes = {"task__type": "instruction", "data__train": str(rows), "data__messages": "messages"}
    problem = problem_of(text_job(llama, **EXACT, **changes))
    assert problem.startswith("data.messages: ")
    assert "no chat template" in problem
    with_template = tmp_path / "chat"
    with_template.mkdir()
    assert preflight(text_job(with_template, chat=True, **EXACT, **changes)).problems == []


def test_A11_a_t5_is_not_run_in_float16(tmp_path: Path) -> None:
    for where in ("teacher.precision", "training.precision"):
        changes = {**EXACT, where.replace(".", "__"): "float16"}
        problem = problem_of(text_job(tmp_path, "t5", **changes))
        assert problem.startswith(f"{where}: ")
        assert "bfloat16" in problem


def test_a_lens_is_for_decoders(tmp_path: Path) -> None:
    features = {"loss": "distill_lens", "layer_map": {1: 1}}
    problem = problem_of(text_job(tmp_path, "t5", **EXACT, objective__features=features))
    assert problem == (
        "teacher.model: 'distill_lens' reads the states of a block with the norm before the head, and this t5 is no "
        "decoder where that is known. Use another loss, as cka."
    )


def test_D10_rows_without_answers_are_no_rows(llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "empty.jsonl"
    rows.write_text("".join(json.dumps({"document": f"film {n}", "summary": " "}) + "\n" for n in range(20)), "utf-8")
    problem = problem_of(text_job(llama, **EXACT, data__train=str(rows)))
    assert problem.startswith(f"{rows}: 20 of 20 rows have an empty answer")


def test_D17_rows_longer_than_the_positions_are_refused(tmp_path: Path, llama: Path) -> None:
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    start = {"student__start": "pretrained", "student__model": str(llama / "teacher"), **NO_SHAPE}
    problem = problem_of(text_job(gpt2, "gpt2", **EXACT, **start, data__max_length=64))
    assert problem.startswith("data.max_length: 64 tokens are more than the 40 positions of teacher.model")
    rotary = preflight(text_job(llama, **EXACT, data__max_length=64))
    assert rotary.problems == []
    assert any("above the 40 tokens" in note for note in rotary.notes)


def test_A09_a_misspelt_metric_is_answered_with_the_known_ones(llama: Path) -> None:
    with pytest.raises(RecipeError, match=r"task\.metric: .*'rougel'.*rougeL"):
        text_job(llama, task__metric="rougel")


def test_D11_conflicting_tokenizers_are_refused_before_a_model_is_loaded(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    text_job(other, chat=True)
    tokenizer = other / "teacher" / "tokenizer.json"
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words["bright"], words["clever"] = words["clever"], words["bright"]
    tokenizer.write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(language_models, "language_teacher", lambda *_, **__: pytest.fail("loaded"))
    start = {"student__start": "pretrained", "student__model": str(other / "teacher")}
    message = r"disagree on 2 of \d+ tokens \(id \d+, 'bright' vs 'clever'; .*flexkd generate"
    with pytest.raises(VocabularyError, match=message):
        prepare(text_job(llama, **EXACT, **start, **NO_SHAPE))


def test_check_and_generate_of_a_text_recipe_say_what_they_found(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text_job(llama)
    logger = logging.getLogger("flexkd")
    before = list(logger.handlers), logger.level
    options = ["teacher.fine_tune=null", "teacher.precision=float32", f"output={tmp_path}", "generation.batch_size=8"]
    try:
        checked = CliRunner().invoke(app, ["check", str(llama / "text.yaml"), *options])
        answered = CliRunner().invoke(app, ["generate", str(llama / "text.yaml"), *options])
    finally:
        logger.handlers, level = before
        logger.setLevel(level)
    assert (checked.exit_code, answered.exit_code) == (0, 0), checked.output + answered.output
    data = preflight(text_job(llama, **EXACT)).data
    assert data is not None
    for split, count in data.num_rows.items():
        (line,) = [line for line in checked.stdout.splitlines() if line.split()[:1] == [split]]
        assert str(count) in line.split()
    path = tmp_path / "answers.jsonl"
    assert answered.stdout.splitlines() == [f"answers: {path}", f"to train on them: data.teacher_answers={path}"]
    assert len(path.read_text(encoding="utf-8").splitlines()) == data.num_rows["train"] + 1
