"""Locks of folders: they end with their process, and whoever comes second learns which process it is."""

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkd import check
from flexkd.errors import ArtifactError
from flexkd.guards.locks import awaited, holder, locked
from flexkd.guards.work import hold_folder, in_run_folder
from flexkd.pipeline import compare, distill, sharing, sizes
from flexkd.pipeline.answering import answer_training_rows
from flexkd.pipeline.search.tuning import tune
from flexkd.report import delivery
from flexkd.run_files import LOCK_FILE
from tests.job_files import job

HOLDS = """
import os, sys, time
from pathlib import Path
from flexkd.guards.locks import locked
lock = Path(sys.argv[1])
with locked(lock, what=str(lock), advice="name another"):
    if "forks" in sys.argv and os.fork() == 0:
        time.sleep(1.5)
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that holds a lock until its standard input ends."""
    children: list[subprocess.Popen[str]] = []

    def start(lock: Path, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDS, str(lock), *more]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.__exit__(None, None, None)


def try_lock(lock: Path) -> None:
    with locked(lock, what="runs/a", advice="name another output"):
        assert str(os.getpid()) in lock.read_text(encoding="utf-8")


def test_K08_a_lock_names_its_process_and_ends_with_it(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    lock = tmp_path / "lock"
    child = hold(lock, "forks")
    who = f"process {child.pid} on {socket.gethostname()}"
    assert holder(lock) == who
    with pytest.raises(
        ArtifactError, match=re.escape(f"runs/a: {who} works there. Wait for it, or name another output.")
    ):
        try_lock(lock)
    child.kill()
    child.wait()
    # Its fork, as a worker that loads batches, still holds it for a moment.
    try_lock(lock)
    assert holder(lock) == ""
    assert list(tmp_path.iterdir()) == []


def test_who_needs_what_another_process_makes_waits_for_it(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]], caplog: pytest.LogCaptureFixture
) -> None:
    child = hold(tmp_path / "lock")
    caplog.set_level("INFO", "flexkd")
    assert child.stdin is not None
    threading.Timer(1.0, child.stdin.close).start()
    with awaited(tmp_path / "lock", what="teacher 1f"):
        assert child.wait(timeout=5) == 0
    assert caplog.messages == [
        f"teacher 1f: process {child.pid} on {socket.gethostname()} is making it; waiting, to use what it has made"
    ]


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "flexkd.distill": delivery.distill,
    "flexkd.compare": delivery.compare,
    "flexkd.sizes": delivery.sizes,
    "flexkd.tune": tune,
    "distill": distill.distill,
    "score": distill.score,
    "compare": compare.compare,
    "sizes": sizes.sizes,
    "cache": sharing.cache_answers,
    "cache --verify": sharing.verify_answers,
    "generate": answer_training_rows,
}


def test_X03_a_second_run_in_a_folder_is_refused_at_once_by_every_entry_and_by_check(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = job(tmp_path)
    recipe.folder.mkdir()
    child = hold(recipe.folder / LOCK_FILE)
    message = (
        f"{recipe.folder}: process {child.pid} on {socket.gethostname()} works there. Wait for it, or name another "
        "output."
    )

    def too_late(*args: Any, **options: Any) -> None:
        raise AssertionError("rows or models are read")

    monkeypatch.setattr("flexkd.preflight.checking.read_inputs", too_late)
    monkeypatch.setattr("flexkd.pipeline.comparison.load_config", too_late)
    for name, entry in ENTRIES.items():
        with pytest.raises(ArtifactError) as raised:
            entry(recipe)
        assert str(raised.value) == message, name
    assert check(recipe).problems == [message]


def test_a_folder_is_held_from_the_checks_to_the_end_of_the_outermost_function(tmp_path: Path) -> None:
    recipe = job(tmp_path)
    lock = recipe.folder / LOCK_FILE

    @in_run_folder
    def inner(recipe: Any) -> bool:
        hold_folder(recipe.folder)
        return lock.is_file()

    @in_run_folder
    def outer(recipe: Any, *, fails: bool = False) -> None:
        assert not recipe.folder.exists()
        assert inner(recipe)
        assert lock.is_file()
        if fails:
            raise ArtifactError("refused")
        recipe.folder.joinpath("record").touch()

    with pytest.raises(ArtifactError, match="refused"):
        outer(recipe=recipe, fails=True)
    assert not recipe.folder.exists()
    outer(recipe)
    assert [path.name for path in recipe.folder.iterdir()] == ["record"]
    hold_folder(recipe.folder)  # outside of such a function
    assert not lock.exists()
