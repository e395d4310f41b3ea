"""Runs that are asked to end, or whose newest checkpoint is damaged, end as the run that was left alone."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexkd.cli import app
from flexkd.errors import TrainingError
from flexkd.recipe import Recipe
from flexkd.report.delivery import distill
from flexkd.run_files import STATE_FILE, last_checkpoint
from flexkd.training.trainer import DistillationTrainer
from tests.job_files import fixed_costs, job

STEPS = {"training__max_steps": 9, "training__evaluations": 3, "training__logging_steps": 4}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("interruption")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        fixed_costs(patch)
        yield folder


def recipe_of(material: Path, name: str, **changes: Any) -> Recipe:
    quick = {"teacher__fine_tune": None, "teacher__allow_weak": True, "training__learning_rate": 3e-3}
    return job(material, output=str(material / name), **{**quick, **STEPS, **changes})


@pytest.fixture(scope="module")
def whole(material: Path) -> bytes:
    """The student of the run that is left alone."""
    recipe = recipe_of(material, "whole")
    distill(recipe)
    return student_of(recipe)


def student_of(recipe: Recipe) -> bytes:
    return (recipe.folder / "student" / "model.safetensors").read_bytes()


def steps_of(recipe: Recipe) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in (recipe.folder / "checkpoints").glob("checkpoint-*"))


def sends(number: signal.Signals, step: int) -> Any:
    """A `compute_loss` in which a signal comes."""
    plain = DistillationTrainer.compute_loss

    def compute_loss(self: DistillationTrainer, model: Any, *args: Any, **options: Any) -> Any:
        if model.training and self.state.global_step == step:
            signal.raise_signal(number)
        return plain(self, model, *args, **options)

    return compute_loss


@pytest.mark.parametrize("step", [1, 4])
def test_S01_ctrl_c_writes_a_checkpoint_of_its_step_and_the_run_goes_on_from_there(
    material: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    recipe = recipe_of(material, f"asked-{step}")
    caplog.set_level("INFO", "flexkd")
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "compute_loss", sends(signal.SIGINT, step))
        with pytest.raises(KeyboardInterrupt):
            distill(recipe)
    assert signal.getsignal(signal.SIGINT) is before
    assert steps_of(recipe)[-1] == step + 1
    assert "Interrupted: the training ends after this step, with a checkpoint." in caplog.text
    assert not (recipe.folder / "record.json").exists()
    record = distill(recipe)
    assert f"continuing from {recipe.folder / 'checkpoints' / f'checkpoint-{step + 1}'}" in caplog.text
    assert student_of(recipe) == whole
    assert record.history[-1]["step"] == 9


def test_the_checkpoint_of_an_interruption_stays_where_one_is_kept(
    material: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(material, "one-kept", training__keep_checkpoints=1)
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "compute_loss", sends(signal.SIGINT, 7))
        with pytest.raises(KeyboardInterrupt):
            distill(recipe)
    assert steps_of(recipe)[-1] == 8
    distill(recipe)
    assert student_of(recipe) == whole


def test_an_interruption_is_not_lost_behind_another_error(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupting = sends(signal.SIGINT, 4)

    def compute_loss(self: DistillationTrainer, model: Any, *args: Any, **options: Any) -> Any:
        value = interrupting(self, model, *args, **options)
        if model.training and self.state.global_step == 4:
            raise TrainingError("another")
        return value

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_loss)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe_of(material, "behind"))


def test_K08_a_checkpoint_without_one_of_its_files_is_not_taken(
    material: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(material, "lacking")
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "compute_loss", sends(signal.SIGINT, 7))
        with pytest.raises(KeyboardInterrupt):
            distill(recipe)
    newest = recipe.folder / "checkpoints" / "checkpoint-8"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"):
        (newest / name).rename(newest.parent / name)
        assert last_checkpoint(newest.parent) != newest, name
        (newest.parent / name).rename(newest / name)
    assert last_checkpoint(newest.parent) == newest
    (newest / "optimizer.pt").unlink()
    distill(recipe)
    assert student_of(recipe) == whole


def test_a_second_ctrl_c_ends_at_once(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(material, "twice")
    twice = sends(signal.SIGINT, 4)

    def compute_loss(self: DistillationTrainer, model: Any, *args: Any, **options: Any) -> Any:
        value = twice(self, model, *args, **options)
        if model.training and self.state.global_step == 4:
            signal.raise_signal(signal.SIGINT)
        return value

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_loss)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe)
    assert steps_of(recipe) == [3]


def test_sigterm_ends_a_command_with_code_130_and_what_goes_on(
    material: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(material, "terminated")
    file = material / "terminated.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "compute_loss", sends(signal.SIGTERM, 4))
        result = CliRunner().invoke(app, ["distill", str(file)])
    assert result.exit_code == 130, result.output
    assert f"run the same command: flexkd distill {file}" in result.output
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps_of(recipe)[-1] == 5
    assert CliRunner().invoke(app, ["distill", str(file)]).exit_code == 0
    assert student_of(recipe) == whole


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\x00" * 40),
        ("optimizer.pt", b"PK"),
        ("trainer_state.json", b'{"epoch": 1'),
        ("trainer_state.json", b"[1]"),
        (STATE_FILE, b""),
    ],
)
def test_K08_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    material: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str,
    content: bytes,
) -> None:  # fmt: skip
    recipe = recipe_of(material, f"damaged-{name}-{len(content)}")
    caplog.set_level("INFO", "flexkd")
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "compute_loss", sends(signal.SIGINT, 7))
        with pytest.raises(KeyboardInterrupt):
            distill(recipe)
    newest = recipe.folder / "checkpoints" / "checkpoint-8"
    sound = newest.with_name(f"checkpoint-{steps_of(recipe)[-2]}")
    (newest / name).write_bytes(content)
    assert last_checkpoint(newest.parent) == sound
    distill(recipe)
    assert f"{newest}: damaged ({name}: " in caplog.text
    assert newest.with_name("damaged-8").is_dir()
    assert f"continuing from {sound}" in caplog.text
    assert student_of(recipe) == whole
