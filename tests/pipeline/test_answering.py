"""A teacher's answers on disk: whole after any interruption, of one teacher and decoding, and learnt by students."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from flexkd.data.examples.teacher_answers import with_teacher_answers
from flexkd.errors import ArtifactError, RecipeError
from flexkd.models.loading.pretrained import model_fingerprint
from flexkd.pipeline import answering
from flexkd.pipeline import job as job_module
from flexkd.pipeline.answering import answer_training_rows
from flexkd.pipeline.job import prepare
from flexkd.recipe import Recipe, override_recipe
from flexkd.run_files import LOCK_FILE
from tests.job_files import job as classification_job
from tests.job_files import text_job

EXACT = {"teacher__fine_tune": None, "teacher__precision": "float32", "training__precision": "float32"}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("answering")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        # So that a file has several finished batches.
        patch.setattr(answering, "_BATCHES_TOGETHER", 1)
        yield folder


def recipe_of(material: Path, name: str, **changes: Any) -> Recipe:
    return text_job(material, **{**EXACT, "output": str(material / name), "generation__batch_size": 8, **changes})


@pytest.fixture(scope="module")
def whole(material: Path) -> bytes:
    return answer_training_rows(recipe_of(material, "whole")).read_bytes()


def rows_of(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.decode().splitlines()]


def test_every_training_row_is_answered_once_beside_its_reference(material: Path, whole: bytes) -> None:
    head, *rows = rows_of(whole)
    train = {example.id: example.answer for example in prepare(recipe_of(material, "whole")).data.train}
    assert {"teacher", "data", "stop_ids", "max_new_tokens"} <= set(head["made_of"])
    assert {row["id"]: row["reference"] for row in rows} == train
    assert len(rows) == len(train)
    assert any(row["answer"] for row in rows)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.4, 0.97])
def test_K08_a_file_that_a_kill_cut_is_completed_without_a_lost_or_double_row(
    material: Path, whole: bytes, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the midst of a line, and of its first."""
    path = material / f"cut-{kept}" / "answers.jsonl"
    path.parent.mkdir()
    path.write_bytes(whole[: int(len(whole) * kept)])
    finished = max(path.read_bytes().count(b"\n") - 1, 0)
    asked: list[str] = []
    plain = answering.iterate_answers

    def watched(model: Any, tokenizer: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        asked.extend(prompt["id"] for prompt in prompts)
        return plain(model, tokenizer, prompts, *args, **options)

    monkeypatch.setattr(answering, "iterate_answers", watched)
    answer_training_rows(recipe_of(material, path.parent.name))
    rows = rows_of(path.read_bytes())
    assert rows[0] == rows_of(whole)[0]
    assert sorted(rows[1:], key=str) == sorted(rows_of(whole)[1:], key=str)
    assert len(asked) == len(rows) - 1 - finished
    answer_training_rows(recipe_of(material, path.parent.name))
    assert len(asked) == len(rows) - 1 - finished, "a whole file is left alone"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"generation__repetition_penalty": 1.5}, "repetition_penalty"),
        ({"generation__max_new_tokens": 3}, "max_new_tokens"),
        ({"data__template": "{document} Answer :"}, "template"),
        ({"teacher__fine_tune": {"epochs": 1, "evaluations": 1}}, "teacher"),
    ],
)
def test_another_teacher_layout_or_decoding_is_refused(
    material: Path, whole: bytes, changes: dict[str, Any], name: str
) -> None:
    with pytest.raises(ArtifactError, match=f"belongs to another run: .*{name} was"):
        answer_training_rows(recipe_of(material, "whole", **changes))
    assert (material / "whole" / "answers.jsonl").read_bytes() == whole


