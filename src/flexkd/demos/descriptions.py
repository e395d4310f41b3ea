"""Package descriptions of Debian as documents with summaries: the long description and the one-line synopsis."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from flexkd.demos.debian import open_archive, stanzas

DROPPED_SECTIONS: Final = ("debug", "oldlibs", "metapackages", "tasks", "localization")
"""Sections whose packages describe another package, or share one description."""

COMMON_PARAGRAPH: Final = 20
"""A paragraph found in this many packages is left out: it says nothing about any one of them."""

FEWEST_WORDS: Final = 30
"""Shorter descriptions, in words, are left out: there is nothing to summarize."""


def fetch_descriptions(folder: Path) -> list[dict[str, str]]:
    """Fetch Debian's package lists into a folder and join them to rows.

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
    """One row for each source package, with the columns document, summary, source and package.

    Args:
        packages: Lines of a Packages index.
        translations: Lines of a Translation-en index, which holds the long descriptions.
    """
    texts = {
        (stanza["Package"], stanza["Description-md5"]): _unfolded(stanza["Description-en"])
        for stanza in stanzas(translations)
        if "Description-en" in stanza
    }
    descriptions: dict[str, tuple[str, str, str, list[str]]] = {}
    for stanza in stanzas(packages):
        package = stanza.get("Package", "")
        text = texts.get((package, stanza["Description-md5"]))
        if text is not None:
            summary, _, long = text.partition("\n")
            source = stanza.get("Source", package).partition(" ")[0]
            section = stanza.get("Section", "").rpartition("/")[2]
            descriptions[package] = (source, section, summary, list(_paragraphs(long)))
    num_packages = Counter(paragraph for *_, paragraphs in descriptions.values() for paragraph in set(paragraphs))
    rows_by_source: dict[str, dict[str, str]] = {}
    for package, (source, section, summary, paragraphs) in sorted(descriptions.items()):
        document = "\n\n".join(paragraph for paragraph in paragraphs if num_packages[paragraph] < COMMON_PARAGRAPH)
        is_usable = section not in DROPPED_SECTIONS and summary and len(document.split()) >= FEWEST_WORDS
        # Packages of one source share most of their text; the main package has the longest description.
        if is_usable and (source not in rows_by_source or len(document) > len(rows_by_source[source]["document"])):
            rows_by_source[source] = {"document": document, "summary": summary, "source": source, "package": package}
    # Of equal documents the one of the first source stays.
    distinct = {row["document"]: row for _, row in sorted(rows_by_source.items(), reverse=True)}
    return sorted(distinct.values(), key=lambda row: row["source"])


def _unfolded(value: str) -> str:
    """A value without the space that begins its second and each further line."""
    return re.sub(r"[ \t]*\n[ \t]", "\n", value)


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a long description; wrapped lines are joined, lines with more indentation stay lines."""
    for paragraph in re.split(r"^\.$", text, flags=re.MULTILINE):
        lines: list[str] = []
        for line in paragraph.strip("\n").splitlines():
            if lines and not line.startswith((" ", "\t")):
                lines[-1] += f" {line.strip()}"
            elif line.strip():
                lines.append(line.strip())
        if lines:
            yield "\n".join(lines)
