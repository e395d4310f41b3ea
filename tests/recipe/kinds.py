"""A recipe that is whole, and the kinds of the fixtures around it."""

from collections.abc import Callable

from flexkd.recipe import Recipe

BASE = """\
name: job
data: {train: rows.csv}
teacher: {model: teachers/big}
student: {hidden_size: 192, num_layers: 3}
"""
Loaded = Callable[..., Recipe]
Problems = Callable[..., list[str]]
