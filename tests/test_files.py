"""Paths as people write them, and files that are written whole or not at all."""

import os
import pwd
import re
from pathlib import Path

import pytest

from flexkd.data.sources.rows import read_rows
from flexkd.errors import FlexKDError, RecipeError
from flexkd.files import local_path, output_file, why_not_writable, written_whole
from flexkd.home import home_folder
from flexkd.models.loading.pretrained import model_location
from flexkd.preflight import preflight
from flexkd.preflight.model_files import check_tokenizer, find_model
from flexkd.recipe import load_recipe
from flexkd.record import RunRecord
from tests.job_files import job


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runs/a", "runs/a"),
        ("./runs//a/", "runs/a"),
        ("../other", "../other"),
        ("~", "{home}"),
        ("~/runs/a/", "{home}/runs/a"),
        ("~{user}/a", "{user_home}/a"),
        ("./~/a", "~/a"),
        ("a/~/b", "a/~/b"),
        ("$SCRATCH/a", "{scratch}/a"),
        ("${SCRATCH}/a", "{scratch}/a"),
        ("cash$.csv", "cash$.csv"),
    ],
)
def test_R10_a_path_is_read_by_one_rule(tmp_path: Path, text: str, path: str) -> None:
    user = pwd.getpwuid(os.getuid())
    places = {"home": tmp_path / "home", "scratch": tmp_path / "scratch", "user_home": user.pw_dir}
    written = text.replace("{user}", user.pw_name)
    assert local_path(written, where="output") == Path(path.format(**places))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "$NOWHERE/a",
            "output: '$NOWHERE/a': the environment variable 'NOWHERE' is not set. Set it, or write the path out.",
        ),
        ("~no-such-user/a", "output: '~no-such-user/a': that user has no home folder. Write the path out."),
        ("runs\\a", "output: 'runs\\a' is written as on Windows. Here '/' separates folders, as in 'runs/a'."),
        ("C:/runs/a", "output: 'C:/runs/a' is written as on Windows. Here '/' separates folders, as in 'runs/a'."),
        (
            "s3://bucket/a",
            "output: 's3://bucket/a' is a URL, not a path on this machine. Fetch it, then give its path.",
        ),
        ("runs/a\n", "output: 'runs/a\\n' holds a line break or another control character. Remove it."),
        (f"runs/{'n' * 256}", f"output: 'runs/{'n' * 256}' holds a name of more than 255 bytes. Shorten it."),
        ("runs/" * 900, "output: a path of more than 4095 bytes. Shorten it."),
        ("a\0b", "output: 'a\\x00b' holds a line break or another control character. Remove it."),
    ],
)
def test_R10_a_path_that_can_be_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        local_path(text, where="output")
    assert str(error.value) == message


def test_R10_what_is_there_under_its_very_name_is_taken() -> None:
    Path("a$NOWHERE").mkdir()
    Path("b\\c.csv").write_text("text,label\n", encoding="utf-8")
    assert local_path("a$NOWHERE/new", where="output") == Path("a$NOWHERE/new")
    assert local_path("b\\c.csv", where="data") == Path("b\\c.csv")


def test_R10_the_home_folder_is_meant_wherever_a_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    recipe = job(home, output="~/run", teacher__cache="~/cache", data__train="~/single_label.jsonl")
    assert recipe.output == "~/run"
    assert recipe.folder == home / "run"
    assert recipe.cache_folder == home / "cache"
    assert len(read_rows("~/single_label.jsonl")) == len(read_rows("~/single_*.jsonl")) == 120
    for name in ("~/teacher", "~/teacher/", "$HOME/teacher"):
        assert find_model("teacher.model", name, weights=True).folder == home / "teacher"
        check_tokenizer("teacher.tokenizer", name)
        assert model_location(name, where="teacher.model") == str(home / "teacher")
    monkeypatch.delenv("FLEXKD_HOME", raising=False)
    for variable, folder in (("XDG_CACHE_HOME", "c/flexkd/teachers"), ("FLEXKD_HOME", "c/teachers")):
        monkeypatch.setenv(variable, "~/c")
        assert home_folder("teachers") == home / folder
    (home / "record.json").write_text("{", encoding="utf-8")
    with pytest.raises(FlexKDError, match="damaged"):
        RunRecord.read("~/record.json")
    assert preflight(load_recipe("~/single_label.yaml", ["teacher.model=~/teacher", "output=~/x"])).problems == []
    assert not Path("~").exists()


def test_R10_a_folder_that_cannot_be_made_is_told_by_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("", encoding="utf-8")
    Path("folder").mkdir()
    here = Path.cwd()
    assert why_not_writable(Path("folder/a/b")) == why_not_writable(Path("folder")) == ""
    assert why_not_writable(Path("file")) == "it is a file"
    assert why_not_writable(here / "file/a/b") == f"'{here / 'file'}' is a file"
    assert why_not_writable(Path("x" * 300)) == "File name too long"
    Path("loose").symlink_to("no/where")
    assert why_not_writable(here / "loose/a") == f"'{here / 'loose'}' is a link to 'no/where', which is not there"
    assert output_file("new/folder/page.html", where="--output") == Path("new/folder/page.html")
    for path, reason in (
        ("folder", "'folder' is a folder. Name a file in it."),
        ("file/page.html", "'file/page.html' cannot be written: 'file' is a file. Name another file."),
    ):
        with pytest.raises(RecipeError, match=f"^{re.escape(f'--output: {reason}')}$"):
            output_file(path, where="--output")
    monkeypatch.setattr("os.access", lambda place, _: place != Path("file"))
    with pytest.raises(RecipeError, match=r"it is not writable\. Name another file\.$"):
        output_file("file", where="--output")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert why_not_writable(here / "folder/a") == f"'{here / 'folder'}' is not writable"


def test_R10_a_file_is_written_whole_or_not_at_all() -> None:
    target = Path("new/file.txt")
    with written_whole(target) as partial:
        partial.write_text("first", encoding="utf-8")
    with pytest.raises(UnicodeEncodeError), written_whole(target) as partial:
        partial.write_text("sec\ud800", encoding="utf-8")
    assert target.read_text(encoding="utf-8") == "first"
    assert list(target.parent.iterdir()) == [target]
