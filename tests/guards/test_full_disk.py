"""What a disk does not take: one error that says which file, why and what to do, and the same command goes on."""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from flexkd.errors import DiskError, RecipeError
from flexkd.files import disk_error, writing, written_whole
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline import run as run_module
from flexkd.record import RunRecord
from flexkd.report import delivery
from flexkd.tasks.classification import ClassificationTask
from flexkd.teacher.cache import writer
from flexkd.training.trainer import DistillationTrainer
from tests.job_files import fixed_costs, job

Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a disk of some size."""
    disks: list[Path] = []

    def mounted(size: str, *options: str) -> Path:
        disk = tmp_path / f"disk{len(disks)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(disk)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount")
        if done.returncode != 0:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        disks.append(disk)
        return disk

    yield mounted
    for disk in disks:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    free = shutil.disk_usage(disk).free
    disk.joinpath("ballast").write_bytes(b"x" * free)


def writes(path: Path) -> dict[str, Callable[[], Any]]:
    """What writes a file, by the library."""
    tensors = {"weight": torch.zeros(50_000)}
    tokenizer = Tokenizer(models.WordLevel({f"word{number}": number for number in range(20_000)}, unk_token="word0"))

    def in_buffers() -> None:
        with path.open("w", encoding="utf-8") as file:
            file.write("x" * 200_000)

    return {
        "python": lambda: path.write_bytes(b"x" * 200_000),
        "python, buffered": in_buffers,
        "torch": lambda: torch.save(tensors, path),
        "safetensors": lambda: save_file(tensors, path),
        "tokenizers": lambda: tokenizer.save(str(path)),
    }


def test_K08_whatever_library_writes_to_a_full_disk_is_one_error_with_the_file(mount: Mount) -> None:
    disk = mount("64k")
    for library, write in writes(disk / "file").items():
        with pytest.raises(DiskError) as raised, writing(disk / "file"):
            write()
        assert re.fullmatch(
            rf"{re.escape(str(disk))}/file: No space left on device \(0\.\d MB are free\)\. Free some space there, "
            r"then run the same again: it goes on where it stopped\.",
            str(raised.value),
        ), library
        assert raised.value.errno == errno.ENOSPC
        (disk / "file").unlink(missing_ok=True)
    # A new one, as errors above may still hold open files.
    disk = mount("64k")
    disk.joinpath("file").write_text("before", encoding="utf-8")
    with pytest.raises(DiskError), written_whole(disk / "file") as partial:
        partial.write_bytes(b"x" * 200_000)
    assert [path.name for path in disk.iterdir()] == ["file"]
    assert disk.joinpath("file").read_text(encoding="utf-8") == "before"


def test_a_read_only_disk_is_one_error_too_and_refused_before_a_run(mount: Mount) -> None:
    disk = mount("64k", "ro")
    for library, write in writes(disk / "file").items():
        if library == "torch":
            continue  # it does not say why
        advice = r"Read-only file system\. Mount it so that it can be written, then"
        with pytest.raises(DiskError, match=advice), writing(disk / "file"):
            write()
    recipe = job(disk.parent, output=str(disk / "run"))
    with pytest.raises(RecipeError, match=r"cannot be written: .* is not writable"):
        delivery.distill(recipe)


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EDQUOT, r"MB are free\)\. Free some of your quota there"),
        (errno.EFBIG, "Raise the limit of this process"),
        (errno.EACCES, "Change its rights"),
        (errno.EPERM, "Change its rights"),
    ],
)
def test_a_quota_a_limit_and_a_right_have_their_own_advice(tmp_path: Path, number: int, cure: str) -> None:
    error = OSError(number, os.strerror(number), str(tmp_path / "named"))
    for raised, name in ((error, "named"), (RuntimeError(f"I/O error: ... (os error {number})"), "asked")):
        translated = disk_error(raised, tmp_path / "asked")
        assert re.match(rf"{re.escape(str(tmp_path / name))}: {os.strerror(number)}.*{cure}", str(translated))


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "no"), KeyError("28"), RecipeError("os error 28"), RuntimeError("x")):
        with pytest.raises(type(error)) as raised, writing(tmp_path):
            raise error
        assert raised.value is error


STAGES: dict[str, tuple[Any, str, str]] = {
    "scores": (run_module, "save_selection", "scores.safetensors"),
    "cache": (writer, "write_shard", "answers-00000.safetensors"),
    "checkpoint": (DistillationTrainer, "_save_checkpoint", "checkpoint-6"),
    "student": (pipeline, "save_student", "student"),
    "predictions": (ClassificationTask, "write", "predictions.jsonl"),
    "record": (RunRecord, "write", "record.json"),
    "page": (delivery.page, "write_report", "report.html"),
    "card": (delivery, "model_card", "README.md"),
}
"""What writes in each stage of a run, and which file or folder the error names."""


@pytest.mark.slow
def test_K08_a_run_goes_on_from_a_disk_that_was_full_in_every_stage(
    mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mount("16m")
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(writer, "DISK_MARGIN", 0)
    fixed_costs(monkeypatch)
    few = {"training__max_steps": 9, "training__evaluations": 3, "teacher__cache": "always"}
    weak = {"teacher__fine_tune": None, "teacher__allow_weak": True}
    whole = job(tmp_path, output=str(tmp_path / "whole"), **few, **weak)
    delivery.distill(whole)
    recipe = job(tmp_path, output=str(disk / "run"), **few, **weak)
    for stage, (place, name, file) in STAGES.items():
        plain = getattr(place, name)

        def filled(
            *args: Any, plain: Callable[..., Any] = plain, is_checkpoint: bool = stage == "checkpoint", **options: Any
        ) -> Any:
            if not is_checkpoint or args[0].state.global_step == 6:
                fill(disk)
            return plain(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, filled)
            with pytest.raises((DiskError, delivery.FlexKDError), match="No space left on device") as raised:
                delivery.distill(recipe)
        assert file in str(raised.value).partition(" ")[0], stage
        if stage == "checkpoint":
            assert [path.name for path in (recipe.folder / "checkpoints").iterdir()] == ["checkpoint-3"]
        disk.joinpath("ballast").unlink()
    delivery.distill(recipe)
    student = "student/model.safetensors"
    assert (recipe.folder / student).read_bytes() == (whole.folder / student).read_bytes()
    names = sorted(path.name for path in recipe.folder.iterdir())
    assert names == sorted(path.name for path in whole.folder.iterdir())