def test_R09_answers_of_another_engine_are_refused_and_those_of_an_earlier_version_are_said(
    material: Path, whole: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    head, *rest = whole.splitlines(keepends=True)
    stored = json.loads(head)["made_of"]
    assert stored["precision"] == "float32"
    path = material / "engine" / "answers.jsonl"
    path.parent.mkdir()

    def described(made_of: dict[str, Any]) -> None:
        path.write_bytes(json.dumps({"made_of": made_of}).encode() + b"\n" + b"".join(rest))

    described({**stored, "attention": "flex_attention"})
    with pytest.raises(ArtifactError, match="attention was 'flex_attention' and is 'eager' now"):
        answer_training_rows(recipe_of(material, "engine"))
    described({name: value for name, value in stored.items() if name not in ("precision", "attention", "torch")})
    answer_training_rows(recipe_of(material, "engine"))
    assert "its engine was not written down: attention (now 'eager'), precision (now 'float32')" in caplog.text
    data = prepare(recipe_of(material, "engine")).data
    for made_of, said in ((stored, "attention eager"), ({}, "an engine that was not written down")):
        described(made_of)
        assert said in with_teacher_answers(data, str(path)).notes[-1]


def test_K08_a_second_writer_a_double_row_and_a_damaged_line_are_refused(material: Path, whole: bytes) -> None:
    folder = material / "second"
    folder.mkdir()
    path = folder / "answers.jsonl"
    with FileLock(folder / LOCK_FILE), pytest.raises(ArtifactError, match="another process works there"):
        answer_training_rows(recipe_of(material, "second"))
    path.write_bytes(whole + whole.splitlines(keepends=True)[-1])
    with pytest.raises(ArtifactError, match="holds a row twice"):
        answer_training_rows(recipe_of(material, "second"))
    path.write_bytes(whole + b"{broken}\n")
    with pytest.raises(ArtifactError, match="damaged"):
        answer_training_rows(recipe_of(material, "second"))


def test_what_has_no_answers_to_write_is_refused(material: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"task\.type: classification writes no text"):
        answer_training_rows(classification_job(tmp_path, teacher__fine_tune=None))
    with pytest.raises(RecipeError, match=r"data\.teacher_answers: .* are answers already"):
        answer_training_rows(recipe_of(material, "whole", data__teacher_answers="some.jsonl"))


def test_a_student_learns_the_teachers_words_and_is_judged_by_the_references(
    material: Path, whole: bytes, tmp_path: Path
) -> None:
    """Empty and cut answers are left out and counted, and other answers are other data."""
    head, *rows = rows_of(whole)
    for row in rows:
        row |= {"answer": " bright plot", "is_cut": False}
    rows[0]["answer"], rows[1]["is_cut"] = " ", True
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [head, *rows]), encoding="utf-8")
    plain = prepare(recipe_of(material, "taught"))
    ready = prepare(recipe_of(material, "taught", data__teacher_answers=str(path)))
    tokenizer = ready.tokenizer
    learnt = {tokenizer.decode([t for t in row["labels"] if t != -100]) for row in ready.splits["train"]}
    assert learnt == {f"bright plot {tokenizer.eos_token}"}
    assert {row["id"] for row in ready.splits["train"]} == {row["id"] for row in rows[2:]}
    assert ready.splits["test"] == plain.splits["test"]
    assert ready.splits["validation"] == plain.splits["validation"]
    assert any("2 that were empty or cut are left out" in note for note in ready.notes)
    assert ready.fingerprints["data"] != plain.fingerprints["data"]
    assert {k: v for k, v in ready.fingerprints.items() if k != "data"} == {
        k: v for k, v in plain.fingerprints.items() if k != "data"
    }


def test_the_teacher_of_a_student_that_learns_its_answers_is_the_one_that_gave_them(
    material: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuned on its own answers it would be another one."""
    tuned = {"teacher__fine_tune": {"epochs": 1, "evaluations": 1}}
    path = answer_training_rows(recipe_of(material, "tuned", **tuned))
    text = re.sub(rb'"answer": "[^"]*", "is_cut": true', b'"answer": "bright plot", "is_cut": false', path.read_bytes())
    path.write_bytes(text)
    before = model_fingerprint(prepare(recipe_of(material, "tuned", **tuned)).teacher)
    monkeypatch.setattr("flexkd.pipeline.teacher._fine_tune", lambda *_, **__: pytest.fail("fine-tuned again"))
    ready = prepare(recipe_of(material, "tuned", **tuned, data__teacher_answers=str(path)))
    assert model_fingerprint(ready.teacher) == before


def test_a_row_without_an_answer_is_an_error_that_counts_them(
    material: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = whole.splitlines(keepends=True)
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"".join(lines[:-3]))
    monkeypatch.setattr(job_module, "load_tokenizer", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ArtifactError, match=rf"lacks 3 of {len(lines) - 1} training rows .* Run flexkd generate"):
        prepare(recipe_of(material, "lacking", data__teacher_answers=str(path)))
    with pytest.raises(ArtifactError, match="is not there"):
        prepare(recipe_of(material, "lacking", data__teacher_answers=str(tmp_path / "nowhere.jsonl")))


def test_rows_that_do_not_fit_are_asked_where_their_prompt_does(material: Path, tmp_path: Path) -> None:
    """Else the file would lack them for ever: their own answer is too long to be learnt, or their prompt to be read."""
    rows = [{"prompt": f"{word} film", "response": "warm"} for word in ("bright", "dull", "cold", "flat", "fresh")]
    rows += [{"prompt": f"{word} song", "response": "music " * 9} for word in ("bright", "dull")]
    rows += [{"prompt": f"{word} " * 30, "response": "clever"} for word in ("bright", "dull")]
    others = [{"prompt": f"{word} joke", "response": "cold"} for word in ("dull", "flat")]
    for name, given in (("train", rows), ("other", others)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    files = {"data__train": str(tmp_path / "train.jsonl")}
    files |= dict.fromkeys(("data__validation", "data__test"), str(tmp_path / "other.jsonl"))
    recipe = recipe_of(material, "long", task__type="instruction", **files)
    path = answer_training_rows(recipe)
    head, *written = rows_of(path.read_bytes())
    assert len(written) == 9
    assert all(row["answer"] == "" for row in written if row["reference"] == "clever")
    for row in written:
        row |= {"is_cut": False, "answer": "" if row["reference"] == "clever" else "bright"}
    path.write_text("\n".join(map(json.dumps, [head, *written])), encoding="utf-8")
    ready = prepare(override_recipe(recipe, [f"data.teacher_answers={path}"]))
    assert len(ready.splits["train"]) == 7, "those whose own answer was too long learn the teacher's"
    assert any("2 that were empty or cut are left out" in note for note in ready.notes)
