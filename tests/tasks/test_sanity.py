"""A teacher is looked at before anything is spent on it: one of no use stops the run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flexkd.cli import app
from flexkd.errors import TrainingError, UnsupportedModelError
from flexkd.evaluate.sanity import SanityResult, Verdict
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline.job import prepare
from flexkd.recipe import Recipe
from flexkd.tasks.sanity import look_at_teacher
from flexkd.tasks.task import EncodedRows
from tests.job_files import job, sentences, write_tokenizer
from tests.models.loading.test_loaded_weights import RENAMED, rename
from tests.tiny import tiny_model

PLAIN: dict[str, Any] = {"teacher__fine_tune": None, "training__precision": "float32", "teacher__precision": "float32"}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of four praise, and a teacher that always says the other class."""
    folder = tmp_path_factory.mktemp("looked-at")
    job(folder)
    with (folder / "uneven.jsonl").open("w", encoding="utf-8") as file:
        for index, (text, kind) in enumerate(sentences(600)):
            if kind or index % 3 == 0:
                file.write(json.dumps({"text": text, "label": ["bad", "good"][kind]}) + "\n")
    weak = tiny_model("bert", num_labels=2)
    with torch.no_grad():
        weak.classifier.bias.copy_(torch.tensor([100.0, -100.0]))
    weak.save_pretrained(folder / "weak")
    write_tokenizer(folder / "weak")
    return folder


def weak_job(material: Path, **changes: Any) -> Recipe:
    options = {"data__train": str(material / "uneven.jsonl"), "teacher__model": str(material / "weak"), **changes}
    return job(material, **PLAIN, **options)


class Stub:
    """A task that found something."""

    def __init__(self, verdict: Verdict, rows: int = 100) -> None:
        self.verdict = SanityResult(rows, f"accuracy 0.4 on {rows} validation rows", verdict)

    def encode(self) -> EncodedRows:
        return EncodedRows({"validation": [{}, {}]}, {}, None, None)  # type: ignore[arg-type]

    def look(self, teacher: Any, rows: Any) -> SanityResult:
        assert len(rows) == 2
        return self.verdict


def looked_at(recipe: Recipe, verdict: Verdict, *, rows: int = 100, stop: bool = True) -> list[str]:
    stub: Any = Stub(verdict, rows)
    return look_at_teacher(recipe, stub, tiny_model("bert"), stop=stop)


def test_R01_what_was_found_is_said_and_noted(material: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = job(material, **PLAIN)
    caplog.set_level(logging.INFO, logger="flexkd")
    sound = looked_at(recipe, "sound")
    assert sound == ["teacher: accuracy 0.4 on 100 validation rows."]
    doubtful = looked_at(recipe, "doubtful")
    few = looked_at(recipe, "weak", rows=49)
    assert "fewer than 50 rows, too few to stop for" in few[0]
    assert caplog.messages == [*sound, *doubtful, *few]
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING, logging.WARNING]


def test_R01_a_weak_teacher_stops_unless_it_is_allowed_or_nothing_is_spent_on_it(material: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        looked_at(job(material, **PLAIN), "weak")
    message = str(caught.value)
    assert message.startswith(f"teacher.model: '{material / 'teacher'}' does not know this task: accuracy 0.4 on ")
    for cause in ("data.label_names", "weights", "add teacher.fine_tune: {}", "teacher.allow_weak: true"):
        assert cause in message
    with pytest.raises(TrainingError, match=r"train it longer or with another teacher\.fine_tune\.learning_rate"):
        looked_at(job(material), "weak")
    told = looked_at(job(material, **PLAIN, teacher__allow_weak=True), "weak")
    assert told[0].startswith("teacher: it does not know this task: accuracy 0.4 on 100 validation rows. Likely")
    assert looked_at(job(material, **PLAIN), "weak", stop=False) == told
    without_teacher = {"objective__baseline": True, "objective__logits": None, "objective__features": None}
    assert looked_at(job(material, **PLAIN, **without_teacher), "weak") == told


def test_R01_a_job_stops_before_it_scores_and_goes_on_where_it_is_allowed(material: Path) -> None:
    recipe = weak_job(material)
    with pytest.raises(TrainingError, match="where always naming the most frequent class gives 0"):
        pipeline.distill(recipe)
    assert not (material / "run" / "scores.safetensors").exists()
    allowed = prepare(weak_job(material, teacher__allow_weak=True))
    assert any("it does not know this task" in note for note in allowed.notes)
    assert not allowed.teacher.training
    assert allowed.teacher.device == torch.device("cpu")


def test_R01_evaluate_ends_with_the_cause_where_it_printed_a_number(material: Path, tmp_path: Path) -> None:
    """Weights behind a wrapper's name, and a config of more blocks: exit 2 and one message, whatever was asked for."""
    recipe = job(material, **PLAIN)
    broken = tmp_path / "compiled"
    tiny_model("bert", num_labels=2).save_pretrained(broken)
    write_tokenizer(broken)
    rename(broken, RENAMED["_orig_mod."])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    for arguments in ([str(broken), str(path)], ["teacher", str(path), f"teacher.model={broken}"]):
        result = CliRunner().invoke(app, ["evaluate", *arguments])
        assert result.exit_code == 2, result.output
        assert "its own are behind '_orig_mod.', as torch.compile leaves them" in result.output.replace("\n", " ")
        assert "accuracy" not in result.output


def test_R01_evaluate_refuses_a_model_before_a_teacher_is_loaded(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("bert", num_labels=2).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    rename(tmp_path, RENAMED["module."])
    monkeypatch.setattr(pipeline, "prepare", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UnsupportedModelError, match=r"evaluate: .* lacks 73 weights"):
        pipeline.evaluate(str(tmp_path), job(material, **PLAIN))


def test_R01_evaluate_reports_a_weak_teacher_and_goes_on(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def prepared(recipe: Recipe, **options: Any) -> None:
        asked.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "prepare", prepared)
    with pytest.raises(KeyboardInterrupt):
        pipeline.evaluate("teacher", weak_job(material))
    assert asked == {"stop_at_weak": False}
