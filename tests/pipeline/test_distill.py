"""A recipe end to end where it could go wrong: interrupted, run again, changed, recomputed, loaded elsewhere."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from flexkd.errors import ArtifactError, FlexKDError, UnsupportedModelError
from flexkd.evaluate.cost import Cost, weight_bytes
from flexkd.models.forward.hidden import model_inputs
from flexkd.models.loading.pretrained import model_fingerprint
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline import scores as scores_module
from flexkd.pipeline.run import Run
from flexkd.record import LatencyRecord, RunRecord
from flexkd.tasks import classification
from flexkd.teacher.live import LiveTeacher
from flexkd.training.trainer import DistillationTrainer
from tests.closeness import assert_close
from tests.job_files import job, sentences, write_tokenizer
from tests.pipeline.test_job import shifted_tokenizer
from tests.tiny import tiny_model

NO_SHAPE = {"student__hidden_size": None, "student__num_layers": None}
TWELVE = {"training__max_steps": 12, "training__evaluations": 4}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Rows and a teacher; costs are not measured."""
    folder = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        fixed = Cost(1000, 4000, 50.0, 10**6, "cpu")
        patch.setattr(classification, "measure_costs", lambda folders, *_, **__: [fixed] * len(folders))
        yield folder


def recipe_of(material: Path, name: str, problem: str = "single_label", **changes: Any) -> Any:
    """Float32 throughout and a teacher as it is, unless the changes say more."""
    quick = {
        "output": str(material / name),
        "teacher__fine_tune": None,
        "training__precision": "float32",
        "teacher__precision": "float32",
        "training__max_steps": 2,
        "training__learning_rate": 3e-3,
    }
    return job(material, problem, **{**quick, **changes})


def run(material: Path, name: str, problem: str = "single_label", **changes: Any) -> RunRecord:
    return pipeline.distill(recipe_of(material, name, problem, **changes))


def weights(material: Path, name: str) -> dict[str, Tensor]:
    return load_file(material / name / "student" / "model.safetensors")


