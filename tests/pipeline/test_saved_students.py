"""A run learns before it trains whether its student can be saved, and judges the student that it saves."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from flexkd.core.objective import Objective
from flexkd.core.terms import TaskTerm
from flexkd.data.encoding.collation import Collator
from flexkd.errors import UnsupportedModelError
from flexkd.evaluate.cost import Cost
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline.job import prepare
from flexkd.record import RunRecord
from flexkd.report.card import model_card
from flexkd.report.wording import byte_size
from flexkd.tasks import classification, language_models
from flexkd.training.trainer import DistillationTrainer
from tests.evaluate.stored import stored_predictions
from tests.job_files import job, text_job
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))


def trainer_of(model: Any, folder: Path) -> DistillationTrainer:
    rows = [{"id": str(index), "input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]} for index in range(4)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=4, dataloader_pin_memory=False,
    )  # fmt: skip
    return DistillationTrainer(
        model, objective=Objective(TaskTerm()), args=arguments, train_dataset=rows, data_collator=Collator(0)
    )


def test_R04_a_script_saves_its_first_checkpoint_whatever_was_set_in_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", "causal")
    model.generation_config.temperature = 0.7
    trainer_of(model, tmp_path).train()
    assert "count for nothing (temperature 0.7)" in caplog.text
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")


def test_R04_a_script_is_refused_before_its_first_step_where_nothing_can_be_saved(tmp_path: Path) -> None:
    model = tiny_model("llama", "causal")
    model.config.temperature = 0.7
    before = model.get_input_embeddings().weight.detach().clone()
    with pytest.raises(UnsupportedModelError, match="model: transformers will not save its config"):
        trainer_of(model, tmp_path).train()
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_R04_a_teacher_that_cannot_be_saved_is_refused_before_it_is_fine_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = text_job(tmp_path)
    load = language_models.language_teacher

    def loaded(*args: Any, **options: Any) -> Any:
        teacher = load(*args, **options)
        teacher.config.num_beams = 4
        return teacher

    monkeypatch.setattr(language_models, "language_teacher", loaded)
    monkeypatch.setattr("flexkd.pipeline.teacher.fine_tuned_teacher", lambda *_, **__: pytest.fail("it was fine-tuned"))
    with pytest.raises(UnsupportedModelError, match=r"^teacher\.model: transformers will not save its config: .*num_b"):
        prepare(recipe)


def measured(folders: Sequence[Path], *_: Any, **__: Any) -> list[Cost]:
    types = [json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] for folder in folders]
    return [Cost(1000, 4000, 50.0, 10**6, "cpu", dtype) for dtype in types]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_R04_a_student_is_judged_as_it_is_saved_and_the_record_names_its_number_type(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classification, "measure_costs", measured)
    exact = {"training__precision": "float32", "teacher__precision": "float32"}
    short = {"training__max_steps": 1, "training__evaluations": 1, "teacher__fine_tune": None}
    recipe = job(tmp_path, **exact, **short, student__save_dtype=dtype, objective__features=None)
    record = pipeline.distill(recipe)
    assert [model.dtype for model in record.models if model.role != "baseline"] == ["float32", dtype, dtype]
    assert RunRecord.read(tmp_path / "run" / "record.json").models == record.models
    assert f"{byte_size(4000)} {dtype}" in model_card(record)
    folder = tmp_path / "run" / "student"
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype
    assert AutoModelForSequenceClassification.from_pretrained(folder).dtype == getattr(torch, dtype)
    student = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    predictions = stored_predictions(tmp_path / "run" / "predictions.jsonl")["student"]
    texts = {row.id: row.texts[0] for row in prepare(recipe).data.test}
    rows = [texts[id_] for id_ in predictions.ids]
    tokens = AutoTokenizer.from_pretrained(folder)(rows, return_tensors="pt", padding=True)
    with torch.no_grad():
        assert torch.allclose(student(**tokens).logits, predictions.logits, atol=1e-5)
