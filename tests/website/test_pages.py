"""What the site makes from the code is whole: every key, command and public name, and links that lead somewhere."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from jsonschema import Draft7Validator

import flexkd
from flexkd import run_files
from flexkd.cli import app
from flexkd.recipe.document import read_document
from flexkd.recipe.loading import check_values
from flexkd.recipe.messages import key_fields
from flexkd.reference.json_schema import example_recipe, key_schemas, recipe_schema
from tests.source_tree import PACKAGE, ROOT
from website.commands import commands_page
from website.links import (
    DOCS,
    MORE_PAGES,
    file_page,
    linked_files,
    page_of,
    with_linked_keys,
    with_links_of_the_site,
)
from website.offline import loaded
from website.pictures import FOLDER, PICTURES, draw
from website.program import losses, program
from website.recipe_keys import keys_page, range_of, schema_text, type_of

KEYS = {".".join(path): path for path in key_fields()}
SCHEMAS = {".".join(path): json.loads(json.dumps(schema)) for path, schema in key_schemas().items()}
ENTRIES = dict(
    re.findall(r"^###? `[a-z0-9_.]+` { #([a-z0-9_.]+) }\n(.*?)(?=^##|\Z)", keys_page(), re.MULTILINE | re.DOTALL)
)
# Old names and keys that are gone stand in what tells the past; the others speak of today.
HISTORY = {"log.md", "cases.md"}
WRITTEN = sorted(path for path in DOCS.rglob("*.md") if path.name not in HISTORY and "results" not in path.parts)
BASE: dict[str, Any] = {
    "name": "job",
    "data": {"train": "rows.csv"},
    "teacher": {"model": "models/teacher"},
    "student": {},
}


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_its_entry_with_type_default_range_meaning_and_example(key: str) -> None:
    table, meaning, example = re.fullmatch(
        r"\n(\| type \| default \| range \|\n\|---\|---\|---\|\n.*? \|)\n\n(.*)\n\n```yaml\n(.*)\n```\n+(?:## .*\n+)?",
        ENTRIES[key],
        re.DOTALL,
    ).groups()  # type: ignore[union-attr]
    cells = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert len(cells) == 3
    assert all(cells)
    assert meaning.strip()
    assert "Default:" not in meaning
    assert read_document(example, key).value == example_recipe(KEYS[key])


def test_there_are_no_entries_of_other_keys() -> None:
    assert ENTRIES.keys() == KEYS.keys()


@pytest.mark.parametrize(
    ("key", "cells"),
    [
        ("name", "text | none: it has to be given | not empty"),
        ("output", "text | runs/NAME | not empty"),
        ("data.validation", "text or list of texts or number | `0.1` | not empty; above 0 and below 1"),
        ("data.date", "date | `2026-01-01` | as YYYY-MM-DD"),
        ("teacher.fine_tune", "section or null | `null` | the keys below"),
        ("student.max_parameters", "whole number or text or null | `null` | at least 1; text as in the example"),
        ("objective.logits.temperature", "number | 2, or 1 for regression and where text is written | above 0"),
        ("objective.features.layer_map", "mapping to whole numbers | `{-1: -1}` | at least -1"),
        ("training.seed", "whole number | `0` | at least 0 and below 2^32"),
        ("compare.contrasts", "list of lists of texts | every method against fine_tuning, or else the first one | "),
    ],
)
def test_entries_read_as_people_write(key: str, cells: str) -> None:
    assert f"| {cells}" in ENTRIES[key]


def test_kinds_of_values_have_words() -> None:
    assert type_of({"anyOf": [{"type": "string"}, {"type": "null"}]}) == "text or null"
    assert type_of({"type": ["string", "number", "boolean", "null"]}) == "any single value"
    assert range_of({"type": "number", "exclusiveMinimum": 0, "maximum": 1}) == "above 0 and at most 1"
    assert range_of({"type": "number"}) == "any"


def test_the_site_offers_the_schema_that_the_command_prints() -> None:
    assert json.loads(schema_text()) == json.loads(json.dumps(recipe_schema()))


def test_every_command_and_option_is_on_the_page() -> None:
    page = commands_page()
    group: Any = typer.main.get_command(app)
    assert re.findall(r"^## `flexkd (\w+)`", page, re.MULTILINE) == list(group.commands)
    for name, command in group.commands.items():
        part = page.partition(f"## `flexkd {name}`")[2].partition("\n## ")[0]
        assert command.help in part
        assert all(parameter.help in part for parameter in command.params)
        assert all(
            f"`{option}" in part for parameter in command.params for option in parameter.opts if option[0] == "-"
        )
    assert "flexkd evaluate MODEL RECIPE [KEY=VALUE ...] [OPTIONS]" in page


def test_the_python_page_has_every_public_name() -> None:
    text = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    names = {name for name in flexkd.__all__ if name != "losses"}
    assert set(re.findall(r"^::: flexkd\.(\w+)$", text, re.MULTILINE)) == names
    assert "<!-- generated: losses -->" in text
    assert "::: flexkd.losses.correlation\n" in losses()
    assert program().startswith("```python\nimport torch\n")


def settings_in(path: Path) -> list[tuple[str, str]]:
    """Keys of a recipe that a document names in its text, each with the value that is said there, or nothing."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    sections = "|".join(key for key, names in KEYS.items() if len(names) == 1)
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    found = [re.fullmatch(rf"((?:{sections})(?:\.[a-z][a-z0-9_]*)+)(?:(?:=|: )(.+))?", span) for span in spans]
    endings = (".json", ".jsonl", ".safetensors", ".yaml", ".html")
    return [(match[1], match[2] or "") for match in found if match and not match[1].endswith(endings)]