def lines(material: Path, name: str) -> list[dict[str, Any]]:
    text = (material / name / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def whole(material: Path) -> RunRecord:
    return run(material, "whole", **TWELVE)


def logged(record: RunRecord) -> list[dict[str, Any]]:
    """History and evaluations without what a clock says; NaN, which equals nothing, as text."""
    timed = ("runtime", "per_second")
    return [
        {k: str(v) if v != v else v for k, v in entry.items() if not k.endswith(timed)}
        for entry in [*record.history, *record.evaluations]
    ]


def test_S01_an_interrupted_run_ends_as_the_uninterrupted_one(
    material: Path, whole: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = DistillationTrainer.compute_loss

    def interrupted(self: DistillationTrainer, model: Any, *args: Any, **options: Any) -> Any:
        if model.training and self.state.global_step == 7:
            raise KeyboardInterrupt
        return plain(self, model, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(material, "parts", **TWELVE)
    names = sorted(path.name for path in (material / "parts" / "checkpoints").iterdir())
    assert names == ["checkpoint-3", "checkpoint-6"]
    assert not (material / "parts" / "record.json").exists()
    monkeypatch.setattr(scores_module, "score_units", lambda *_, **__: pytest.fail("scored again"))
    record = run(material, "parts", **TWELVE)
    expected = weights(material, "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(material, "parts").items())
    assert logged(record) == logged(whole)
    assert lines(material, "parts") == lines(material, "whole")
    assert [model.metrics for model in record.models] == [model.metrics for model in whole.models]
    assert record.scores == whole.scores


def test_a_finished_run_is_neither_scored_nor_trained_again(
    material: Path, whole: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(material, "whole")
    monkeypatch.setattr(scores_module, "score_units", lambda *_, **__: pytest.fail("scored again"))
    monkeypatch.setattr(DistillationTrainer, "training_step", lambda *_, **__: pytest.fail("trained again"))
    again = run(material, "whole", **TWELVE)
    assert [model.metrics for model in again.models] == [model.metrics for model in whole.models]
    assert logged(again) == logged(whole)
    assert all(torch.equal(value, before[name]) for name, value in weights(material, "whole").items())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"training__learning_rate": 1e-3}, r"training\.learning_rate was '0\.003' and is '0\.001' now"),
        ({"training__seed": 1}, r"training\.seed was '0' and is '1' now"),
        ({"training__max_steps": 13}, r"training\.max_steps was '12' and is '13' now"),
        ({"task__metric": "nll"}, r"task\.metric was 'accuracy' and is 'nll' now"),
        ({"objective__task__label_smoothing": 0.1}, r"objective\.task was .*0\.0.* and is .*0\.1"),
        ({"objective__logits__temperature": 3.0}, "(formula|logits) was"),
        ({"objective__features__weight": 0.5}, "(formula|features) was"),
        ({"objective__features__loss": "mse"}, r"features\.loss was '\"correlation\"' and is '\"mse\"'"),
        ({"objective__features__weight": 0}, "features was"),
        ({"scores__target": "logit"}, r"scores\.target was"),
        ({"student__num_layers": 1}, r"student\.num_layers was '2' and is '1' now"),
        ({"data__max_length": 12}, "max_length was"),
    ],
)
def test_F18_a_run_folder_of_another_recipe_is_refused_by_the_key_that_differs(
    material: Path, whole: RunRecord, changes: dict[str, Any], name: str
) -> None:
    """A run that went on would report what it did not train."""
    with pytest.raises(ArtifactError, match=name):
        run(material, "whole", **{**TWELVE, **changes})


def test_what_changes_no_number_may_change_in_a_run_folder(material: Path, whole: RunRecord) -> None:
    again = run(material, "whole", **TWELVE, training__dataloader_workers=1)
    assert [model.metrics for model in again.models] == [model.metrics for model in whole.models]


def test_a_run_that_is_not_to_be_resumed_starts_afresh(material: Path) -> None:
    run(material, "afresh", training__max_steps=4)
    first = weights(material, "afresh")
    record = run(material, "afresh", training__max_steps=4, training__resume=False, training__seed=1)
    assert [entry["step"] for entry in record.history] == [2, 4]
    assert any(not torch.equal(value, first[name]) for name, value in weights(material, "afresh").items())


def test_the_teacher_leaves_a_run_as_it_came(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    plain = pipeline.prepare

    def watched(recipe: Any, **options: Any) -> Any:
        ready = plain(recipe, **options)
        kept.extend([ready.teacher, model_fingerprint(ready.teacher)])
        return ready

    monkeypatch.setattr(pipeline, "prepare", watched)
    run(material, "teacher-left", objective__features__mapping="matched")
    teacher, before = kept
    assert model_fingerprint(teacher) == before
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


def test_L06_the_record_keeps_every_part_and_they_add_up(whole: RunRecord) -> None:
    # Every other step, and with each checkpoint, from which a run may go on.
    assert [entry["step"] for entry in whole.history] == [2, 3, 4, 6, 8, 9, 10, 12]
    for entry in whole.history:
        parts = [entry[f"{term}_weighted"] for term in ("task", "logits", "features")]
        assert sum(parts) == pytest.approx(entry["loss"], abs=1e-6)
        assert entry["feature_positions"] > 8
    for entry in whole.evaluations:
        parts = [entry[f"eval_{term}_weighted"] for term in ("task", "logits", "features")]
        assert sum(parts) == pytest.approx(entry["eval_loss"], abs=1e-6)
        assert entry["eval_nll"] == pytest.approx(entry["eval_task_raw"], abs=1e-5)
    assert [entry["step"] for entry in whole.evaluations] == [3, 6, 9, 12]


def test_the_best_evaluation_is_what_is_kept(material: Path) -> None:
    """With a rate that grows worse after the start, the best checkpoint is not the last."""
    record = run(
        material,
        "best",
        **TWELVE,
        training__learning_rate=0.3,
        training__schedule="constant",
        training__warmup_ratio=0.0,
        task__metric="nll",
    )
    values = [entry["eval_nll"] for entry in record.evaluations]
    best = 3 * (values.index(min(values)) + 1)
    assert best != 12, "else the last would do as well"
    checkpoint = load_file(material / "best" / "checkpoints" / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(value, checkpoint[name]) for name, value in weights(material, "best").items())


def test_a_run_of_one_step_learns(material: Path) -> None:
    record = run(material, "one-step", training__max_steps=1)
    before, after = record.model("student_before"), record.model("student")
    assert before is not None
    assert after is not None
    assert record.history[0]["learning_rate"] > 0
    assert before.metrics["nll"] != after.metrics["nll"]


def softmax(logits: Any) -> Any:
    exponent = np.exp(logits - logits.max(-1, keepdims=True))
    return exponent / exponent.sum(-1, keepdims=True)


def by_numpy(problem: str, logits: Any, labels: Any) -> dict[str, float]:
    """Metrics from the definitions, for what the record says."""
    if problem == "regression":
        predicted = logits[:, 0]
        return {"mse": np.square(predicted - labels).mean(), "pearson": np.corrcoef(predicted, labels)[0, 1]}
    if problem == "multi_label":
        chosen, truth = logits > 0, labels.astype(bool)
        hits = (chosen & truth).sum()
        return {
            "micro_f1": 2 * hits / max(chosen.sum() + truth.sum(), 1),
            "subset_accuracy": (chosen == truth).all(-1).mean(),
        }
    chances = softmax(logits)
    own = chances[np.arange(len(labels)), labels]
    return {"accuracy": (chances.argmax(-1) == labels).mean(), "nll": -np.log(own).mean()}


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_every_number_can_be_had_again_from_the_predictions(material: Path, problem: str) -> None:
    """Invariant 8, from the plain file, without any of our code."""
    tuned = {"teacher__fine_tune": {"epochs": 2, "learning_rate": 3e-3, "batch_size": 16}}
    record = run(material, f"numbers-{problem}", problem, **tuned)
    rows = lines(material, f"numbers-{problem}")
    assert len(rows) == record.data.rows["test"]
    labels = np.array([row["label"] for row in rows])
    logits = {role: np.array([row["logits"][role] for row in rows]) for role in rows[0]["logits"]}
    trivial = {"single_label": "most_frequent_class", "multi_label": "label_frequencies", "regression": "training_mean"}
    assert set(logits) == {"teacher", "student_before", "student", trivial[problem]}
    for model in record.models:
        said = trivial[problem] if model.role == "baseline" else model.role
        with np.errstate(invalid="ignore"):  # the correlation of a constant
            again = by_numpy(problem, logits[said], labels)
        for name, value in again.items():
            if model.metrics[name] is not None or model.role != "baseline":
                assert model.metrics[name] == pytest.approx(value, abs=1e-6), (said, name)
    student = record.model("student")
    assert student is not None
    if problem == "single_label":
        same = logits["student"].argmax(-1) == logits["teacher"].argmax(-1)
        assert student.metrics["agreement"] == pytest.approx(same.mean())
        p, q = softmax(logits["teacher"]), softmax(logits["student"])
        assert student.metrics["kl"] == pytest.approx((p * np.log(p / q)).sum(-1).mean(), abs=1e-6)
        differing = {row["id"] for row, agrees in zip(rows, same, strict=True) if not agrees}
        assert {found.id for found in record.disagreements} <= differing
        assert len(record.disagreements) == min(len(differing), 8)
        right = {role: logits[role].argmax(-1) == labels for role in ("teacher", "student")}
        assert record.outcomes["lost"] == (right["teacher"] & ~right["student"]).sum()
        assert record.outcomes["both_wrong"] == (~right["teacher"] & ~right["student"]).sum()
        for role, of_model in record.confusion.items():
            assert sum(count for label, said, count in of_model if label == said) == right[role].sum()
    assert [entry.name for entry in record.classes] == ([] if problem == "regression" else record.data.labels)
    assert (record.intervals is not None) == (record.metric not in ("spearman", "calibration_error"))


LOADING = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
with torch.no_grad():
    logits = [model(**tokenizer(text, return_tensors="pt")).logits[0].tolist() for text in texts]
assert not any(name.startswith("flexkd") for name in sys.modules)
print(json.dumps({"logits": logits, "parameters": model.num_parameters(), "labels": model.config.id2label}))
"""


def test_S02_a_fresh_process_without_flexkd_gets_the_same_logits(material: Path, whole: RunRecord) -> None:
    """Invariant 7."""
    rows = lines(material, "whole")[:6]
    by_id = {example.id: example.texts[0] for example in pipeline.prepare(recipe_of(material, "whole")).data.test}
    texts = json.dumps([by_id[row["id"]] for row in rows])
    command = [sys.executable, "-W", "ignore", "-c", LOADING, str(material / "whole" / "student"), texts]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert_close(torch.tensor(found["logits"]), torch.tensor([row["logits"]["student"] for row in rows]))
    assert found["labels"] == {"0": "bad", "1": "good"}
    assert found["parameters"] == sum(value.numel() for value in weights(material, "whole").values())


LATENCY = LatencyRecord(64, 8.0, 9.5, threads=1)


def measured_here(
    folders: list[Path], batches: list[dict[str, Any]], *, own_batches: dict[int, list[dict[str, Any]]], **_: Any
) -> list[Cost]:
    """Costs of models that really read their rows, one after the other in this process."""
    costs = []
    for place, folder in enumerate(folders):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        for batch in own_batches.get(place, batches):
            model(**model_inputs(model, batch))
        costs.append(Cost(model.num_parameters(), weight_bytes(folder), 50.0, 10**6, "cpu", latency=LATENCY))
    return costs


def test_a_student_with_a_larger_vocabulary_than_its_teacher_is_measured_and_described(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ids would be out of range in the teacher's embedding, which came up only after training."""
    monkeypatch.setattr(classification, "measure_costs", measured_here)
    own, small = material / "large", material / "small-teacher"
    tiny_model("distilbert", num_labels=2).save_pretrained(own)
    shifted_tokenizer(own, by=35)
    tiny_model("bert", num_labels=2, vocab_size=30).save_pretrained(small)
    write_tokenizer(small)
    start = {"student__start": "pretrained", "student__model": str(own), "teacher__model": str(small)}
    record = run(material, "large-run", **start, **NO_SHAPE, objective__features__positions="supervised")
    teacher, before, student, _ = record.models
    assert [model.hidden_size for model in record.models[:3]] == [32, 32, 32]
    saved = material / "large-run" / "student" / "model.safetensors"
    assert student.bytes_on_disk == saved.stat().st_size
    assert student.parameters == before.parameters == sum(value.numel() for value in load_file(saved).values())
    assert teacher.parameters == tiny_model("bert", num_labels=2, vocab_size=30).num_parameters()
    assert all((model.examples_per_second or 0) > 0 for model in record.models[:3])
    stored = RunRecord.read(material / "large-run" / "record.json")
    assert [model.latency for model in stored.models] == [LATENCY, LATENCY, LATENCY, None]


# One for each way in which weights are laid out; the contract of families holds for all.
@pytest.mark.parametrize(
    "model_type",
    ["bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert", "llama", "gemma2", "gpt2", "opt"],
)
def test_every_kind_of_family_goes_from_teacher_to_student(material: Path, model_type: str) -> None:
    folder = material / model_type
    tiny_model(model_type, num_labels=2).save_pretrained(folder)
    # Some types bring rules of their own for how words are cut; these sentences need the plain ones.
    teacher = {"teacher__model": str(folder), "teacher__tokenizer": str(material / "teacher")}
    record = run(material, f"family-{model_type}", **teacher, training__max_steps=6)
    # On the same rows; steps log the rows that each of them saw.
    first, last = (entry["eval_features_raw"] for entry in record.evaluations)
    assert last < first
    assert [model.hidden_size for model in record.models] == [32, 16, 16, 0]
    config = json.loads((material / f"family-{model_type}" / "student" / "config.json").read_text(encoding="utf-8"))
    before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for switch in ("use_cache", "output_hidden_states", "output_attentions", "tie_word_embeddings"):
        assert config.get(switch) == before.get(switch), switch


def test_L04_plain_fine_tuning_never_runs_the_teacher_on_training_rows(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveTeacher, "signal", lambda *_: pytest.fail("asked"))
    record = run(material, "baseline", objective__logits=None, objective__features=None, objective__baseline=True)
    assert record.objective == "loss = 1 * cross_entropy"
    assert set(record.history[0]) >= {"task_raw", "task_weighted"}
    assert not any(name.startswith(("logits", "features")) for name in record.history[0])


def test_M01_regression_rows_without_a_value_learn_from_the_teacher(material: Path) -> None:
    rows = material / "values.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for index, (text, kind) in enumerate(sentences(120)):
            file.write(json.dumps({"text": text, "label": None if index % 3 == 0 else kind + 0.1 * index}) + "\n")
    changes = {"data__train": str(rows), "data__unlabelled": "keep"}
    tuned = {"teacher__fine_tune": {"epochs": 1, "batch_size": 16}}
    record = run(material, "values", "regression", **changes, **tuned)
    assert all(math.isfinite(value) for entry in record.history for value in entry.values())
    assert record.history[-1]["task_raw"] > 0


def test_a_loss_that_knows_no_regression_is_refused_before_a_student_is_trained(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "train", lambda *_: pytest.fail("trained"))
    tuned = {"teacher__fine_tune": {"epochs": 1, "batch_size": 16}}
    with pytest.raises((UnsupportedModelError, FlexKDError), match=r"geometry|functional_cka"):
        run(material, "no-geometry", "regression", **tuned, objective__features__loss="functional_cka")


def test_rows_can_be_prepared_by_other_processes(material: Path) -> None:
    plain = run(material, "workers-0", training__max_steps=3)
    apart = run(material, "workers-1", training__max_steps=3, training__dataloader_workers=1)
    assert [entry["loss"] for entry in plain.history] == [entry["loss"] for entry in apart.history]


def test_a_student_that_is_not_there_is_named(material: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"evaluate: no folder '.*nowhere/student'"):
        pipeline.evaluate("student", recipe_of(material, "nowhere"))
