"""A recipe from text, and the lines of the error that a wrong one raises."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flexkd.errors import RecipeError
from flexkd.recipe import Recipe, load_recipe
from tests.recipe.kinds import Loaded


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """Load a recipe from text; its path in messages is recipe.yaml."""
    monkeypatch.chdir(tmp_path)

    def loaded(text: str, *overrides: str) -> Recipe:
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        return load_recipe("recipe.yaml", overrides)

    return loaded


@pytest.fixture
def problems(load: Loaded) -> Callable[..., list[str]]:
    """The lines of the error that a recipe raises."""

    def lines(text: str, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        return str(caught.value).splitlines()

    return lines
