"""Runs that are killed at random moments of any stage, and end as the run that nothing interrupted.

`make torture N=100` kills more often; the seed of the moments stands in each failure.
"""

import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file

from flexkd import processes
from flexkd.recipe import Recipe
from flexkd.report.delivery import distill
from flexkd.run_files import PREDICTIONS_FILE, RECORD_FILE, REPORT_FILE, SELECTION_FILE, STUDENT_FOLDER
from tests.job_files import fixed_costs, job, text_job, write_text_rows, write_text_tokenizer, write_tokenizer
from tests.tiny import tiny_model
from tests.training.processes import free_port, start_process

POINTS: Final = int(os.environ.get("TORTURE", "20"))
"""Kills in all."""
MOST_KILLS: Final = 3
"""Of one run."""
LONGEST: Final = 300.0
"""Seconds after which a run hangs."""
CLOCKS: Final = re.compile(r"created|seconds|peaks|runtime|per_second|environment|latency")
"""Keys of a record that say when and how fast, not what."""


@dataclass(frozen=True)
class Kind:
    """A kind of run: which recipe, with which values, and in how many processes."""

    make: Callable[..., Recipe]
    changes: Mapping[str, Any]
    world: int = 1


KINDS: Final = {
    "classifier, live": Kind(job, {"teacher__fine_tune__epochs": 4, "teacher__cache": "never"}),
    "classifier, cached, accumulated": Kind(
        job, {"teacher__fine_tune__epochs": 4, "teacher__cache": "always", "training__per_device_batch_size": 4}
    ),
    "causal, cached": Kind(text_job, {"teacher__cache": "always"}),
    "causal, live, accumulated": Kind(text_job, {"teacher__cache": "never", "training__per_device_batch_size": 8}),
    "seq2seq, live": Kind(text_job, {"teacher__cache": "never", "student__basis": "coordinates"}),
    "classifier, cached, two processes": Kind(
        job, {"teacher__fine_tune__epochs": 4, "teacher__cache": "always"}, world=2
    ),
}


def run(material: Path, place: Path, kind: str, rank: int, port: int) -> None:
    """One process of a run."""
    torch.set_num_threads(1)
    os.environ["FLEXKD_HOME"] = str(place / "home")
    world = KINDS[kind].world
    if world > 1:
        meeting = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in meeting.items()})
    fixed_costs(pytest.MonkeyPatch())
    distill(recipe_of(material, place, kind))
    processes.leave()
    os._exit(0)


def recipe_of(material: Path, place: Path, kind: str) -> Recipe:
    entry = KINDS[kind]
    # A log entry every four steps, a checkpoint every three: neither lies where the other does.
    few = {
        "training__evaluations": 3,
        "training__max_steps": 9,
        "training__logging_steps": 4,
        "teacher__allow_weak": True,
    }
    return entry.make(material, output=str(place / "run"), **few, **entry.changes)


def run_for(material: Path, place: Path, kind: str, seconds: float) -> bool:
    """Start a run, and kill all of its processes after some seconds; whether it had ended by then."""
    port = free_port()
    children = [start_process(run, material, place, kind, rank, port) for rank in range(KINDS[kind].world)]
    end = time.monotonic() + seconds
    while any(child.is_alive() for child in children) and time.monotonic() < end:
        time.sleep(0.01)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    assert not any(codes), f"{kind}: a process ended with {codes}"
    return None not in codes


@pytest.fixture(scope="module", params=KINDS)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path, float]:
    """A kind of run, its files, the folder of the run that nothing interrupted, and the seconds that it took."""
    kind, material = request.param, tmp_path_factory.mktemp("torture")
    teacher = material / "teacher"
    if kind.startswith("classifier"):
        tiny_model("bert", seed=3, num_labels=2).save_pretrained(teacher)
        write_tokenizer(teacher)
    else:
        causal = kind.startswith("causal")
        tiny_model("llama" if causal else "t5", "causal" if causal else "seq2seq", seed=3).save_pretrained(teacher)
        write_text_tokenizer(teacher)
        write_text_rows(material / "texts.jsonl")
    recipe_of(material, material, kind)
    # The first process of all waits until the server has imported everything.
    start_process(print).join()
    began = time.monotonic()
    assert run_for(material, material / "whole", kind, LONGEST), "it did not end"
    return kind, material, material / "whole" / "run", time.monotonic() - began


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(reference: tuple[str, Path, Path, float]) -> None:
    kind, material, whole, seconds = reference
    points = POINTS // len(KINDS) + (list(KINDS).index(kind) < POINTS % len(KINDS))
    survived, seed = 0, 0
    while survived < points:
        draw, place, kills = random.Random(f"{kind} {seed}"), material / f"killed-{seed}", 0
        while not run_for(material, place, kind, draw.uniform(0, seconds) if kills < MOST_KILLS else LONGEST):
            kills += 1
            assert kills <= MOST_KILLS, f"{kind}, seed {seed}: it did not end"
        differing = differences(whole, place / "run")
        assert not differing, f"{kind}, seed {seed}, killed {kills} times: {differing}"
        survived, seed = survived + kills, seed + 1


def differences(whole: Path, killed: Path) -> list[str]:
    """What a run that was killed has left otherwise than one that was not."""
    differing = []
    for name in (f"{STUDENT_FOLDER}/model.safetensors", PREDICTIONS_FILE):
        if (whole / name).read_bytes() != (killed / name).read_bytes():
            differing.append(name)
    scores = [load_file(folder / SELECTION_FILE) for folder in (whole, killed)]
    if scores[0].keys() != scores[1].keys() or any(
        not torch.equal(scores[0][key], scores[1][key]) for key in scores[0]
    ):
        differing.append(SELECTION_FILE)
    records = [timeless(json.loads((folder / RECORD_FILE).read_text("utf-8")), folder) for folder in (whole, killed)]
    differing += [f"{RECORD_FILE}: {key}" for key in records[0] if records[0][key] != records[1].get(key)]
    if not (killed / REPORT_FILE).read_text("utf-8").rstrip().endswith("</html>"):
        differing.append(REPORT_FILE)
    return differing


def timeless(value: Any, folder: Path) -> Any:
    """A part of a record without times, speeds and the place of the run."""
    if isinstance(value, dict):
        return {key: timeless(entry, folder) for key, entry in value.items() if not CLOCKS.search(key)}
    if isinstance(value, list):
        return [timeless(entry, folder) for entry in value]
    return value.replace(str(folder.parent), "PLACE") if isinstance(value, str) else value
