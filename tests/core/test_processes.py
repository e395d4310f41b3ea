"""Two and three processes that train together must learn what one process learns from all their rows."""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flexkd.core.losses import FEATURE_LOSSES, LOGIT_LOSSES
from flexkd.core.objective import Objective, ObjectiveValue, Signal, StepCounts
from flexkd.core.terms import FeatureTerm, LogitTerm, TaskTerm
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from tests.closeness import assert_close
from tests.core.signals import feature_term, part_of
from tests.references import correlation as reference
from tests.references.draws import classes, normal
from tests.training.processes import PRELOADED

# Rows of each process: the uneven pair of case X02, one process without rows, three with an empty one amid them.
SPLITS: Final = {"2-8": (2, 8), "12-0": (12, 0), "5-0-7": (5, 0, 7)}
INPUTS, UNITS, CLASSES = 6, 4, 3
ADDITIVE: Final = [
    "task",
    *sorted(LOGIT_LOSSES),
    *(n for n, facts in FEATURE_LOSS_FACTS.items() if not facts.is_statistic),
]
TERMS: Final = ["task", *sorted(LOGIT_LOSSES), *sorted(FEATURE_LOSSES), "all"]


class Student(nn.Module):
    """Features under a head, as a classifier has them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(INPUTS, UNITS), nn.Linear(UNITS, CLASSES)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        states = self.body(inputs)
        return self.head(states), states


def objective_of(term: str) -> Objective:
    torch.manual_seed(1)
    if term == "all":
        return Objective(TaskTerm(weight=0.3), LogitTerm(temperature=2.0), FeatureTerm(weight=0.5))
    if term == "task":
        return Objective(TaskTerm())
    if term in LOGIT_LOSSES:
        return Objective(logits=LogitTerm(term, temperature=2.0))
    return Objective(features=feature_term(term, UNITS, UNITS))


def rows_of(total: int, sizes: tuple[int, ...]) -> tuple[Tensor, Signal, Tensor]:
    """Inputs, what the teacher says, and labels of all processes.

    Unit 0 of the teacher is constant in each process and differs between them; unit 1 is constant but for a rounding,
    which a process without rows can know only from the others.
    """
    inputs, states = normal(total, INPUTS, seed=2, mean=1.0), normal(total, UNITS, seed=3, mean=2.0)
    if 0 not in sizes:
        states[:, 0] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    states[:, 1] = 3.0
    states[::2, 1] += 2 * torch.finfo(torch.float32).eps
    return inputs, Signal(normal(total, CLASSES, seed=4), (states,)), classes(total, num_classes=CLASSES, seed=5)


def outcome(model: nn.Module, objective: Objective, value: ObjectiveValue) -> dict[str, Any]:
    return {
        "loss": value.loss.detach(),
        "parts": value.parts,
        "counts": value.counts,
        "gradients": [p.grad for p in (*model.parameters(), *objective.parameters())],
    }


def one_step(term: str, sizes: tuple[int, ...], rank: int | None, micro_batches: int = 1) -> dict[str, Any]:
    """Gradients after one step, of process `rank`, or of one process with all rows."""
    total = sum(sizes)
    inputs, teacher, labels = rows_of(total, sizes)
    start, stop = (0, total) if rank is None else (sum(sizes[:rank]), sum(sizes[: rank + 1]))
    torch.manual_seed(0)
    model: nn.Module = Student()
    objective = objective_of(term)
    wrapped = model if rank is None else DistributedDataParallel(model)
    bounds = [start + (stop - start) * part // micro_batches for part in range(micro_batches + 1)]
    value = None
    for number, (low, high) in enumerate(itertools.pairwise(bounds)):
        together = [s * (number + 1) // micro_batches - s * number // micro_batches for s in sizes]
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = number == micro_batches - 1
        logits, states = wrapped(inputs[low:high])
        counts = StepCounts(total, total, sum(together))
        value = objective(Signal(logits, (states,)), part_of(teacher, slice(low, high)), labels[low:high], counts)
        value.loss.backward()
    assert value is not None
    return outcome(model, objective, value)


def pure_loss(name: str, sizes: tuple[int, ...], rank: int) -> dict[str, Tensor]:
    """Value and gradient of a loss itself, with a mask that hides one row of each process that has any."""
    total = sum(sizes)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    student = normal(total, UNITS, seed=6)[rows].requires_grad_()
    mask = torch.arange(len(student)) > 0
    value = FEATURE_LOSSES[name](student, normal(total, UNITS, seed=7)[rows], mask, across_processes=True)
    value.mean().backward()
    assert student.grad is not None
    return {"value": value.detach(), "gradient": student.grad}


def _recording(reduce: Callable[..., Any], contiguous: list[bool]) -> Callable[..., Any]:
    def record(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        contiguous.append(tensor.is_contiguous())
        return reduce(tensor, *arguments, **options)

    return record


def work(rank: int, directory: str) -> None:
    """Body of each process: every split that has a place for it, in a group of just that many processes."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    contiguous: list[bool] = []
    dist.all_reduce = _recording(dist.all_reduce, contiguous)
    for split, sizes in SPLITS.items():
        if rank >= len(sizes):
            continue
        dist.init_process_group(
            "gloo", init_method=f"file://{directory}/meet-{split}", rank=rank, world_size=len(sizes)
        )
        results: dict[str, Any] = {term: one_step(term, sizes, rank) for term in TERMS}
        results |= {f"{term} in two": one_step(term, sizes, rank, micro_batches=2) for term in ADDITIVE}
        results["pure"] = {name: pure_loss(name, sizes, rank) for name in FEATURE_LOSSES}
        results["contiguous"] = all(contiguous)
        torch.save(results, Path(directory) / f"{split}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What every process of every split found."""
    directory = tmp_path_factory.mktemp("processes")
    # A server imports everything once, and each process is a fork of it.
    torch.multiprocessing.set_forkserver_preload(PRELOADED)
    context = torch.multiprocessing.start_processes(
        work, args=(str(directory),), nprocs=3, join=False, start_method="forkserver"
    )
    # A process that waits for another's message would wait for half an hour.
    deadline = time.monotonic() + 120
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    return {
        split: [torch.load(directory / f"{split}-{rank}.pt") for rank in range(len(sizes))]
        for split, sizes in SPLITS.items()
    }


every_split = pytest.mark.parametrize("split", list(SPLITS))


@every_split
@pytest.mark.parametrize("term", TERMS)
def test_X02_gradients_are_those_of_one_process_with_all_rows(
    results: dict[str, list[dict[str, Any]]], split: str, term: str
) -> None:
    # Case X01 as well: a term on features alone leaves no parameter of the head without its (zero) gradient.
    alone = one_step(term, SPLITS[split], None)
    for found in results[split]:
        assert found[term]["counts"].keys() == alone["counts"].keys()
        for name, count in alone["counts"].items():
            assert found[term]["counts"][name] == count
        for actual, expected in zip(found[term]["gradients"], alone["gradients"], strict=True):
            assert_close(actual, expected)
    together = torch.stack([found[term]["loss"] for found in results[split]])
    assert_close(together.mean(), alone["loss"])


@every_split
@pytest.mark.parametrize("term", TERMS)
def test_L06_weighted_parts_add_up_in_every_process_and_raw_ones_average_to_the_whole(
    results: dict[str, list[dict[str, Any]]], split: str, term: str
) -> None:
    alone = one_step(term, SPLITS[split], None)
    for found in results[split]:
        weighted = sum(part for name, part in found[term]["parts"].items() if name.endswith("_weighted"))
        assert_close(weighted, found[term]["loss"])
    for name, part in alone["parts"].items():
        assert_close(torch.stack([found[term]["parts"][name] for found in results[split]]).mean(), part)


@every_split
@pytest.mark.parametrize("term", ADDITIVE)
def test_M03_accumulation_over_several_processes_changes_no_additive_term(
    results: dict[str, list[dict[str, Any]]], split: str, term: str
) -> None:
    alone = one_step(term, SPLITS[split], None)
    for found in results[split]:
        for actual, expected in zip(found[f"{term} in two"]["gradients"], alone["gradients"], strict=True):
            assert_close(actual, expected)


@every_split
@pytest.mark.parametrize("name", sorted(FEATURE_LOSSES))
def test_F04_a_statistic_is_taken_over_the_rows_of_all_processes(
    results: dict[str, list[dict[str, Any]]], split: str, name: str
) -> None:
    sizes = SPLITS[split]
    student, teacher = (states.split(sizes) for states in (normal(sum(sizes), UNITS, seed=s) for s in (6, 7)))
    # Each process hides its first row.
    ours, theirs = torch.cat([s[1:] for s in student]).requires_grad_(), torch.cat([t[1:] for t in teacher])
    expected = FEATURE_LOSSES[name](ours, theirs)
    expected.mean().backward()
    found = [one["pure"][name] for one in results[split]]
    for one in found:
        assert_close(one["value"], expected)
    gradient = torch.cat([one["gradient"][1:] for one in found])
    assert ours.grad is not None
    assert_close(gradient, len(sizes) * ours.grad)
    if name == "correlation":
        assert_close(found[0]["value"], reference.correlation(ours.detach(), theirs))
        assert_close(gradient / len(sizes), reference.correlation_gradient(ours.detach(), theirs), dtype=torch.float32)


def test_F01_a_unit_is_dead_only_if_it_is_in_all_processes_together(
    results: dict[str, list[dict[str, Any]]],
) -> None:
    for found in itertools.chain(*results.values()):
        assert found["correlation"]["counts"]["dead_teacher_units"] == 1
        assert found["correlation"]["counts"]["dead_student_units"] == 0


@every_split
def test_every_message_is_contiguous(results: dict[str, list[dict[str, Any]]], split: str) -> None:
    # gloo takes any layout that is dense, NCCL does not.
    assert all(found["contiguous"] for found in results[split])
