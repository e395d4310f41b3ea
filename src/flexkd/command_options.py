"""Options of commands as the KEY=VALUE that stand behind them, so that they are checked like values of the recipe."""

import json

from flexkd.errors import RecipeError


def compare_overrides(methods: str | None, seeds: str | None, search: list[str]) -> list[str]:
    """The options of `compare` as KEY=VALUE, so that they are checked and reported like values of the recipe."""
    overrides = [f"compare.methods=[{methods}]"] if methods is not None else []
    overrides += [f"compare.seeds=[{seeds}]"] if seeds is not None else []
    choices = []
    for text in search:
        key, equals, values = text.partition("=")
        if not key or not equals:
            raise RecipeError(f"--search: {text!r} is no KEY=V1,V2. Write it as training.learning_rate=1e-4,5e-4.")
        choices.append(f"{json.dumps(key)}: [{values}]")
    return overrides + ([f"compare.search={{{', '.join(choices)}}}"] if choices else [])


def sizes_overrides(sizes: str | None, seeds: str | None) -> list[str]:
    """The options of `sizes` as KEY=VALUE."""
    lists = {"values": sizes, "seeds": seeds}
    return [f"sizes.{key}=[{text}]" for key, text in lists.items() if text is not None]


def columns(texts: list[str]) -> dict[str, str]:
    """The options --column by what the column holds."""
    by_content = {}
    for text in texts:
        name, _, column = text.partition("=")
        if not name or not column:
            raise RecipeError(f"--column: {text!r} is no NAME=COLUMN. Write it as text=review.")
        by_content[name] = column
    return by_content
