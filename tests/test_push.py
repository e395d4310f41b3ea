"""Students on the hub: checked before a run, uploaded after it, and never lost when that fails."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

import flexkd
from flexkd.cli import app
from flexkd.errors import ArtifactError, FlexKDError, RecipeError, UploadError
from flexkd.pipeline import distill as pipeline
from flexkd.preflight import preflight
from flexkd.recipe import Recipe
from tests.fake_hub import TOKEN, FakeHub, Repository, fake_hub
from tests.job_files import fixed_costs, job

FAST = {"teacher__fine_tune": None, "teacher__allow_weak": True, "training__max_steps": 2, "training__evaluations": 1}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch) as server:
        yield server


def pushed(folder: Path, repo: str = "me/tiny", **changes: Any) -> Recipe:
    return job(folder, **FAST, push_to_hub={"repo": repo, **changes})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run that uploads nothing; its student and tokenizer were loaded from folders of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        fixed_costs(patch)
        folder = tmp_path_factory.mktemp("private home")
        job(folder)
        shutil.copytree(folder / "teacher", folder / "small")
        student = {"start": "pretrained", "model": str(folder / "small"), "tokenizer": str(folder / "small")}
        plain = {"student__hidden_size": None, "student__num_layers": None}
        recipe = job(
            folder, **FAST, **plain, **{f"student__{key}": value for key, value in student.items()},
            objective__features__mapping="matched",
        )  # fmt: skip
        flexkd.distill(recipe)
        return recipe


def test_a_run_uploads_its_student_with_the_card_and_nothing_else(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_costs(monkeypatch)
    recipe = pushed(tmp_path, private=True)
    (tmp_path / "job.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    result = CliRunner().invoke(app, ["distill", str(tmp_path / "job.yaml")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"uploaded: {hub.endpoint}/me/tiny/commit/" in result.output
    assert hub.repositories["me/tiny"].private
    files = hub.repositories["me/tiny"].branches["main"]
    assert files == files_of(recipe.folder / "student")
    assert {"README.md", "config.json", "flexkd.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert hub.requests[0] == "GET /api/whoami-v2", "asked before anything else"


def test_no_path_of_the_machine_is_in_a_students_folder(finished: Recipe) -> None:
    """The recipe in the card keeps the names of files, which say what the student was made of, not their folders."""
    folder = finished.folder
    private = str(folder.parent).encode()
    assert [name for name, data in files_of(folder / "student").items() if private in data] == []
    card = (folder / "student" / "README.md").read_text(encoding="utf-8")
    assert "distilled from `teacher`" in card
    assert "rows of `single_label.jsonl`" in card
    assert re.search(r"^  train: single_label.jsonl$", card, re.MULTILINE)
    assert re.search(r"^  model: small$", card, re.MULTILINE)
    assert "base_model" not in card
    assert private.decode() in (folder / "record.json").read_text(encoding="utf-8"), "the record stays at home"


def test_a_student_is_pushed_from_its_run_or_its_folder(finished: Recipe, hub: FakeHub) -> None:
    folder = finished.folder / "student"
    flexkd.push(finished.folder, "tiny")
    flexkd.push(str(folder), "team/tiny", private=True, revision="v1")
    assert hub.repositories["me/tiny"].branches["main"] == files_of(folder)
    assert not hub.repositories["me/tiny"].private
    assert hub.repositories["team/tiny"].branches["v1"] == files_of(folder)
    assert hub.repositories["team/tiny"].branches["main"] == {}


def test_a_failed_upload_loses_nothing_and_its_command_uploads(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_costs(monkeypatch)
    recipe = pushed(tmp_path, "team/tiny", private=True, revision="a b")
    hub.refused["POST /api/repos/create"] = 403
    with pytest.raises(UploadError) as error:
        flexkd.distill(recipe)
    message, command = str(error.value).splitlines()
    assert message.startswith(f"push_to_hub: the run is finished and its student lies in '{recipe.folder / 'student'}'")
    assert "refused by the test" in message
    assert (recipe.folder / "record.json").is_file()
    assert (recipe.folder / "student" / "README.md").is_file()
    assert (recipe.folder / "report.html").is_file()
    hub.refused.clear()
    arguments = shlex.split(command.removeprefix("To upload it: "))
    result = CliRunner().invoke(app, arguments[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert hub.repositories["team/tiny"].private
    assert hub.repositories["team/tiny"].branches["a b"] == files_of(recipe.folder / "student")


def _no_token(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    monkeypatch.delenv("HF_TOKEN")


def _other_token(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")


def _offline(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def _no_network(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def _reads_only(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    hub.accounts[TOKEN]["auth"]["accessToken"]["role"] = "read"


def _is_public(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    hub.repositories["me/tiny"] = Repository(private=False)


def _is_busy(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    hub.refused["GET /api/whoami-v2"] = 429


@pytest.mark.parametrize(
    ("spoil", "repo", "begin"),
    [
        (_no_token, "me/tiny", "push_to_hub: there is no token of the hub on this machine. Run 'hf auth login' or set"),
        (_other_token, "me/tiny", "push_to_hub: http://127.0.0.1:PORT does not know the token of this machine"),
        (_offline, "me/tiny", "push_to_hub: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids uploads. Unset it, or set"),
        (_no_network, "me/tiny", "push_to_hub: http://127.0.0.1:PORT cannot be reached ("),
        (_reads_only, "me/tiny", "push_to_hub: the token of this machine may only read."),
        (_is_public, "me/tiny", "push_to_hub.private: 'me/tiny' exists and is public."),
        (_is_busy, "me/tiny", "push_to_hub: http://127.0.0.1:PORT refuses to answer ("),
        (lambda *_: None, "other/tiny", "push_to_hub.repo: 'other/tiny' is of 'other', and the token of this machine"),
    ],
)
def test_what_would_fail_is_found_before_the_first_forward(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, spoil: Any, repo: str, begin: str
) -> None:
    """By `check` in the same words; commands that upload nothing do not ask."""
    spoil(monkeypatch, hub)
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a forward"))
    recipe = pushed(tmp_path, repo, private=True)
    (problem,) = preflight(recipe).problems
    assert re.sub(r":\d+ ", ":PORT ", problem).startswith(begin)
    with pytest.raises(FlexKDError) as refused:
        pipeline.distill(recipe)
    assert str(refused.value) == problem
    before = list(hub.requests)
    for resumes in ("nothing", "scores", "comparison"):
        assert preflight(recipe, resumes=resumes).problems == []
    assert hub.requests == before


@pytest.mark.parametrize("repo", ["a/b/c", "me/my model", "-me/x", "me/x..y", "me/x.git"])
def test_a_repository_without_a_possible_name_is_a_mistake_in_the_recipe(tmp_path: Path, repo: str) -> None:
    with pytest.raises(RecipeError, match=r"push_to_hub.repo: '.*' is no name of a repository \(.*\)\. Write it as"):
        pushed(tmp_path, repo)


def test_a_token_does_not_belong_into_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape("push_to_hub.token: unknown key.")):
        pushed(tmp_path, token="hf_x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "notes.md").write_text(f"see {folder}/x\n", "utf-8"), "notes.md:1: names '"),
        (lambda folder: (folder / "more.txt").symlink_to(folder.parent / "recipe.yaml"), "is a link to a file outside"),
        (lambda folder: (folder / "config.json").unlink(), "holds no finished student. Give a run folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no finished student. Give a run folder"),
    ],
)
def test_what_does_not_belong_on_the_hub_stays_here(
    finished: Recipe, hub: FakeHub, tmp_path: Path, change: Any, words: str
) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    change(tmp_path / "run" / "student")
    with pytest.raises(ArtifactError, match=re.escape(words)):
        flexkd.push(tmp_path / "run", "me/tiny")
    assert hub.requests == []


def test_hidden_files_stay_here(finished: Recipe, hub: FakeHub, tmp_path: Path) -> None:
    shutil.copytree(finished.folder / "student", tmp_path / "student")
    (tmp_path / "student" / ".git").mkdir()
    (tmp_path / "student" / ".git" / "config").write_text("token", encoding="utf-8")
    flexkd.push(tmp_path / "student", "me/tiny")
    assert hub.repositories["me/tiny"].branches["main"] == files_of(finished.folder / "student")


def test_a_finished_cell_knows_nothing_of_uploads(tmp_path: Path) -> None:
    """Students of a comparison are compared whether their recipe uploads or not."""
    from flexkd.preflight.comparison import cell_recipe

    plain, uploading = job(tmp_path, **FAST), pushed(tmp_path)
    cells = [cell_recipe(recipe, 0, tmp_path)[1] for recipe in (plain, uploading)]
    assert json.dumps(cells[0]) == json.dumps(cells[1])
