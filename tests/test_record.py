"""Records survive the way to JSON and back, and say what is wrong with a file that did not."""

import dataclasses
import json
import math
import re

import pytest

from flexkd.compare_record import CompareCell, CompareRecord, Contrast, PairedDifference
from flexkd.errors import ArtifactError
from flexkd.record import AnswerExample, DataRecord, Disagreement, GenerationRecord, ModelRecord, RunRecord, ScoreRecord
from flexkd.strict_json import read_object


def run_record(**changes: object) -> RunRecord:
    """A small complete record."""
    metrics = {"accuracy": 0.84, "matthews_correlation": None}
    record = RunRecord(
        name="tiny",
        created="2026-01-02T03:04:05+00:00",
        task="classification",
        problem="single_label",
        metric="accuracy",
        objective="1.0 * cross_entropy + 1.0 * forward_kl",
        recipe={"training": {"epochs": 3, "learning_rate": 5e-4, "report_to": []}, "student": {"size": None}},
        seed=0,
        environment={"torch": "2.13.0"},
        data=DataRecord(
            sources={"train": "train.jsonl"},
            rows={"train": 10, "test": 4},
            skipped={"text is empty": 2},
            skipped_examples=["train.jsonl:3: text is empty"],
            labels=["negative", "positive"],
            truncated={"train": 1},
            fingerprint="abc",
        ),
        models=[ModelRecord("teacher", "t", 100, 400, 8, 2, 12.5, 1000, metrics)],
        scores=[ScoreRecord(-1, "log_prob", "gradient", [0.5, 0.25, 0.0], [0, 1], 10, 9.5, 1, "units", "index", "h")],
        history=[{"step": 1, "epoch": 0.1, "loss": 0.7}, {"step": 2, "epoch": 0.2, "loss": 0.6}],
        evaluations=[{"step": 2, "epoch": 0.2, "eval_loss": 0.5, "eval_accuracy": 0.8}],
        disagreements=[Disagreement("1", ["a \u4eca\u5929 \U0001f600", "b"], None, "yes", "no", 0.9, None)],
        new_parameters=["classifier.bias"],
        notes=["a note"],
        seconds={"training": 1.5},
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


GENERATION = GenerationRecord(
    200, "causal", True, "{prompt}", 64, {"teacher": {"num_beams": 1, "not_used": {}}}, 32, True, "latin"
)


def test_records_of_language_models_survive_and_older_ones_have_no_answers(tmp_path):
    example = AnswerExample(
        "1", "p", ["r"], {"teacher": "a", "student": ""}, {"teacher": 0.5, "student": None}, ["teacher"]
    )
    record = run_record(problem="generation", answers=[example], generation=GENERATION)
    record.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == record
    content = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    del content["answers"], content["generation"]
    (tmp_path / "record.json").write_text(json.dumps(content), encoding="utf-8")
    assert RunRecord.read(tmp_path / "record.json") == run_record(problem="generation")


def test_reading_back_gives_an_equal_record(tmp_path):
    record = run_record()
    record.write(tmp_path / "new" / "record.json")

    assert RunRecord.read(tmp_path / "new" / "record.json") == record
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["record.json"]
    content = json.loads((tmp_path / "new" / "record.json").read_text(encoding="utf-8"))
    assert content["format"] == 1
    assert content["not_finite"] == []
    assert content["models"][0]["metrics"] == {"accuracy": 0.84, "matthews_correlation": None}


def test_E13_nan_becomes_null_with_a_reason_and_comes_back(tmp_path):
    path = tmp_path / "record.json"
    record = run_record(
        history=[{"step": 1, "loss": math.inf}, {"step": 2, "loss": -math.inf}],
        recipe={"a.b": ({"c": math.nan},)},
    )
    record.models[0].metrics["accuracy"] = math.nan
    record.write(path)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert content["models"][0]["metrics"]["accuracy"] is None
    assert [(entry["path"], entry["value"]) for entry in content["not_finite"]] == [
        (["recipe", "a.b", 0, "c"], "nan"),
        (["models", 0, "metrics", "accuracy"], "nan"),
        (["history", 0, "loss"], "inf"),
        (["history", 1, "loss"], "-inf"),
    ]
    assert all(len(entry["reason"]) > 20 for entry in content["not_finite"])

    back = RunRecord.read(path)
    assert math.isnan(back.models[0].metrics["accuracy"])
    assert back.history == record.history
    assert math.isnan(back.recipe["a.b"][0]["c"])


def test_lone_surrogates_of_the_data_survive(tmp_path):
    record = run_record(notes=["half an emoji \ud83d"])
    record.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == record


def test_a_failed_write_leaves_the_old_record(tmp_path):
    path = tmp_path / "record.json"
    run_record().write(path)
    with pytest.raises(TypeError):
        run_record(recipe={"output": tmp_path}).write(path)
    assert RunRecord.read(path) == run_record()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("", "damaged, it is not JSON"),
        ('{"format": 1, "name"', "damaged, it is not JSON"),
        ("[1, 2]", "record format None is not known, this version reads 1"),
        ('{"format": 2}', "record format 2 is not known, this version reads 1"),
        ('{"format": 1, "not_finite": []}', "damaged, its content is not that of a RunRecord"),
    ],
)
def test_damaged_and_foreign_files_are_refused_with_their_path(tmp_path, text, message):
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=re.escape(f"{path}: {message}")):
        RunRecord.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("seed"), "(seed is missing)"),
        (lambda content: content.update(extra=1), "(extra is no field of this version)"),
        (lambda content: content["models"][0].update(extra=1), "(models[0].extra is no field of this version)"),
        (lambda content: content.update(seed="0"), "(seed is '0': Input should be a valid integer)"),
        (lambda content: content.update(seed=True), "(seed is True: Input should be a valid integer)"),
        (lambda content: content["history"][1].update(loss="x"), "(history[1].loss is 'x': Input should be a valid"),
        (lambda content: content["models"][0].pop("role"), "(models[0].role is missing)"),
        (lambda content: content.update(generation={"kind": 1}), "(generation.rows is missing; generation.kind is 1: "),
        (lambda content: content.update(models=[3]), "(models[0] is 3: Input should be"),
        (lambda content: content["data"].update(rows=[]), "(data.rows is []: Input should be a valid dictionary)"),
        (
            lambda content: content["not_finite"].append({"path": ["seed", 0], "value": "nan", "reason": ""}),
            "'int' object does not support item assignment",
        ),
    ],
)
def test_a_field_that_does_not_fit_is_named(tmp_path, change, message):
    path = tmp_path / "record.json"
    run_record().write(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ArtifactError, match=re.escape(message)):
        RunRecord.read(path)


