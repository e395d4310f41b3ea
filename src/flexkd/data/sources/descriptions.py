"""Package descriptions of Debian as documents with summaries: the long description and the synopsis of one package."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from flexkd.data.sources.debian import open_archive, stanzas

DROPPED_SECTIONS: Final = ("debug", "oldlibs", "metapackages", "tasks", "localization")
"""Sections whose packages describe another package, or all say the same."""

COMMON_PARAGRAPH: Final = 20
"""A paragraph that stands in so many packages says nothing about one of them."""


FEWEST_WORDS: Final = 30
"""A shorter description leaves nothing to sum up."""


def fetch_descriptions(folder: Path) -> list[dict[str, str]]:
    """Fetches Debian's lists into a folder and joins them.

    Raises:
        DataError: The archive cannot be reached.
        MissingDependencyError: This machine has no apt.
    """
    archive = open_archive(folder)
    return join_descriptions(_lines(archive.packages), _lines(archive.translations))


def _lines(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        with path.open(encoding="utf-8", errors="replace") as lines:
            yield from lines
            yield "\n"


def join_descriptions(packages: Iterable[str], translations: Iterable[str]) -> list[dict[str, str]]:
    """One row a source package: columns document, summary, source and package.

    Args:
        packages: Lines of a Packages index.
        translations: Lines of a Translation-en index, where the long descriptions are.
    """
    texts = {
        (one["Package"], one["Description-md5"]): one["Description-en"]
        for one in stanzas(iter(translations), ("Package", "Description-md5", "Description-en"))
        if len(one) == 3
    }
    found: dict[str, tuple[str, str, str, list[str]]] = {}
    for one in stanzas(iter(packages), ("Package", "Source", "Section", "Description-md5")):
        package = one.get("Package", "")
        text = texts.get((package, one.get("Description-md5", "")))
        if text is not None:
            summary, _, long = text.partition("\n")
            source = one.get("Source", package).partition(" ")[0]
            found[package] = (source, one.get("Section", "").rpartition("/")[2], summary, list(_paragraphs(long)))
    num_packages = Counter(paragraph for *_, paragraphs in found.values() for paragraph in set(paragraphs))
    chosen: dict[str, dict[str, str]] = {}
    for package, (source, section, summary, paragraphs) in sorted(found.items()):
        document = "\n\n".join(paragraph for paragraph in paragraphs if num_packages[paragraph] < COMMON_PARAGRAPH)
        is_usable = section not in DROPPED_SECTIONS and summary and len(document.split()) >= FEWEST_WORDS
        # The packages of one source share most of their text; the longest is that of the package that the rest serves.
        if is_usable and (source not in chosen or len(document) > len(chosen[source]["document"])):
            chosen[source] = {"document": document, "summary": summary, "source": source, "package": package}
    distinct = {chosen[source]["document"]: chosen[source] for source in sorted(chosen, reverse=True)}
    return sorted(distinct.values(), key=lambda row: row["source"])


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a long description: wrapped lines are joined, lines that are indented further stay lines."""
    for paragraph in re.split(r"^\.$", text, flags=re.MULTILINE):
        lines: list[str] = []
        for line in paragraph.strip("\n").splitlines():
            if lines and not line.startswith((" ", "\t")):
                lines[-1] += f" {line.strip()}"
            elif line.strip():
                lines.append(line.strip())
        if lines:
            yield "\n".join(lines)
