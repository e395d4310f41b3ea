"""Evaluations count each row once: one, two and three processes, batches of 1, 2 and 5, say the same of seven rows."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import EvalPrediction

from flexkd.training.trainer import DistillationTrainer
from tests.training.language_rows import answer_rows
from tests.training.processes import run_together
from tests.training.test_distillation_trainer import objective, rows, trainer_of
from tests.training.test_text_trainer import goal_of
from tests.training.test_text_trainer import trainer_of as text_trainer_of

SIZES: Final = (1, 2, 5)
WORLDS: Final = (2, 3)
ROWS: Final = 7


class Stream(IterableDataset[dict[str, Any]]):
    """Rows without indices and without a length."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from rows(ROWS)


def of_outputs(prediction: EvalPrediction) -> dict[str, float]:
    """A figure that hangs on the order of the rows."""
    place = torch.arange(1.0, len(prediction.label_ids) + 1)
    logits = torch.as_tensor(prediction.predictions)
    found = {"rows": len(place), "order": float((place[:, None] * logits).sum())}
    found["labels"] = float((place * torch.as_tensor(prediction.label_ids)).sum())
    if prediction.inputs is not None:
        assert len(prediction.losses) == len(place)
        inputs = torch.as_tensor(prediction.inputs)
        found["inputs"] = float((place[:, None] * inputs.clamp(min=0)).sum())
    return found


class OfBatches:
    """The same figure, of one batch after the other."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.logits.append(torch.as_tensor(prediction.predictions))
        if not compute_result:
            return {}
        logits, self.logits = torch.cat(self.logits), []
        return of_outputs(EvalPrediction(logits, torch.zeros(len(logits))))


def gloo() -> dict[str, Any]:
    return {"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}


def classifier(folder: Path, size: int, metrics: Any = of_outputs, **changes: Any) -> DistillationTrainer:
    """With a projector, whose loss is a mean over positions, and rows of unequal lengths, one without a label."""
    torch.manual_seed(0)
    settings = {"per_device_eval_batch_size": size, **gloo(), "eval_accumulation_steps": 2, **changes}
    goal = objective(loss="projector", features=0.7)
    return trainer_of(folder, goal, rows(ROWS, unlabelled=[3]), arguments=settings, compute_metrics=metrics)


def usual(folder: Path, size: int) -> dict[str, Any]:
    """Settings of the training that must not reach an evaluation, and everything that metrics may ask for."""
    trainer = classifier(
        folder,
        size,
        train_sampling_strategy="group_by_length",
        dataloader_drop_last=True,
        include_for_metrics=["inputs", "loss"],
    )
    found = trainer.evaluate()
    predicted = trainer.predict(rows(ROWS))
    assert predicted.label_ids.tolist() == [row["labels"] for row in rows(ROWS)]
    return {**found, **predicted.metrics, "test_logits": predicted.predictions.tolist()}


def several(folder: Path, size: int) -> dict[str, Any]:
    """Two data sets, one of them smaller than the number of processes."""
    return classifier(folder, size).evaluate({"first": rows(5), "second": rows(1)})


def by_batch(folder: Path, size: int) -> dict[str, Any]:
    return classifier(folder, size, OfBatches(), batch_eval_metrics=True).evaluate()


def language(folder: Path, size: int) -> dict[str, Any]:
    trainer = text_trainer_of(folder, "llama", goal_of(), 3, per_device_eval_batch_size=size, **gloo())
    return trainer.evaluate(answer_rows()[:ROWS])


CASES: Final[dict[str, Callable[[Path, int], dict[str, Any]]]] = {
    "usual": usual,
    "stream": lambda folder, size: classifier(folder, size).evaluate(Stream()),
    "several": several,
    "by batch": by_batch,
    "language": language,
}


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """Without what a clock says, and the losses of batches."""
    clock = ("runtime", "per_second", "preparation_time", "epoch")
    return {name: value for name, value in found.items() if not name.endswith(clock)}


def all_of(folder: Path, size: int) -> dict[str, Any]:
    return {name: figures(CASES[name](folder, size)) for name in cases_of(size)}


def cases_of(size: int) -> list[str]:
    """All of them at two rows and at all rows; processes are slow."""
    return list(CASES) if size in (2, ROWS) else ["usual", "language"]


def work(folder: Path, world: int, rank: int) -> None:
    found = {size: all_of(folder, size) for size in SIZES}
    (folder / f"{world}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process that reads all rows at once."""
    return all_of(tmp_path_factory.mktemp("alone"), ROWS)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all processes found."""
    folder = tmp_path_factory.mktemp("together")
    run_together(work, folder, *WORLDS)
    return folder


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_R05_batches_change_no_figure(alone: dict[str, Any], tmp_path: Path, case: str, size: int) -> None:
    assert_same(figures(CASES[case](tmp_path, size)), alone[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_R05_processes_change_no_figure(alone: dict[str, Any], together: Path, case: str, world: int) -> None:
    for rank in range(world):
        found = json.loads((together / f"{world}-{rank}.json").read_text(encoding="utf-8"))
        for size in [size for size in SIZES if case in cases_of(size)]:
            assert_same(found[str(size)][case], alone[case])