def test_files_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(b'{"format": 1, "name": "\xff"}')
    with pytest.raises(ArtifactError, match="damaged"):
        RunRecord.read(path)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"made_of": {}', "\xff"])
def test_a_damaged_file_beside_a_record_is_named(tmp_path, text):
    file = tmp_path / "cell.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=re.escape(f"{file}: damaged, it is no")):
        read_object(file, "made_of")


def test_model_finds_a_role():
    assert run_record().model("teacher").name == "t"
    assert run_record().model("student") is None


def test_comparisons_survive_too(tmp_path):
    record = CompareRecord(
        metric="accuracy",
        problem="single_label",
        methods=["fine_tune", "flexkd"],
        seeds=[0, 1],
        cells=[CompareCell("fine_tune", 0, {"accuracy": 0.7}, 3), CompareCell("flexkd", 0, {"accuracy": None}, 3.5)],
        reference="fine_tune",
        paired=[PairedDifference("flexkd", 0.8, 0.01, 0.1, 0.05, 0.15, 0.03)],
        teacher={"accuracy": 0.9},
        contrasts=[Contrast("flexkd", "fine_tune", 0.1, 0.05, 0.15, 0.03, 0.5, 0.5, 1.5, 6), Contrast("a", "b")],
        level=0.05,
        smallest_p_value=0.5,
        fewest_seeds=7,
    )
    record.write(tmp_path / "compare.json")
    assert CompareRecord.read(tmp_path / "compare.json") == record
    assert record.contrast("fine_tune", "flexkd") == record.contrasts[0]
    assert record.contrast("fine_tune", "a") is None
    assert [record.seeds_needed(contrast) for contrast in record.contrasts] == [7, None]
    content = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    for name in ("contrasts", "level", "smallest_p_value", "fewest_seeds"):
        del content[name]
    (tmp_path / "older.json").write_text(json.dumps(content), encoding="utf-8")
    assert CompareRecord.read(tmp_path / "older.json").contrasts == []
    with pytest.raises(ArtifactError, match="not that of a RunRecord"):
        RunRecord.read(tmp_path / "compare.json")
