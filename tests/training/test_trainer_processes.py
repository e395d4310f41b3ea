"""Two gloo processes of the trainer: loss, gradient, every part and the checkpoint equal those of one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file

from flexkd.run_files import STATE_FILE
from flexkd.training.trainer import DistillationTrainer
from tests.closeness import assert_close
from tests.training.processes import run_together
from tests.training.test_distillation_trainer import objective, rows, trainer_of
from tests.training.test_text_trainer import goal_of
from tests.training.test_text_trainer import trainer_of as text_trainer_of

STEPS: Final = 3


def one_step(folder: Path, features: float, others: float, **changes: Any) -> DistillationTrainer:
    """Half of the rows have no label, and with features alone no term reads the head."""
    goal = objective(features=features, task=others, logits=others)
    return trainer_of(folder, goal, rows(unlabelled=range(8)), arguments=changes)


def answers(folder: Path, chunk: int | str, **changes: Any) -> DistillationTrainer:
    """Answers of unequal lengths."""
    return text_trainer_of(folder, "llama", goal_of(), chunk, train_sampling_strategy="sequential", **changes)


def uneven(folder: Path, size: int, **changes: Any) -> DistillationTrainer:
    """Two epochs in a drawn order, each with a last step of a few rows."""
    settings = {"max_steps": 4, "per_device_train_batch_size": size, "gradient_accumulation_steps": 2, **changes}
    return trainer_of(folder, objective(), rows(19, unlabelled=[1, 17]), arguments=settings)


def uneven_answers(folder: Path, chunk: int | str, size: int, **changes: Any) -> DistillationTrainer:
    trainer = answers(folder, chunk, max_steps=4, per_device_train_batch_size=size, **changes)
    trainer.train_dataset = trainer.train_dataset[:11]
    return trainer


def several_steps(folder: Path, size: int, **changes: Any) -> DistillationTrainer:
    """Three accumulated steps over rows grouped by length, half of them without a label, with a projector."""
    torch.manual_seed(0)
    settings = {
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": size,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": STEPS,
        "train_sampling_strategy": "group_by_length",
        **changes,
    }
    goal = objective(loss="projector", features=0.7, task=0.4, logits=0.3)
    return trainer_of(folder, goal, rows(32, unlabelled=range(0, 32, 2)), arguments=settings)


# What each of two processes trains, and what one process trains with all rows.
TWO: Final[dict[str, Callable[[Path], DistillationTrainer]]] = {
    "all-terms": lambda folder: one_step(folder, 1.0, 1.0, per_device_train_batch_size=8, ddp_backend="gloo"),
    "features": lambda folder: one_step(folder, 1.0, 0.0, per_device_train_batch_size=8, ddp_backend="gloo"),
    "chunks": lambda folder: answers(folder, 3, per_device_train_batch_size=8, ddp_backend="gloo"),
    "steps": lambda folder: several_steps(folder, 4, ddp_backend="gloo"),
    "uneven": lambda folder: uneven(folder, 4, ddp_backend="gloo"),
    "uneven-chunks": lambda folder: uneven_answers(folder, 3, 5, ddp_backend="gloo"),
}
ONE: Final[dict[str, Callable[[Path], DistillationTrainer]]] = {
    "all-terms": lambda folder: one_step(folder, 1.0, 1.0),
    "features": lambda folder: one_step(folder, 1.0, 0.0),
    "chunks": lambda folder: answers(folder, "off"),
    "steps": lambda folder: several_steps(folder, 8),
    "uneven": lambda folder: uneven(folder, 8),
    "uneven-chunks": lambda folder: uneven_answers(folder, "off", 10),
}


def found_in(trainer: DistillationTrainer, evaluates: bool) -> dict[str, Any]:
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluated = trainer.evaluate() if evaluates else {}
    return {"logs": logs, "evaluated": evaluated, "parallel": trainer.args.parallel_mode.value}


def in_a_child(folder: Path, world: int, rank: int) -> None:
    found = {name: found_in(make(folder / name), name == "steps") for name, make in TWO.items()}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What each has found."""
    run_together(in_a_child, folder, 2)
    return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("name", ["all-terms", "features", "chunks"])
def test_X01_X02_two_processes_step_like_one(two: list[dict[str, Any]], tmp_path: Path, name: str) -> None:
    """Rows without labels, no term that reads the head, and logits three predictions at a time."""
    expected, found = found_in(ONE[name](tmp_path), False)["logs"][0], two[0][name]["logs"][0]
    parts = [part for part in expected if part.endswith(("_raw", "_weighted")) or part in ("loss", "grad_norm")]
    assert len(parts) == {"all-terms": 8, "features": 4, "chunks": 8}[name]
    for part in [*parts, "feature_positions"]:
        assert_close(found[part], expected[part], dtype=torch.float32)


def test_X02_L06_several_steps_of_two_processes_are_those_of_one(
    two: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    alone = found_in(ONE["steps"](tmp_path), True)
    both = [one["steps"] for one in two]
    assert [one["parallel"] for one in both] == ["distributed", "distributed"]
    for one in both:
        for entry, other in zip(one["logs"], alone["logs"], strict=True):
            names = [name for name in other if name.endswith(("_raw", "_weighted"))]
            assert len(names) == 6
            for name in ["loss", "grad_norm", "feature_positions", *names]:
                assert_close(entry[name], other[name], dtype=torch.float32)
        evaluated = alone["evaluated"]
        for name in [name for name in evaluated if name.endswith(("loss", "_raw", "_weighted"))]:
            assert_close(one["evaluated"][name], evaluated[name], dtype=torch.float32)
    for name in ("model.safetensors", STATE_FILE):
        one, other = (load_file(run / f"checkpoint-{STEPS}" / name) for run in (tmp_path, folder / "steps"))
        assert one.keys() == other.keys()
        for key, value in one.items():
            # AdamW divides by the root of a square: where that is tiny, a rounding of the sum shows.
            assert_close(other[key], value, dtype=torch.float16)


@pytest.mark.parametrize("name", ["uneven", "uneven-chunks"])
def test_R05_an_epoch_of_several_processes_has_each_row_once(
    two: list[dict[str, Any]], tmp_path: Path, name: str
) -> None:
    """Three rows, then one, are left for the last step of an epoch: none of them is the second process's."""
    expected = found_in(ONE[name](tmp_path), False)["logs"]
    assert len(expected) == 4
    for one in two:
        for entry, other in zip(one[name]["logs"], expected, strict=True):
            for part in [
                part for part in other if part.endswith(("_raw", "_weighted")) or part in ("loss", "grad_norm")
            ]:
                assert_close(entry[part], other[part], dtype=torch.float32)
