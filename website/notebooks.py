"""Notebooks as pages: what is written in them, their code and what it showed when they were last run."""

import re
from pathlib import Path
from typing import Final

from nbconvert import MarkdownExporter
from traitlets.config import Config

_STYLE: Final = re.compile(r"<style scoped>.*?</style>\s*", re.DOTALL)


def notebook_page(notebook: Path) -> str:
    """A notebook as Markdown, with a link to the file itself."""
    options = Config({"NbConvertBase": {"display_data_priority": ["text/html", "text/markdown", "text/plain"]}})
    text, _ = MarkdownExporter(config=options).from_filename(str(notebook))
    title, _, rest = _STYLE.sub("", text).strip().partition("\n")
    return f"{title}\n\n[Download this notebook]({notebook.name})\n{rest}\n"
