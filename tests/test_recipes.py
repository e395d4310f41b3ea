"""Every recipe we ship passes the checks that a user's recipe passes."""

from pathlib import Path

import pytest

from flexkd.recipe import load_recipe
from tests.source_tree import PACKAGE, ROOT

DEMOS = sorted((PACKAGE / "demos").rglob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_the_demo_is_shipped() -> None:
    assert [path.stem for path in DEMOS] == ["classification"]


@pytest.mark.parametrize("path", [*DEMOS, *RECIPES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shipped_recipes_load(path: Path) -> None:
    recipe = load_recipe(path, ())
    assert recipe.name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_header_of_a_recipe_gives_its_command(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert lines[0] == header[0], f"{path.name} begins without a header"
    where = path.relative_to(ROOT).as_posix()
    assert any("flexkd " in line and where in line for line in header), f"its header does not say: flexkd ... {where}"


def test_no_recipe_has_the_other_ending() -> None:
    assert not [*ROOT.glob("recipes/**/*.yml"), *PACKAGE.glob("**/*.yml")]
