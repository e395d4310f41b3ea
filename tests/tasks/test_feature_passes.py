"""Positions of every pass, counted before a training: as the trainer counts them, and what is refused or said."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from flexkd.core.objective import Objective
from flexkd.errors import RecipeError, TrainingError
from flexkd.evaluate.cost import Cost
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline.job import prepare
from flexkd.pipeline.run import Run
from flexkd.recipe import Recipe
from flexkd.report.run_view import run_view
from flexkd.tasks import classification
from flexkd.tasks.feature_passes import check_passes, pass_positions, row_positions
from flexkd.training import micro_batches
from flexkd.training.failures import FeaturePositions
from tests.core.signals import feature_term
from tests.job_files import job, text_job, write_tokenizer
from tests.tiny import tiny_model

EXACT = {"training__precision": "float32", "teacher__precision": "float32", "teacher__fine_tune": None}
SUPERVISED = {"objective__features__positions": "supervised"}
MEANS = [name for name, facts in FEATURE_LOSS_FACTS.items() if not facts.is_statistic]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("passes")
        patch.setenv("FLEXKD_HOME", str(root / "home"))
        yield root


def recipe_of(folder: Path, kind: str, output: Path, **changes: Any) -> Recipe:
    """A recipe for a teacher of an architecture; `mean` is a classifier whose head reads the mean of all tokens."""
    material = folder / kind
    material.mkdir(exist_ok=True)
    changes = {**EXACT, "output": str(output), **changes}
    if kind == "mean" and not (material / "teacher").exists():
        tiny_model("modernbert", num_labels=2, classifier_pooling="mean").save_pretrained(material / "teacher")
        write_tokenizer(material / "teacher")
    return job(material, **changes) if kind in ("bert", "mean") else text_job(material, kind, **changes)


@pytest.mark.parametrize(
    ("kind", "positions", "training"),
    [
        ("bert", "supervised", {"batch_size": 12, "max_steps": 9}),
        ("bert", "supervised", {"batch_size": 24, "per_device_batch_size": 12, "epochs": 2.0}),
        ("bert", "tokens", {"batch_size": 8, "per_device_batch_size": 1, "max_steps": 3}),
        ("mean", "supervised", {"batch_size": 4, "per_device_batch_size": 1, "max_steps": 3}),
        ("llama", "supervised", {"batch_size": 4, "per_device_batch_size": 2, "max_steps": 14}),
        ("llama", "tokens", {"batch_size": 3, "per_device_batch_size": 1, "max_steps": 3}),
        ("t5", "supervised", {"batch_size": 5, "max_steps": 3}),
        ("t5", "tokens", {"batch_size": 4, "per_device_batch_size": 2, "max_steps": 3}),
    ],
)
def test_F02_the_trainer_counts_what_was_planned_pass_by_pass(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, positions: str, training: dict[str, Any]
) -> None:
    # A mean over positions, which is never refused.
    features = {"loss": "mse", "positions": positions}
    settings = {"seed": 3, "evaluations": 1, **training}
    recipe = recipe_of(folder, kind, tmp_path, objective__features=features, training=settings)
    passes: list[int] = []

    def see(self: FeaturePositions, counts: Sequence[int], *, max_steps: int) -> None:
        passes.extend(counts)

    monkeypatch.setattr(FeaturePositions, "see", see)
    ready = prepare(recipe)
    run = Run(ready, recipe, tmp_path)
    selection = run.select()
    start = run.start(selection)
    run.train(start, run.objective(start, selection)[1])
    rows = ready.splits["train"]
    of_rows = row_positions(recipe, rows, start.student.config)
    assert pass_positions(recipe, of_rows, [len(row["input_ids"]) for row in rows]).tolist() == passes


def rows_of(*lengths: int) -> list[dict[str, Any]]:
    return [{"id": str(index), "input_ids": [1] * length, "labels": 0} for index, length in enumerate(lengths)]


@pytest.mark.parametrize("loss", [name for name, facts in FEATURE_LOSS_FACTS.items() if not facts.needs_heads])
@pytest.mark.parametrize(
    ("positions", "training", "lengths", "fullest", "total"),
    [
        ("supervised", {"batch_size": 7}, [9] * 20, 7, 3),
        ("supervised", {"batch_size": 32, "per_device_batch_size": 4}, [9] * 64, 4, 16),
        ("supervised", {"batch_size": 32}, [9] * 5, 5, 1),
        ("tokens", {"batch_size": 4, "per_device_batch_size": 1}, [3, 4, 7, 5, 6], 7, 5),
        ("tokens", {"batch_size": 2}, [3, 3, 3, 3], 6, 2),
    ],
    ids=["batch", "accumulated", "few rows", "one row a pass", "short rows"],
)
def test_F02_passes_that_are_all_too_small_for_a_statistic_are_refused(
    folder: Path, loss: str, positions: str, training: dict[str, Any], lengths: list[int], fullest: int, total: int
) -> None:
    features = {"loss": loss, "positions": positions}
    settings = {"epochs": 1.0, **training}
    recipe = recipe_of(folder, "bert", folder / "refused", objective__features=features, training=settings)
    if loss in MEANS:
        assert check_passes(recipe, rows_of(*lengths), BertConfig()) == []
        return
    with pytest.raises(RecipeError) as refused:
        check_passes(recipe, rows_of(*lengths), BertConfig())
    key = "per_device_batch_size" if "per_device_batch_size" in training else "batch_size"
    advice = "objective.features.positions: tokens, or " if positions == "supervised" else ""
    assert str(refused.value) == (
        f"training.{key}: the fullest of {total} passes has {fullest} positions ({positions}), fewer than the 8 that "
        f"{loss} needs, so that no features are taught. Use more rows, {advice}objective.features: null."
    )


@pytest.mark.parametrize(
    ("positions", "training", "lengths", "counts"),
    [
        ("supervised", {"batch_size": 16, "epochs": 1.0}, [9] * 37, "1 of 3"),
        ("supervised", {"batch_size": 16, "epochs": 3.0}, [9] * 37, "3 of 9"),
        ("supervised", {"batch_size": 16, "max_steps": 4}, [9] * 37, "1 of 4"),
        ("supervised", {"batch_size": 16, "max_steps": 2}, [9] * 37, ""),
        ("supervised", {"batch_size": 16, "epochs": 1.0}, [9] * 40, ""),
        ("supervised", {"batch_size": 16, "per_device_batch_size": 8, "epochs": 2.0}, [9] * 43, "2 of 12"),
        ("tokens", {"batch_size": 4, "per_device_batch_size": 1, "epochs": 1.0}, [3, 9, 9, 7, 20], "2 of 5"),
    ],
)
def test_F02_passes_that_are_too_small_beside_others_are_counted(
    folder: Path, positions: str, training: dict[str, Any], lengths: list[int], counts: str
) -> None:
    features = {"loss": "cka", "positions": positions}
    recipe = recipe_of(folder, "bert", folder / "counted", objective__features=features, training=training)
    notes = check_passes(recipe, rows_of(*lengths), BertConfig())
    assert [note.partition(" planned passes")[0] for note in notes] == ([f"features: {counts}"] if counts else [])


def test_F02_skipped_passes_are_in_the_record_and_on_the_page(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = Cost(1000, 4000, 50.0, 10**6, "cpu")
    monkeypatch.setattr(classification, "measure_costs", lambda folders, *_, **__: [fixed] * len(folders))
    training = {"batch_size": 12, "max_steps": 9, "logging_steps": 1, "evaluations": 1}
    record = pipeline.distill(recipe_of(folder, "bert", tmp_path, **SUPERVISED, training=training))
    (note,) = [note for note in record.notes if note.startswith("features: ")]
    assert note == (
        "features: 1 of 9 planned passes have fewer than the 8 positions (supervised) that correlation needs, and "
        "teach no features. More rows in a pass (training.batch_size), or a number that leaves no short pass at the "
        "end of an epoch, avoids it."
    )
    assert sum(entry.get("skipped_feature_terms", 0) for entry in record.history) == 1
    assert note in run_view(record, "")["notes"]  # type: ignore[operator]
    assert note in caplog.text


def objective_of(loss: str) -> Objective:
    return Objective(features=feature_term(loss))


def test_F02_several_processes_fill_a_pass_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of four positions have enough: a statistic is computed over the positions of all."""
    monkeypatch.setattr(micro_batches, "num_processes", lambda: 2)
    monkeypatch.setattr(micro_batches.dist, "all_reduce", lambda counts: counts.mul_(2))
    (counts,) = micro_batches._step_counts([(4, 4, 4)], torch.device("cpu"))
    assert counts.micro_positions == 8
    FeaturePositions(objective_of("correlation")).see([counts.micro_positions], max_steps=1)


@pytest.mark.parametrize("loss", FEATURE_LOSS_FACTS)
def test_F02_a_trainer_without_a_recipe_stops_for_a_statistic_alone(
    loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    positions = FeaturePositions(objective_of(loss))
    if loss in MEANS:
        positions.see([1, 7], max_steps=1)
        assert not caplog.text
        return
    with pytest.raises(TrainingError, match=f"1 positions in one pass are fewer than the 8 that {loss} needs"):
        positions.see([1, 7], max_steps=1)
