"""The Free On-line Dictionary of Computing as questions with answers, from its Debian package."""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from flexkd.demos.debian import open_archive

_DIGITS: Final = {
    digit: value for value, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
_FIELD: Final = re.compile(r"^<[^<>]*>\s*")
_LINK: Final = re.compile(r"\{([^{}()]*?)\s*(?:\((?:[^{}()]|\([^{}()]*\))*\))?\}")
_ASIDE: Final = re.compile(r"\(\d{4}-\d{2}-\d{2}\)|\[[^\]]*\]\.?")
_FEWEST_WORDS: Final = 5


def fetch_definitions(folder: Path) -> list[dict[str, str]]:
    """Download the dictionary into a folder and read its definitions.

    Raises:
        DataError: The archive cannot be reached.
        MissingDependencyError: This machine has no apt.
    """
    dictionary = open_archive(folder).unpack("dict-foldoc") / "usr" / "share" / "dictd"
    text = gzip.decompress((dictionary / "foldoc.dict.dz").read_bytes())
    return read_definitions(text, (dictionary / "foldoc.index").read_text(encoding="utf-8"))


def read_definitions(dictionary: bytes, index: str) -> list[dict[str, str]]:
    """One row for each term, with the columns instruction, output and term.

    Args:
        dictionary: All entries, one after the other.
        index: Lines of term, start and length; both are in bytes and written in base 64.
    """
    places = {(_number(start), _number(length)) for _, start, length in _fields(index)}
    rows_by_prompt: dict[str, dict[str, str]] = {}
    for start, length in sorted(places):
        entry = dictionary[start : start + length].decode("utf-8", errors="replace")
        term, _, body = entry.partition("\n")
        definition = _definition(body)
        if term.strip() and not term.startswith((" ", "\t")) and definition:
            prompt = f'What does "{term.strip()}" mean in computing?'
            rows_by_prompt.setdefault(prompt, {"instruction": prompt, "output": definition, "term": term.strip()})
    return list(rows_by_prompt.values())


def _fields(index: str) -> Iterator[tuple[str, str, str]]:
    for line in index.splitlines():
        term, start, length = line.split("\t")[:3]
        # Entries that describe the dictionary itself.
        if not term.startswith(("00-database", "00database")):
            yield term, start, length


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value


def _definition(body: str) -> str:
    """The first paragraph of an entry as plain text; empty where it is too short, damaged or only a reference."""
    paragraphs = re.split(r"\n[ \t]*\n", body.strip("\n"))
    # Other spellings of the term come first, without indentation.
    first = next((paragraph for paragraph in paragraphs if paragraph.startswith((" ", "\t"))), "")
    text = _FIELD.sub("", " ".join(first.split()))
    plain = _ASIDE.sub("", text)
    for _ in range(2):  # a reference may be inside the words of another
        plain = _LINK.sub(r"\1", plain)
    plain = " ".join(plain.split())
    is_reference = re.fullmatch(r"\{[^{}]*\}\.?", text) is not None
    is_broken = "@" in plain or "://" in plain or bool(set("{}") & set(plain))
    return "" if is_reference or is_broken or len(plain.split()) < _FEWEST_WORDS else plain
