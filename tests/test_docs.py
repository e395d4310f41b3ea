"""What the documents say is true: commands, links, versions, sources, covered cases."""

import re
import runpy
import subprocess
import tomllib
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import flexkd
from flexkd.packages import PACKAGES
from flexkd.recipe.document import read_document
from flexkd.recipe.messages import key_fields
from flexkd.reference.json_schema import key_examples
from tests.source_tree import PACKAGE, ROOT, modules

HIDDEN = {".git", ".venv", "runs", "build", "dist", "site"}
DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md") if not any(p in HIDDEN or p[0] == "." for p in path.relative_to(ROOT).parts)
)
CASE = re.compile(r"\b([A-Z]\d\d)\b")
TEST_FILE = re.compile(r"\btests/[\w/]+\.py")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_lines(text: str) -> list[str]:
    """Lines of fenced blocks and spans of inline code."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()] + spans


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Every call of a program in the documents and in the headers of recipes: where, and its arguments."""
    found = []
    for path in [*DOCUMENTS, *ROOT.glob("recipes/**/*.yaml"), *PACKAGE.glob("demos/*.yaml")]:
        text = text_of(path)
        lines = [line.lstrip("# ") for line in text.splitlines()] if path.suffix == ".yaml" else code_lines(text)
        for line in lines:
            # A column of explanation stands two spaces or a comment sign away.
            call = re.split(r"\s{2,}|\s#", line.removeprefix(".venv/bin/"))[0].split()
            if call[:1] == [program] and len(call) > 1:
                found.append((f"{where(path)}: {line}", call[1:]))
    return found


def test_readme_names_the_commands_of_a_newcomer() -> None:
    calls = [" ".join(call) for origin, call in commands("make") if origin.startswith("README.md")]
    assert {"demo", "test"} <= set(calls)


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    wrong = [origin for origin, call in commands("make") if not {one for one in call[:1] if "=" not in one} <= targets]
    assert not wrong, f"no such target: {wrong}. There are {sorted(targets)}."


@pytest.mark.parametrize(("origin", "call"), [pytest.param(*one, id=one[0][:70]) for one in commands("flexkd")])
def test_flexkd_commands_in_the_documents_exist(origin: str, call: list[str]) -> None:
    from flexkd.cli import app

    result = CliRunner().invoke(app, [*alternative(call), "--help"])
    assert result.exit_code == 0, f"{origin}\n{result.output}"
    assert "Usage" in result.output


def alternative(call: list[str]) -> list[str]:
    """Its first reading: `demo a|b` stands for `demo a`, and `[KEY=VALUE ...]` may be left out."""
    plain = re.sub(r"\[[^\]]*\]|\.\.\.", "", " ".join(call))
    return [word.split("|")[0] for word in plain.split()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=where)
def test_relative_links_lead_somewhere(path: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)|<img[^>]+src=\"([^\"]+)\"", text_of(path)):
        target, _, anchor = (link[0] or link[1]).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(link[0] or link[1])
    assert not broken, f"{where(path)}: broken links {broken}"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_changelog_speaks_of_this_version() -> None:
    found = re.search(r"^## \[(\d+\.\d+\.\d+)\]", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert found, "CHANGELOG.md has no version"
    assert found.group(1) == flexkd.__version__


def test_the_pins_hold_what_the_package_asks_for() -> None:
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    groups = project["dependency-groups"]
    asked = [*project["project"]["dependencies"], *groups["dev"], *groups["dist"], *groups["docs"]]
    pinned = {normalized(name) for name in re.findall(r"^([\w.-]+)==", text_of(ROOT / "constraints.txt"), re.MULTILINE)}
    missing = [one for one in asked if normalized(re.split(r"[<>=!~\[ ]", one)[0]) not in pinned]
    assert not missing, f"constraints.txt pins no version of {missing}"
    assert set(PACKAGES.values()) <= set(text_of(ROOT / "constraints.txt").split())


def test_the_citation_is_of_this_version_and_leads_where_the_project_does() -> None:
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    citation = read_document(text_of(ROOT / "CITATION.cff"), "CITATION.cff").value
    assert citation["version"] == flexkd.__version__
    assert citation["license"] == project["license"]
    assert citation.get("repository-code") == project["urls"].get("Repository")
    assert citation["authors"] == project["authors"] == [{"name": "The flexkd developers"}]


def test_the_source_archive_and_the_image_hold_what_they_need() -> None:
    """Everything that is tracked is in the archive, as its tests read it; what the image copies is not ignored."""
    hatch = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["hatch"]["build"]
    included = {path.removeprefix("/") for path in hatch["targets"]["sdist"]["include"]}
    assert all((ROOT / path).exists() for path in included)
    if (ROOT / ".git").exists():
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        by_itself = {".gitignore", "LICENSE", "README.md", "pyproject.toml"}
        assert {path.partition("/")[0] for path in tracked.splitlines()} - by_itself == included
    copied = [
        word for line in re.findall(r"^COPY ([^-].*) \S+$", text_of(ROOT / "Dockerfile"), re.M) for word in line.split()
    ]
    assert {*hatch["targets"]["wheel"]["only-include"], "pyproject.toml"} <= {*copied, "src/flexkd"}
    assert {f"!{path}" for path in copied} == set(re.findall(r"^!.+$", text_of(ROOT / ".dockerignore"), re.MULTILINE))


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_key_of_a_recipe_has_its_example() -> None:
    missing = sorted(".".join(path) for path in key_fields().keys() - key_examples().keys())
    assert not missing, f"src/flexkd/reference/examples.yaml shows no use of {missing}"


def test_every_cited_source_has_its_entry() -> None:
    papers = text_of(ROOT / "docs" / "papers.md")
    cited = {
        number: module.where
        for module in modules().values()
        for number in re.findall(r"arXiv:(\d{4}\.\d{5})", text_of(module.path))
    }
    missing = {number: place for number, place in cited.items() if f"arXiv:{number}" not in papers}
    assert not missing, f"docs/papers.md has no entry for {missing}"


def test_covered_cases_name_a_test_that_carries_them() -> None:
    rows = [line for line in text_of(ROOT / "docs" / "cases.md").splitlines() if line.startswith("|")]
    wrong, covered = [], set()
    for row in rows:
        files = TEST_FILE.findall(row)
        for case in CASE.findall(row.split("|")[1]):
            if "covered" in row.lower() and not files:
                wrong.append(f"{case}: covered, but by no test file")
            for file in files:
                covered.add(case)
                if not (ROOT / file).exists() or not re.search(rf"(?<![A-Z\d]){case}(?!\d)", text_of(ROOT / file)):
                    wrong.append(f"{case}: {file} does not carry it")
    assert covered, "docs/cases.md lists no covered case: rows of the form | F12 | covered | tests/... |"
    assert not wrong, "\n".join(wrong)


def test_cases_that_tests_carry_are_listed() -> None:
    listed = set(CASE.findall(text_of(ROOT / "docs" / "cases.md")))
    carried: dict[str, str] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in re.findall(r"def test_(\w+)", text_of(path)):
            carried.update(dict.fromkeys(re.findall(r"(?:^|_)([A-Z]\d\d)(?=_|$)", name), where(path)))
    missing = {case: path for case, path in sorted(carried.items()) if case not in listed}
    assert not missing, f"docs/cases.md does not list {missing}"


# transformers says so wherever there is no accelerator.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_python_example_of_the_readme_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", text_of(ROOT / "README.md"), re.MULTILINE | re.DOTALL)
    program = tmp_path / "example.py"
    program.write_text(example, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(program), run_name="__main__")
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / "example" / "student")
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (32, 2)
