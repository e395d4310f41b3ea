"""The whole job on tiny material: the run folder, every start, every loss, and what is refused."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from flexkd.errors import ArtifactError, DataError, RecipeError, VocabularyError
from flexkd.evaluate.classification import agreement, classification_metrics
from flexkd.evaluate.cost import Cost
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline import teacher as teacher_module
from flexkd.pipeline.job import prepare
from flexkd.pipeline.run import Run
from flexkd.record import RunRecord
from flexkd.scoring.selection_file import load_selection
from flexkd.tasks import classification
from tests.evaluate.stored import stored_predictions
from tests.job_files import job, write_tokenizer
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with teacher, rows and the fine-tuned teachers of this module; costs are not measured."""
    folder = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        fixed = Cost(1000, 4000, 50.0, 10**6, "cpu")
        patch.setattr(classification, "measure_costs", lambda folders, *_, **__: [fixed] * len(folders))
        yield folder


@pytest.fixture(scope="module")
def finished(material: Path) -> RunRecord:
    return pipeline.distill(job(material))


def test_the_run_folder_holds_what_it_promises(material: Path, finished: RunRecord) -> None:
    run = material / "run"
    names = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "scores.safetensors", "student", "record.json", "predictions.jsonl", "checkpoints"} <= names
    stored = RunRecord.read(run / "record.json")
    assert (stored.models, stored.scores, stored.recipe) == (finished.models, finished.scores, finished.recipe)
    assert [model.role for model in finished.models] == ["teacher", "student_before", "student", "baseline"]
    assert [model.hidden_size for model in finished.models] == [32, 16, 16, 0]
    assert finished.evaluations[-1]["step"] == 6
    assert len(finished.scores[0].units) == 16


def test_S02_the_student_loads_with_plain_transformers(material: Path, finished: RunRecord) -> None:
    folder = material / "run" / "student"
    student, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "flexkd" not in (folder / "config.json").read_text(encoding="utf-8").lower()
    predictions = stored_predictions(material / "run" / "predictions.jsonl")["student"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = next(row for row in prepare(job(material)).data.test if row.id == predictions.ids[0])
    with torch.no_grad():
        logits = student(**tokenizer(first.texts[0], return_tensors="pt")).logits[0]
    # The run predicts in the machine's own precision, which may be bfloat16.
    assert torch.allclose(logits, predictions.logits[0], atol=5e-2)


def test_every_metric_of_the_record_comes_out_of_the_predictions(material: Path, finished: RunRecord) -> None:
    stored = stored_predictions(material / "run" / "predictions.jsonl")
    for role in ("teacher", "student_before", "student"):
        model = finished.model(role)
        assert model is not None
        logits, labels = stored[role].logits, stored[role].labels
        again = {
            **classification_metrics(logits, labels, "single_label"),
            **agreement(logits, stored["teacher"].logits, "single_label"),
        }
        assert model.metrics == pytest.approx(again)


def test_F18_a_run_folder_of_another_job_is_refused(material: Path, finished: RunRecord) -> None:
    with pytest.raises(ArtifactError, match=r"belongs to another run: .*student.* was"):
        pipeline.distill(job(material, student__hidden_size=24))
    with pytest.raises(ArtifactError, match=r"belongs to another run: (data|max_length|teacher).* was"):
        pipeline.distill(job(material, data__max_length=12))
    again = pipeline.distill(job(material))
    assert again.scores == finished.scores


def test_the_teacher_is_fine_tuned_once_and_found_again(material: Path, finished: RunRecord) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_module, "_fine_tune", lambda *_, **__: pytest.fail("fine-tuned again"))
        prepare(job(material))
        with pytest.raises(pytest.fail.Exception):
            prepare(job(material, teacher__fine_tune__learning_rate=1e-3))
    teacher = finished.model("teacher")
    assert teacher is not None
    assert (teacher.metrics["accuracy"] or 0) > 0.9


def run(material: Path, name: str, problem: str = "single_label", **changes: Any) -> RunRecord:
    changes.setdefault("training__max_steps", 2)
    return pipeline.distill(job(material, problem, output=str(material / name), **changes))


OTHER_LOSSES = [name for name, facts in FEATURE_LOSS_FACTS.items() if name != "correlation" and not facts.needs_heads]


@pytest.mark.parametrize("loss", OTHER_LOSSES)
def test_every_feature_loss_trains(material: Path, loss: str) -> None:
    record = run(material, f"loss-{loss}", objective__features__loss=loss)
    assert record.history[-1]["features_raw"] > 0
    assert loss in record.objective


