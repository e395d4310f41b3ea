"""One YAML file becomes a frozen, checked Recipe."""

from flexkd.recipe.loading import load_recipe, override_recipe
from flexkd.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "override_recipe"]