@pytest.mark.parametrize("path", WRITTEN, ids=where)
def test_keys_and_settings_in_the_documents_are_those_of_the_recipe(path: Path) -> None:
    unknown = [key for key, _ in settings_in(path) if key not in KEYS]
    assert not unknown, f"no keys of a recipe: {unknown}"
    wrong = [
        f"{key}: {value}"
        for key, value in settings_in(path)
        if value and not Draft7Validator(SCHEMAS[key]).is_valid(read_document(value, key).value)
    ]
    assert not wrong, f"values that the recipe refuses: {wrong}"


@pytest.mark.parametrize("path", WRITTEN, ids=where)
def test_pieces_of_recipes_in_the_documents_are_valid(path: Path) -> None:
    for block in re.findall(r"^```yaml\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        values = read_document(block, where(path)).value or {}
        sections = {key: {**BASE[key], **part} for key, part in values.items() if isinstance(BASE.get(key), dict)}
        _, problems = check_values({**BASE, **values, **sections})
        assert problems == [], f"{block}\n{problems}"


def test_links_to_files_become_pages() -> None:
    document = DOCS / "methods.md"
    text = "[a](../src/flexkd/recipe/methods.py) [b](papers.md#x) [c](../recipes/README.md) [d](https://a.b) [e](#f)"
    assert set(linked_files(text, document)) == {"files/src/flexkd/recipe/methods.py.md"}
    assert with_links_of_the_site(text, document, "methods.md") == (
        "[a](files/src/flexkd/recipe/methods.py.md) [b](papers.md#x) [c](recipes.md) [d](https://a.b) [e](#f)"
    )
    deeper = DOCS / "results" / "decisions" / "README.md"
    assert with_links_of_the_site("[a](../../log.md)", deeper, "results/decisions/README.md") == "[a](../../log.md)"
    assert page_of(ROOT / "recipes" / "classification") == MORE_PAGES["recipes/README.md"]
    assert page_of(ROOT / "README.md") == "readme.md"
    assert page_of(ROOT / "no_such_file.py") is None
    assert page_of(DOCS / "log.md") is None


def test_a_file_as_a_page_is_whole_whatever_it_holds() -> None:
    page = file_page(ROOT / "CONTRIBUTING.md")
    assert page.startswith("---\ntitle: CONTRIBUTING.md\nsearch:\n  exclude: true\n")
    assert f"\n````markdown\n{(ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')}````\n" in page


def test_keys_in_a_text_lead_to_their_entries() -> None:
    keys = {"student.size": "r.html#student.size", "name": "r.html#name"}
    linked = '<a class="key" href="r.html#student.size"><code>student.size</code></a>'
    assert with_linked_keys("<p><code>student.size</code></p>", keys) == f"<p>{linked}</p>"
    assert 'href="r.html#student.size"><code>student.size=0.25</code>' in with_linked_keys(
        "<code>student.size=0.25</code>", keys
    )
    for text in (
        "<code>name</code>",
        "<pre><code>student.size</code></pre>",
        '<a href="x"><code>student.size</code></a>',
    ):
        assert with_linked_keys(text, keys) == text


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://a.b/c.js"></script>',
        "<img alt=x src=//a.b/c.png>",
        '<link rel="stylesheet" href="https://a.b/c.css">',
        '<link href="https://a.b" rel="preconnect" crossorigin>',
        '<style>@import "https://a.b/c.css"</style>',
        "<p style=\"background: url('https://a.b/c.png')\">",
        ".x { background: url(https://a.b/c.png) }",
    ],
)
def test_what_a_browser_would_fetch_from_elsewhere_is_seen(text: str) -> None:
    assert len(loaded(text)) == 1


def test_what_a_reader_may_click_is_not_fetched() -> None:
    text = '<a href="https://a.b">c</a> <link rel="canonical" href="https://a.b"> <script src="c.js"></script>'
    assert loaded(text) == []


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_its_code_draws(name: str) -> None:
    """Its words and its shapes; numbers of coordinates may differ in the last digit on another machine."""
    drawn, stored = draw(name), (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    for part in (r"<text [^>]*>([^<]*)</text>", r"<(path|use|text|g)\b"):
        assert re.findall(part, drawn) == re.findall(part, stored), "draw it again: python -m website.pictures"


def test_every_picture_has_its_code_and_its_place() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(PICTURES)
    texts = "".join(path.read_text(encoding="utf-8") for path in WRITTEN)
    assert [name for name in PICTURES if f"images/concepts/{name}.svg" not in texts] == []


def test_the_page_of_file_formats_names_every_file_of_a_run() -> None:
    text = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    names = {value for key, value in vars(run_files).items() if key.endswith(("_FILE", "_FOLDER"))}
    assert sorted(name for name in names if name not in text) == []


def test_the_page_of_file_formats_has_every_record() -> None:
    text = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    for path in sorted(PACKAGE.glob("*record.py")):
        names = re.findall(r"^@dataclass.*\nclass (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert names
        assert [name for name in names if f"::: flexkd.{path.stem}.{name}\n" not in text] == []
