"""A finished student answers new rows from its folder: as plain transformers does, once each, through interruptions."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import flexkd
from flexkd.cli import app
from flexkd.errors import ArtifactError, DataError
from flexkd.pipeline import distill as pipeline
from flexkd.predict import files as files_module
from flexkd.predict.files import predict_file
from flexkd.predict.student import Student, load_student
from flexkd.recipe import Recipe
from tests.job_files import BAD, GOOD, fixed_costs, job, text_job

TEXTS = [f"{GOOD[index % len(GOOD)]} {BAD[index % len(BAD)]} {GOOD[index % 3]}" for index in range(70)]
KINDS = ("single_label", "multi_label", "regression", "llama", "chat", "t5")


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        fixed_costs(patch)
        yield folder


def recipe_of(folders: Path, kind: str) -> Recipe:
    folder = folders / kind
    folder.mkdir(exist_ok=True)
    quick: dict[str, Any] = {"teacher__allow_weak": True, "training__max_steps": 1, "training__precision": "float32"}
    if kind != "regression":
        quick["teacher__fine_tune"] = None
    if kind in ("single_label", "multi_label", "regression"):
        return job(folder, kind, **quick)
    return text_job(folder, "t5" if kind == "t5" else "llama", chat=kind == "chat", **quick)


@pytest.fixture(scope="module")
def student_of(folders: Path) -> Callable[[str], tuple[Path, Student]]:
    """The folder and the student of a kind, made when it is first asked for."""

    def made(kind: str) -> tuple[Path, Student]:
        recipe = recipe_of(folders, kind)
        pipeline.distill(recipe)
        folder = recipe.folder / "student"
        return folder, load_student(folder, precision="float32")

    return cache(made)


def write_rows(path: Path, column: str, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_classifier_says_what_plain_transformers_says(student_of: Callable[[str], tuple[Path, Student]]) -> None:
    folder, student = student_of("single_label")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    predictions = list(student.predict(TEXTS, batch_size=8))
    assert len(predictions) == len(TEXTS)
    for text, prediction in zip(TEXTS, predictions, strict=True):
        with torch.no_grad():
            shares = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        assert prediction["label"] == model.config.id2label[int(shares.argmax())]
        named = {model.config.id2label[index]: share for index, share in enumerate(shares.tolist())}
        assert prediction["probabilities"] == pytest.approx(named, abs=2e-6)


def test_several_labels_and_numbers(student_of: Callable[[str], tuple[Path, Student]]) -> None:
    (prediction,) = student_of("multi_label")[1].predict([TEXTS[0]])
    assert set(prediction) == {"labels", "probabilities"}
    assert prediction["labels"] == [name for name, share in prediction["probabilities"].items() if share > 0.5]
    (prediction,) = student_of("regression")[1].predict([{"text": TEXTS[0]}])
    assert isinstance(prediction["value"], float)


@pytest.mark.parametrize("kind", ["llama", "chat", "t5"])
def test_answers_are_those_of_the_evaluation(folders: Path, student_of: Any, kind: str) -> None:
    folder, student = student_of(kind)
    evaluated = lines_of(folder.parent / "predictions.jsonl")
    rows = lines_of(folders / kind / "texts.jsonl")
    asked = {row["document"]: line for row in rows for line in evaluated if row["document"] in line["prompt"]}
    assert len(asked) >= 2
    answers = list(student.predict([{"document": text} for text in asked]))
    assert [entry["answer"] for entry in answers] == [
        row["models"]["student"]["answers"]["0"]["text"] for row in asked.values()
    ]


def test_answers_are_those_of_plain_generate(student_of: Any) -> None:
    folder, student = student_of("chat")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    (prediction,) = student.predict([TEXTS[3]])
    content = f"Summarize the following text.\n\n{TEXTS[3]}"
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert prediction["answer"] == tokenizer.decode(output, skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", ["single_label", "llama"])
def test_a_killed_call_goes_on_and_answers_no_row_twice(
    tmp_path: Path, student_of: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, student = student_of(kind)
    column = "text" if kind == "single_label" else "document"
    rows = write_rows(tmp_path / "rows.jsonl", column, TEXTS)
    monkeypatch.setattr(files_module, "_CHUNK", 2)
    whole = lines_of(predict_file(student, str(rows), tmp_path / "whole.jsonl", batch_size=4))
    assert [line["row"] for line in whole] == list(range(1, len(TEXTS) + 1))

    calls = []
    plain = Student.predict_rows

    def killed(self: Student, chunk: Any, *, batch_size: int) -> Any:
        calls.append(len(chunk))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, chunk, batch_size=batch_size)

    monkeypatch.setattr(Student, "predict_rows", killed)
    output = tmp_path / "again.jsonl"
    with pytest.raises(KeyboardInterrupt):
        predict_file(student, str(rows), output, batch_size=4)
    assert len(lines_of(output)) == 24
    with output.open("ab") as file:
        file.write(b'{"row": 25, "lab')
    predict_file(student, str(rows), output, batch_size=4)
    assert lines_of(output) == whole
    assert calls == [8] * 4 + [8] * 5 + [6]
    predict_file(student, str(rows), output, batch_size=4)
    assert len(calls) == 10


def test_rows_that_cannot_be_used_have_an_error_in_their_place(tmp_path: Path, student_of: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "fine"}\n{"text": null}\nno json\n{"text": 3}\n{"text": "fine"}\n', encoding="utf-8")
    lines = lines_of(predict_file(student_of("single_label")[1], str(rows), tmp_path / "out.jsonl"))
    assert [line.get("error", "")[:11] for line in lines][1::2] == ["text is nul", "text is not"]
    assert "error" in lines[2]
    assert lines[0] == {**lines[4], "row": 1}
    long = write_rows(tmp_path / "long.jsonl", "document", ["fine " * 3])
    assert "answer" in lines_of(predict_file(student_of("llama")[1], str(long), tmp_path / "answers.jsonl"))[0]


def test_columns_by_other_names_and_what_is_missing(tmp_path: Path, student_of: Any) -> None:
    _, student = student_of("single_label")
    rows = tmp_path / "rows.csv"
    rows.write_text("review,stars\nfine,3\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no column 'text', .* it has review, stars\. .*--column text=COLUMN"):
        predict_file(student, str(rows), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(DataError, match=r"unknown column 'words'\. Known: text"):
        predict_file(student, str(rows), tmp_path / "out.jsonl", columns={"words": "review"})
    predict_file(student, str(rows), tmp_path / "out.jsonl", columns={"text": "review"})
    assert set(lines_of(tmp_path / "out.jsonl")[0]) == {"row", "label", "probabilities"}
    (tmp_path / "rows.tsv").write_text("review\nfine\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.tsv': has no column 'text', .* it has review\. "):
        predict_file(student, f"{write_rows(tmp_path / 'a.jsonl', 'text', TEXTS)} + {tmp_path}/rows.tsv", "out.jsonl")


def test_answers_to_other_rows_are_not_continued(tmp_path: Path, student_of: Any) -> None:
    _, student = student_of("single_label")
    output = tmp_path / "out.jsonl"
    predict_file(student, str(write_rows(tmp_path / "rows.jsonl", "text", TEXTS[:3])), output)
    before = output.read_bytes()
    with pytest.raises(ArtifactError, match=r"rows was .* Choose another --output, or delete this file"):
        predict_file(student, str(write_rows(tmp_path / "others.jsonl", "text", TEXTS[3:6])), output)
    assert output.read_bytes() == before
    foreign = tmp_path / "notes.jsonl"
    foreign.write_text("mine\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match="was not written by flexkd predict"):
        predict_file(student, str(tmp_path / "rows.jsonl"), foreign)
    assert foreign.read_text() == "mine\n"


def test_from_the_command_line_and_from_python(tmp_path: Path, student_of: Any) -> None:
    folder, _ = student_of("single_label")
    rows = write_rows(tmp_path / "rows.jsonl", "words", TEXTS[:5])
    output = tmp_path / "out.jsonl"
    arguments = ["predict", str(folder), str(rows), "-o", str(output), "--column", "text=words", "--batch-size", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"predictions: {output}" in result.output
    in_python = list(flexkd.load_student(folder, precision="float32").predict(TEXTS[:5]))
    assert [line["label"] for line in lines_of(output)] == [entry["label"] for entry in in_python]
    other = "\n".join(["words", *(f"{text} caf\u00e9, tr\u00e8s;bien" for text in TEXTS[:5])]).encode("cp1252")
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(other))
    file_arguments = [
        *arguments[:2],
        str(tmp_path / "rows.csv.gz"),
        "-o",
        str(tmp_path / "other.jsonl"),
        *arguments[5:7],
    ]
    for options, message in [
        ([], "'tr\u00e8s;bien' in cp1252"),
        (["--encoding", "cp1252"], "(of flexkd predict: --separator)"),
        (["--encoding", "latinx"], "Python knows no 'latinx'"),
        (["--encoding", "cp1252", "--separator", "none"], ""),
    ]:
        result = CliRunner().invoke(app, [*file_arguments, *options])
        assert (result.exit_code, message in result.output) == (2 if message else 0, True), result.output
    assert len(lines_of(tmp_path / "other.jsonl")) == 5
    wrong = CliRunner().invoke(app, [*arguments[:3], "--column", "words"])
    assert (wrong.exit_code, "Write it as text=review" in wrong.output) == (2, True)


def test_a_folder_without_settings_is_refused(tmp_path: Path, student_of: Any) -> None:
    with pytest.raises(ArtifactError, match=r"holds no flexkd\.json, which says how rows are read"):
        load_student(tmp_path)
    folder, _ = student_of("single_label")
    (tmp_path / "flexkd.json").write_text((folder / "flexkd.json").read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ArtifactError, match="of version 9, and 1 is read here"):
        load_student(tmp_path)
    (tmp_path / "flexkd.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        load_student(tmp_path)


def test_a_text_in_the_place_of_a_row_needs_a_single_column(student_of: Any) -> None:
    _, student = student_of("single_label")
    settings = replace(student.settings, columns={"text": "a", "text_pair": "b"})
    pairs = replace(student, settings=settings)
    with pytest.raises(DataError, match=r"this student reads a, b\. Give mappings"):
        list(pairs.predict(["a text"]))