@pytest.mark.parametrize("basis", ["units", "tangent"])
def test_matched_units_and_directions_train(material: Path, basis: str) -> None:
    changes = {"objective__features__mapping": "matched", "objective__features__basis": basis}
    record = run(material, f"matched-{basis}", **changes, objective__features__units=8)
    assert f"8 {'units' if basis == 'units' else 'directions'} of layer -1 -> -1" in record.objective


def test_layers_below_the_head_are_taught_unit_by_unit(material: Path) -> None:
    record = run(material, "layers", objective__features__layer_map={1: 2, -1: -1}, scores__layer=[-1, 2])
    assert "16 units of layer 2 -> 1" in record.objective
    assert [scores.layer for scores in record.scores] == [-1, 2]


def test_coverage_teaches_fewer_units_than_the_student_has(material: Path) -> None:
    record = run(material, "coverage", objective__features__coverage=0.3)
    (scores,) = record.scores
    assert len(scores.units) < 16
    held = sum(scores.values[unit] for unit in scores.units) / sum(scores.values)
    assert held >= 0.3


def test_a_sliced_student_is_not_taught_other_units_by_score(material: Path) -> None:
    with pytest.raises(RecipeError, match="Use mapping: matched"):
        run(material, "by-score", objective__features__mapping="score")


@pytest.mark.parametrize(("problem", "metric"), [("multi_label", "micro_f1"), ("regression", "pearson")])
def test_other_problems_end_to_end(material: Path, problem: str, metric: str) -> None:
    record = run(material, problem, problem, teacher__fine_tune__epochs=2)
    student = record.model("student")
    assert student is not None
    assert metric in student.metrics
    assert record.metric == metric


@pytest.mark.parametrize("width", [16, 32, 48])
def test_F13_A05_students_from_a_config_may_be_narrower_equal_or_wider(material: Path, width: int) -> None:
    shape = material / f"shape-{width}"
    tiny_model("distilbert", dim=width, n_layers=2, num_labels=2).config.save_pretrained(shape)
    changes = {"student__hidden_size": None, "student__num_layers": None}
    record = run(material, f"config-{width}", student__start="config", student__model=str(shape), **changes)
    assert f"{min(width, 32)} units of layer -1 -> -1" in record.objective
    assert record.new_parameters == ["all"]


def test_A05_D14_a_pretrained_student_reports_new_weights_and_reads_its_own_tokens(material: Path) -> None:
    folder = material / "pretrained"
    if not folder.exists():
        tiny_model("distilbert", seed=5, num_labels=5).save_pretrained(folder)
        write_tokenizer(folder, extra="shifted")
    shape = {"student__hidden_size": None, "student__num_layers": None}
    start = {"student__start": "pretrained", "student__model": str(folder), **shape}
    with pytest.raises(VocabularyError, match="'tokens' needs one tokenizer"):
        run(material, "own-tokens", **start)
    record = run(material, "own-supervised", **start, objective__features__positions="supervised")
    assert record.new_parameters == ["classifier.bias", "classifier.weight"]


def test_evaluate_measures_teacher_student_and_any_model(material: Path, finished: RunRecord) -> None:
    recipe = job(material)
    teacher, student = finished.model("teacher"), finished.model("student")
    assert teacher is not None
    assert student is not None
    assert pipeline.evaluate("teacher", recipe).metrics == pytest.approx(teacher.metrics)
    assert pipeline.evaluate("student", recipe).metrics == pytest.approx(student.metrics)
    folder = str(material / "run" / "student")
    assert pipeline.evaluate(folder, recipe).metrics == pytest.approx(student.metrics)
    other = material / "three"
    tiny_model("bert", num_labels=3).save_pretrained(other)
    write_tokenizer(other)
    with pytest.raises(VocabularyError, match=r"has 3 labels .* the data have 2"):
        pipeline.evaluate(str(other), recipe)


def test_score_keeps_the_scores_for_the_job(material: Path) -> None:
    recipe = job(material, output=str(material / "scored"))
    (scores,) = pipeline.score(recipe)
    assert len(scores.units) == 16
    ready = prepare(recipe)
    stored = load_selection(material / "scored" / "scores.safetensors", Run(ready, recipe, recipe.folder).made_of)
    assert stored.scores[0].values.tolist() == scores.values
    assert stored.layers is None


def test_bad_rows_end_the_job_before_a_model_is_loaded(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = material / "one-class.jsonl"
    rows.write_text("".join(json.dumps({"text": f"film {n}", "label": "good"}) + "\n" for n in range(40)), "utf-8")
    monkeypatch.setattr("flexkd.pipeline.job.load_tokenizer", lambda *_, **__: pytest.fail("loaded a tokenizer"))
    with pytest.raises(DataError, match=re.escape("every row has the same label, 'good'")):
        run(material, "one-class", data__train=str(rows))
