"""Recipes of the demos, and the sources of rows that they bring, shipped with the package."""

from pathlib import Path

from flexkd.data.sources.own_rows import register_fetched


def _descriptions(folder: Path) -> list[dict[str, str]]:
    from flexkd.demos.descriptions import fetch_descriptions

    return fetch_descriptions(folder)


def _definitions(folder: Path) -> list[dict[str, str]]:
    from flexkd.demos.foldoc import fetch_definitions

    return fetch_definitions(folder)


register_fetched("apt:descriptions", _descriptions)
register_fetched("foldoc:definitions", _definitions)
