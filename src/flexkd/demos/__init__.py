"""Recipes of the demos, shipped with the package."""
