"""Descriptions of Debian packages with their section of the archive: rows of a classification of 14 classes."""

import json
import logging
import tempfile
from collections import Counter
from pathlib import Path
from typing import Final

from flexkd.data.sources.rows import read_rows
from flexkd.demos.debian import open_archive, stanzas
from flexkd.files import written_whole
from flexkd.home import home_folder

logger = logging.getLogger(__name__)

NUM_CLASSES: Final = 14
MOST_ROWS: Final = 500
"""Of one section, so that the most frequent class says little."""


def sections_file() -> Path:
    """The rows as JSON lines in the user's cache: text, label, source; fetched by apt once."""
    file = home_folder("data") / "study-sections.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            sections: dict[str, str] = {}
            for path in open_archive(Path(folder).resolve()).packages:
                with path.open(encoding="utf-8", errors="replace") as lines:
                    sections |= {
                        stanza["Package"]: stanza.get("Section", "").rpartition("/")[2] for stanza in stanzas(lines)
                    }
        rows = labelled([dict(row.values) for row in read_rows("apt:descriptions")], sections)
        logger.info("%s: %d rows of %d sections", file, len(rows), NUM_CLASSES)
        with written_whole(file) as partial:
            partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def labelled(rows: list[dict[str, object]], sections: dict[str, str]) -> list[dict[str, str]]:
    """The rows of the largest sections, at most `MOST_ROWS` of each, spread evenly over the alphabet.

    Args:
        rows: Rows of `apt:descriptions`.
        sections: Package to section.
    """
    by_section: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        section = sections.get(str(row["package"]), "")
        by_section.setdefault(section, []).append(
            {"text": str(row["document"]), "label": section, "source": str(row["source"])}
        )
    by_section.pop("", None)
    sizes = Counter({section: len(entries) for section, entries in by_section.items()})
    return [
        row
        for section, _ in sizes.most_common(NUM_CLASSES)
        for row in by_section[section][:: -(-sizes[section] // MOST_ROWS)]
    ]
