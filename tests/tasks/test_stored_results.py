"""What a teacher said is computed once; a file that is damaged or of something else is not believed."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flexkd.tasks.stored_results import StoredResults, remembered

MADE_OF = {"teacher": "abc", "rows": "def"}
VALUES = {"answers": ["yes", "no"], "nll": float("inf")}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path))
    return tmp_path / "answers"


def ask(calls: list[int], made_of: dict[str, str] = MADE_OF, *, fits: bool = True) -> StoredResults:
    def compute() -> StoredResults:
        calls.append(1)
        return StoredResults(VALUES, {"states": torch.arange(6.0).reshape(2, 3).T, "logits": torch.ones(2).bfloat16()})

    def unpack(stored: StoredResults) -> StoredResults:
        if not fits:
            raise ValueError("other rows")
        return stored

    return remembered("answers", made_of, compute, pack=lambda results: results, unpack=unpack)


def test_results_come_back_equal_for_the_same_teacher_alone(home: Path) -> None:
    calls: list[int] = []
    first, second = ask(calls), ask(calls)
    assert calls == [1]
    assert second.values == first.values == VALUES
    assert all(torch.equal(second.tensors[name], tensor) for name, tensor in first.tensors.items())
    for name in MADE_OF:
        ask(calls, {**MADE_OF, name: "another"})
    assert len(calls) == 3
    assert len(list(home.iterdir())) == 3


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def swap(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {**header, "made_of": json.dumps({"teacher": "other"})})


def empty(path: Path) -> None:
    save_file({}, path)


@pytest.mark.parametrize("spoil", [damage, flip, swap, empty])
def test_a_spoilt_file_is_not_used_and_written_anew(
    home: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
) -> None:
    calls: list[int] = []
    ask(calls)
    (path,) = home.iterdir()
    spoil(path)
    caplog.set_level(logging.WARNING, logger="flexkd")
    assert ask(calls).values == VALUES
    assert calls == [1, 1]
    assert f"{path}: not used, it is damaged or of something else" in caplog.text
    ask(calls)
    assert calls == [1, 1]


def test_results_that_do_not_fit_the_rows_are_computed_again(home: Path) -> None:
    calls: list[int] = []
    ask(calls)
    ask(calls, fits=False)
    assert calls == [1, 1]


def test_a_folder_that_cannot_be_written_to_costs_nothing_but_time(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home.write_text("a file in the place of the folder")
    calls: list[int] = []
    assert ask(calls).values == ask(calls).values == VALUES
    assert calls == [1, 1]
    assert "cannot be written" in caplog.text
