"""What docs/extend.md says is done to the letter on a copy of the repository: few files change, and all is green."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.source_tree import ROOT

MOST_FILES: Final = 4
COPIED: Final = ("src", "tests", "docs", "pyproject.toml")
DIFF: Final = re.compile(r"^( *)```diff\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository that may be changed; compiled modules go with it, which saves seconds."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("results"))
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def section_of_the_guide(heading: str) -> str:
    """A section of docs/extend.md."""
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def apply_guide(heading: str, root: Path) -> set[str]:
    """Make the changes of each diff block of a section below a folder.

    A block names its file after `---`; `@@` separates places in it. Lines without a sign say where: together with those
    that are removed they stand exactly once in the file.

    Returns:
        The files that changed.
    """
    changed = set()
    for indent, block in DIFF.findall(section_of_the_guide(heading)):
        first, *lines = (line.removeprefix(indent) for line in block.splitlines())
        path = first.removeprefix("--- ")
        text = (root / path).read_text(encoding="utf-8")
        for place in "\n".join(lines).split("\n@@\n"):
            before = _side(place, " -")
            assert text.count(before) == 1, f"{path}: {text.count(before)} places for\n{before}"
            text = text.replace(before, _side(place, " +"))
        (root / path).write_text(text, encoding="utf-8")
        changed.add(path)
    return changed


def _side(place: str, signs: str) -> str:
    """The lines of one side of a diff: those with no sign, and those with the sign of that side."""
    return "".join(f"{line[1:]}\n" for line in place.splitlines() if (line[:1] or " ") in signs)


def run_in(root: Path, *arguments: str) -> str:
    """Run Python on the copy; its output."""
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    command = [sys.executable, "-m", *arguments]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return result.stdout


def check_style(root: Path, files: set[str]) -> None:
    """What ruff says of files; the documents among them are no Python."""
    sources = [path for path in files if path.endswith(".py")]
    run_in(root, "ruff", "check", *sources)
    run_in(root, "ruff", "format", "--check", *sources)


@pytest.mark.slow
def test_the_guides_to_a_feature_loss_and_a_family_add_a_huber_loss_and_students_of_an_arcee(copy: Path) -> None:
    """Both in one copy, so that the libraries are imported once; the tests of each name what they see of it."""
    for heading in ("A feature loss", "A family"):
        changed = apply_guide(heading, copy)
        assert len(changed) <= MOST_FILES
        check_style(copy, changed)
    files = (
        "tests/contract/test_families.py",
        "tests/contract/test_losses.py",
        "tests/contract/test_loss_facts.py",
        "tests/core/test_accumulation.py",
        "tests/core/test_checks.py",
        "tests/costs/test_planning.py",
        "tests/pipeline/test_whole_job.py",
        "tests/test_public_names.py",
    )
    output = run_in(copy, "pytest", "-v", "-p", "no:cacheprovider", "-k", "huber or arcee", *files)
    for test in (
        "test_one_step_trains_a_student_of_half_the_width[huber] PASSED",
        "test_a_cache_in_int8_is_accepted_where_rounded_columns_mean_the_same[huber] PASSED",
        "test_a_recipe_takes_the_name_and_the_keys_that_are_read[huber] PASSED",
        "test_every_loss_of_features_is_planned[huber] PASSED",
        "test_every_feature_loss_trains[huber] PASSED",
        "test_every_loss_resolves_and_is_documented[huber] PASSED",
        "test_F13_A05_everything_kept_gives_the_teachers_logits[arcee-causal-tied] PASSED",
        "test_S02_S09_a_cut_student_is_saved_and_reloaded_with_its_ties[arcee-classification] PASSED",
        "test_a_cut_student_is_scored_at_its_head_and_at_a_block[arcee-causal] PASSED",
        "test_a_cut_student_learns_from_its_teachers_logits_and_units[arcee-causal] PASSED",
        "test_the_basis_of_a_stream_can_be_turned_where_the_row_says_so[arcee-causal] PASSED",
    ):
        assert test in output, f"{test} is not in\n{output}"
