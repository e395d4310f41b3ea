"""The Python interface on the site: the program of the README, and an entry for every loss."""

import re

import flexkd
from website.links import ROOT


def program() -> str:
    """The program of the README, which a test runs as it stands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n.*?^```", text, re.MULTILINE | re.DOTALL)
    return str(blocks[0])


def losses() -> str:
    """A place for the docstring of every loss, in the order of their names."""
    return "\n".join(f"::: flexkd.losses.{name}" for name in sorted(flexkd.losses.__all__) if name.islower())
