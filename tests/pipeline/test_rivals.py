"""Rivals of a student: measured on its rows with its metrics, fine-tuned for as many steps, and kept for later runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from flexkd.evaluate.cost import Cost
from flexkd.models.loading.int8 import int8_loader
from flexkd.pipeline.distill import distill
from flexkd.pipeline.teacher import store_folder
from flexkd.record import ModelRecord, RunRecord
from flexkd.tasks import classification, generation
from tests.closeness import assert_close
from tests.job_files import count_optimizer_steps, job, text_job, write_text_tokenizer, write_tokenizer
from tests.tiny import tiny_model

FLOAT = {"training__precision": "float32", "teacher__precision": "float32", "teacher__fine_tune": None}


class Measured:
    """Stands in for `measure_costs`: notes what each folder holds and the first ids that its model would read."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.first_ids: list[list[int]] = []

    def __call__(self, folders: list[Path], batches: Any, *, own_batches: Any, **_: Any) -> list[Cost]:
        self.kinds = ["int8" if int8_loader(folder) else "plain" for folder in folders]
        read = [own_batches.get(place, batches) for place in range(len(folders))]
        self.first_ids = [of_model[0]["input_ids"][0].tolist() for of_model in read]
        return [Cost(100 + place, 400, 50.0, 10**6, "cpu", "float32") for place in range(len(folders))]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("rivals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        # Its tokenizer has one word more, so that every id is another one.
        tiny_model("distilbert", num_labels=2, seed=5).save_pretrained(folder / "small")
        write_tokenizer(folder / "small", extra="zebra")
        yield folder


def rivals_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"int8_teacher": True, "models": [str(folder / "small")], "learning_rate": 3e-3, **changes}


@pytest.fixture(scope="module")
def measured() -> Measured:
    return Measured()


@pytest.fixture(scope="module")
def record(material: Path, measured: Measured) -> RunRecord:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classification, "measure_costs", measured)
        return distill(job(material, rivals=rivals_of(material), training__max_steps=24, **FLOAT))


def rivals(record: RunRecord) -> list[ModelRecord]:
    return [model for model in record.models if model.role == "rival"]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_rivals_stand_behind_the_student_with_how_they_were_made(
    material: Path, record: RunRecord, measured: Measured
) -> None:
    assert [model.role for model in record.models] == [
        "teacher", "student_before", "student", "rival", "rival", "baseline",
    ]  # fmt: skip
    int8, small = rivals(record)
    assert int8.name == "teacher in int8"
    assert int8.dtype == "int8"
    assert int8.parameters == tiny_model("bert", seed=3, num_labels=2).num_parameters()
    assert int8.preparation == (
        "the teacher's linear layers in int8 by torch's dynamic quantization, all else in float32; nothing is trained"
    )
    assert small.name == str(material / "small")
    assert small.preparation == (
        f"fine-tuned on the labels alone, 24 steps of 16 of the student's {record.data.rows['train']} training rows at "
        "learning rate 0.003"
    )
    assert measured.kinds == ["plain", "plain", "int8", "plain"]
    teacher, student, in_int8, other = measured.first_ids
    assert teacher == student == in_int8
    assert other == [token + 1 if token > 3 else token for token in teacher]
    assert RunRecord.read(material / "run" / "record.json").models == record.models


def test_figures_of_rivals_can_be_recomputed_from_the_predictions(material: Path, record: RunRecord) -> None:
    rows = lines(material / "run")
    for model in rivals(record):
        hits = [max(range(2), key=row["logits"][model.name].__getitem__) == row["label"] for row in rows]
        assert model.metrics["accuracy"] == pytest.approx(sum(hits) / len(hits))
    int8 = rivals(record)[0]
    assert 0 < (int8.metrics["kl"] or 0) < 0.01
    assert int8.metrics["agreement"] == 1.0


def test_a_fine_tuned_rival_is_a_plain_model_in_the_store(material: Path, record: RunRecord) -> None:
    (stored,) = [folder for folder in store_folder().iterdir() if folder.is_dir()]
    model, tokenizer = (kind.from_pretrained(stored) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    sentences = [json.loads(line)["text"] for line in (material / "single_label.jsonl").read_text().splitlines()]
    row = lines(material / "run")[0]
    # An id is FILE:LINE#HASH.
    sentence = sentences[int(row["id"].rpartition(":")[2].partition("#")[0]) - 1]
    with torch.no_grad():
        logits = model.eval()(**tokenizer(sentence, return_tensors="pt")).logits[0]
    assert_close(torch.tensor(row["logits"][str(material / "small")]), logits)


def test_a_rival_is_fine_tuned_once_for_all_students_that_take_its_steps(
    material: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classification, "measure_costs", Measured())
    steps = count_optimizer_steps(monkeypatch)
    narrower = {"student__hidden_size": 8, "output": str(material / "narrower")}
    second = distill(job(material, rivals=rivals_of(material), training__max_steps=24, **FLOAT, **narrower))
    assert len(steps) == 24, "those of the student alone"
    assert [model.metrics for model in rivals(second)] == [model.metrics for model in rivals(record)]
    steps.clear()
    shorter = {"student__hidden_size": 8, "output": str(material / "shorter"), "training__max_steps": 6}
    distill(job(material, rivals=rivals_of(material, int8_teacher=False), **FLOAT, **shorter))
    assert len(steps) == 12, "6 of the student, 6 of its rival"


def test_a_rival_learns_from_the_rows_of_the_student_alone(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classification, "measure_costs", Measured())
    quarter = {"data__train_share": 0.25, "output": str(material / "quarter"), "training__max_steps": 2}
    (small,) = rivals(distill(job(material, rivals=rivals_of(material, int8_teacher=False), **FLOAT, **quarter)))
    assert "of the student's 19 training rows" in small.preparation


def test_rivals_that_write_answer_the_same_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(generation, "measure_costs", Measured())
    tiny_model("llama", "causal", seed=5).save_pretrained(tmp_path / "small")
    write_text_tokenizer(tmp_path / "small")
    record = distill(text_job(tmp_path, rivals=rivals_of(tmp_path), **{**FLOAT, "training__precision": "bfloat16"}))
    int8, small = rivals(record)
    assert "all else in float32, where the other models compute in bfloat16; nothing is trained" in int8.preparation
    teacher = record.model("teacher")
    assert teacher is not None
    # A rounded teacher gives each answer nearly the likelihood that the teacher gives it; another model does not.
    assert abs((int8.metrics["nll"] or 0) - (teacher.metrics["nll"] or 0)) < 0.1
    assert (int8.metrics["kl"] or 0) < (small.metrics["kl"] or 0)
    assert {"teacher in int8", str(tmp_path / "small")} <= record.answers[0].answers.keys()
    (row, *_) = lines(tmp_path / "run")
    assert row["models"]["teacher in int8"]["likelihood"]["tokens"] > 0
