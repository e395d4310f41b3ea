"""Jobs whose teacher answers from disk: the same losses, one pass for all students, and nothing stored unasked."""

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import flexkd.pipeline.compare
from flexkd.cli import app
from flexkd.core.objective import Objective, Signal
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.data.encoding.collation import Collator
from flexkd.errors import ArtifactError, RecipeError
from flexkd.evaluate.cost import Cost
from flexkd.pipeline import caching
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline import teacher as teacher_module
from flexkd.pipeline.sharing import cache_answers
from flexkd.recipe import override_recipe
from flexkd.record import RunRecord
from flexkd.tasks import classification, generation
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest, Teacher
from flexkd.training.trainer import DistillationTrainer
from tests.invariants.test_resume import Stop, history
from tests.job_files import job, text_job
from tests.teacher.cache.caches import cache_of
from tests.tiny import tiny_model
from tests.training.language_rows import answer_rows, collator_of
from tests.training.test_distillation_trainer import arguments
from tests.training.test_distillation_trainer import rows as classified_rows

UNITS = torch.arange(0, 32, 2)
# Correlations of a few positions, with states that float16 or int8 rounded.
ROUNDED = {"float16": 2e-3, "int8": 2e-2}


def trainer_of(folder: Path, teacher: Teacher, goal: Objective, data: Any, *, stops: bool = False) -> Any:
    """Three epochs of shuffled batches of three, a checkpoint at step 4."""
    is_text = isinstance(teacher, Teacher) and isinstance(data[0]["labels"], list)
    model = tiny_model("llama", "causal", seed=4) if is_text else tiny_model("bert", seed=4)
    changes = {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4}
    return DistillationTrainer(
        model=model,
        teacher=teacher,
        objective=goal,
        args=arguments(folder, per_device_train_batch_size=3, logging_steps=1, **changes),
        train_dataset=data,
        data_collator=collator_of(model) if is_text else Collator(0),
        callbacks=[Stop()] if stops else [],
    )


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize(("kind", "top"), [("bert", None), ("llama", None), ("llama", 6)])
def test_K01_live_and_cached_teachers_give_one_sequence_of_losses(
    tmp_path: Path, kind: str, top: int | None, storage: str
) -> None:
    """Eight rows, shuffled, three epochs, batches of three, and a resume at step 4."""
    is_text = kind == "llama"
    model = tiny_model(kind, "causal" if is_text else "classification", seed=1)
    data = answer_rows(8) if is_text else classified_rows(8)
    goal = Objective(TaskTerm(), LogitTerm(top_k=top), FeatureTerm(layers=(LayerPair.of_units(UNITS),)))
    live = trainer_of(tmp_path / "live", LiveTeacher(model), goal, data)
    live.train()
    cached = cache_of(tmp_path / "cache", model, SignalRequest.of(goal), data, storage=storage)
    trainer_of(tmp_path / "cached", cached, goal, data, stops=True).train()
    resumed = trainer_of(tmp_path / "cached", cached, goal, data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cached" / "checkpoint-4"))
    ours, theirs = history(resumed), history(live)
    assert len(theirs) == 9
    assert [entry["feature_positions"] for entry in ours] == [entry["feature_positions"] for entry in theirs]
    assert len({entry["loss"] for entry in theirs}) == 9
    for one, two in zip(ours, theirs, strict=True):
        for part in ("loss", "logits_raw", "features_raw"):
            assert one[part] == pytest.approx(two[part], rel=ROUNDED[storage]), part


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("caching")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        fixed = Cost(1000, 4000, 50.0, 10**6, "cpu")
        for task in (classification, generation):
            patch.setattr(task, "measure_costs", lambda folders, *_, **__: [fixed] * len(folders))
        yield folder


@pytest.fixture
def texts(material: Path) -> Path:
    """Rows and a teacher of models that write."""
    folder = material / "texts"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of a teacher for its signals."""
    found: list[int] = []
    plain = LiveTeacher.signal

    def watched(self: LiveTeacher, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        found.append(len(batch["example_id"]))
        return plain(self, batch, request)

    monkeypatch.setattr(LiveTeacher, "signal", watched)
    return found


def recipe_of(material: Path, name: str, **changes: Any) -> Any:
    quick = {
        "output": str(material / name),
        "teacher__fine_tune": None,
        "training__precision": "float32",
        "teacher__precision": "float32",
        "training__learning_rate": 3e-3,
        "training__max_steps": 12,
    }
    return job(material, **{**quick, **changes})


def losses(record: RunRecord) -> list[float]:
    return [entry["loss"] for entry in [*record.history, *record.evaluations] if "loss" in entry]


BATCHES = [32, 32, 32, 3]
"""Rows of training and validation, as they are asked."""


def test_K01_a_run_from_a_cache_learns_as_from_the_live_teacher(material: Path, asked: list[int]) -> None:
    cached = pipeline.distill(recipe_of(material, "cached"))
    assert asked == [1, *BATCHES], "the shapes, then each row once"
    again = pipeline.distill(recipe_of(material, "again"))
    assert losses(again) == losses(cached)
    asked.clear()
    live = pipeline.distill(recipe_of(material, "live", teacher__cache="never"))
    assert len(asked) >= 12
    assert not (material / "live" / "cache").exists()
    for one, two in zip(cached.history, live.history, strict=True):
        for part in ("loss", "features_raw"):
            assert one[part] == pytest.approx(two[part], rel=1e-3)


def test_auto_stores_nothing_for_one_pass_or_beyond_its_limit(
    material: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.distill(recipe_of(material, "one-pass", training__max_steps=3))
    assert not (material / "one-pass" / "cache").exists()
    pipeline.distill(recipe_of(material, "one-pass-always", training__max_steps=3, teacher__cache="always"))
    assert (material / "one-pass-always" / "cache").is_dir()
    monkeypatch.setattr(caching, "AUTOMATIC_BYTES", 1000)
    with caplog.at_level(logging.INFO, "flexkd"):
        pipeline.distill(recipe_of(material, "large"))
    assert "teacher: runs on every batch, as its answers take" in caplog.text
    assert not (material / "large" / "cache").exists()


def test_a_cache_that_was_built_alone_is_found_by_the_run(material: Path, asked: list[int]) -> None:
    for name, changes in (("alone", {}), ("alone-in-a-folder", {"teacher__cache": str(material / "answers")})):
        recipe = recipe_of(material, name, training__max_steps=2, **changes)
        said = cache_answers(recipe).describe()
        assert f"{sum(BATCHES)} rows" in said
        assert "bytes a position" in said
        asked.clear()
        cache_answers(recipe)
        record = pipeline.distill(recipe)
        assert asked == [BATCHES[0]] * 2, "the first rows are compared"
        assert record.history
    asked.clear()
    pipeline.distill(recipe_of(material, "another-run", teacher__cache=str(material / "answers")))
    assert asked == [BATCHES[0]], "a named folder serves any run with the same teacher, rows and units"


def test_R09_another_attention_back_end_or_precision_is_refused_for_answers_and_scores(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(material, "engine", training__max_steps=2, teacher__cache=str(material / "by-engine"))
    cache_answers(recipe)
    with pytest.raises(ArtifactError, match=r"scores.safetensors: .*precision was 'float32' and is 'bfloat16' now"):
        cache_answers(override_recipe(recipe, ["teacher.precision=bfloat16"]))
    for file in ("scores.safetensors", None):
        # The rule for short rows on a CPU, switched off: transformers chooses.
        monkeypatch.setattr(teacher_module, "prefer_short_rows_attention", lambda *_: None)
        place = r"scores\.safetensors" if file else "by-engine"
        with pytest.raises(ArtifactError, match=rf"{place}.*: attention was 'eager' and is 'sdpa' now\. Choose"):
            pipeline.distill(recipe)
        (material / "engine" / "scores.safetensors").unlink()


def test_R09_the_command_compares_a_cache_that_is_there(
    material: Path, capsys: pytest.CaptureFixture[str], asked: list[int]
) -> None:
    recipe = recipe_of(material, "verified", training__max_steps=2)
    path = material / "verified.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    arguments_of = ["cache", str(path), "--verify"]
    refused = CliRunner().invoke(app, arguments_of)
    assert refused.exit_code == 2
    assert (
        "holds no complete cache of what this recipe reads. Make it first: flexkd cache without --verify."
        in refused.output
    )
    cache_answers(recipe)
    asked.clear()
    done = CliRunner().invoke(app, arguments_of)
    assert done.exit_code == 0, done.output
    assert re.search(
        r"verified: 67 rows were answered again: predictions deviate by \S+ of a logit \(limit ", done.output
    )
    assert asked == [BATCHES[0], BATCHES[2], BATCHES[3]]


def test_there_is_no_cache_of_a_teacher_that_is_not_read(material: Path) -> None:
    with pytest.raises(RecipeError, match=r"teacher\.cache: 'never' makes no cache"):
        cache_answers(recipe_of(material, "never", teacher__cache="never"))
    baseline = {"objective__logits": None, "objective__features": None, "objective__baseline": True}
    with pytest.raises(RecipeError, match=r"objective\.baseline: true reads no teacher"):
        cache_answers(recipe_of(material, "baseline", **baseline))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher__cache_storage": "int8"}, r"storage was 'float16' and is 'int8' now"),
        ({"data__max_length": 12}, r"max_length was '16' and is '12' now"),
        ({"teacher__model": "another"}, r"teacher was '\w+' and is '\w+' now"),
        ({"data__train": "others"}, r"data was '\w+' and is '\w+' now; rows was"),
    ],
)
def test_K07_a_named_folder_of_another_run_is_refused(
    material: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """The same path with other weights, and the same file with other rows."""
    folder = {"teacher__cache": str(material / "held")}
    if not (material / "held").exists():
        cache_answers(recipe_of(material, "held-by", **folder))
    if changes.get("teacher__model"):
        changes = {"teacher__model": str(tmp_path / "teacher")}
        shutil.copytree(material / "teacher", tmp_path / "teacher")
        tiny_model("bert", seed=4, num_labels=2).save_pretrained(tmp_path / "teacher")
    if changes.get("data__train"):
        lines = (material / "single_label.jsonl").read_text(encoding="utf-8").splitlines()
        (tmp_path / "rows.jsonl").write_text("\n".join(lines[:-4]), encoding="utf-8")
        changes = {"data__train": str(tmp_path / "rows.jsonl")}
    with pytest.raises(ArtifactError, match=message):
        cache_answers(recipe_of(material, f"other-{next(iter(changes))}", **folder, **changes))


def test_other_units_get_a_cache_of_their_own_beside_the_first(material: Path) -> None:
    folder = {"teacher__cache": str(material / "beside")}
    first = cache_answers(recipe_of(material, "beside-1", **folder, objective__features__units=4))
    fewer = cache_answers(recipe_of(material, "beside-2", **folder, objective__features__units=3))
    other = cache_answers(recipe_of(material, "beside-3", **folder, objective__features__positions="supervised"))
    assert first.folder == fewer.folder != other.folder
    assert other.folder.parent == first.folder.parent == material / "beside"


def test_a_comparison_asks_the_teacher_once_for_all_its_methods(material: Path, asked: list[int]) -> None:
    recipe = recipe_of(material, "compared", training__max_steps=3)
    methods = ("fine_tuning", "logit_kd", "projector", "flexkd", "flexkd_random")
    flexkd.pipeline.compare.compare(recipe, methods=methods, seeds=(0, 1))
    assert asked == [1, *BATCHES]
    assert len(list((material / "compared" / "cache").iterdir())) == 1
    shutil.rmtree(material / "compared" / "cells" / "flexkd-1")
    asked.clear()
    flexkd.pipeline.compare.compare(recipe, methods=methods, seeds=(0, 1))
    assert asked == [BATCHES[0]], "the first rows are compared"


def test_a_search_over_rules_builds_what_each_of_them_reads(texts: Path) -> None:
    """Temperatures of a top differ in what is stored, so that there are two caches and no third."""
    changes = {"teacher__fine_tune": None, "training__max_steps": 2, "objective__logits__top_k": 4}
    recipe = text_job(texts, **changes, output=str(texts / "rules"), student__basis="coordinates")
    grid = {"objective.logits.temperature": (1.0, 2.0), "training.learning_rate": (1e-4, 1e-3)}
    flexkd.pipeline.compare.compare(recipe, methods=("logit_kd", "flexkd"), seeds=(0, 1), search=grid)
    assert len(list((texts / "rules" / "cache").iterdir())) == 2


@pytest.mark.parametrize("basis", ["coordinates", "rotated"])
def test_K03_a_top_of_all_outputs_teaches_as_all_outputs_do(texts: Path, basis: str) -> None:
    """Language models from a cache, in units and in directions."""
    changes = {"teacher__fine_tune": None, "training__precision": "float32", "teacher__precision": "float32"}
    found = {}
    for k in (None, 61, 5):
        name = {"output": str(texts / f"top-{k}-{basis}"), "objective__logits__top_k": k, "student__basis": basis}
        found[k] = pipeline.distill(text_job(texts, **changes, **name, training__max_steps=6))
    parts = {k: [entry["logits_raw"] for entry in record.history] for k, record in found.items()}
    assert parts[61] == pytest.approx(parts[None], rel=1e-3)
    # Divergences of fewer categories are not larger, at the first log at which the students are the same.
    assert 0 < parts[5][0] < parts[None][0]
    assert "top_k=5" in found[5].objective
