"""Bytes of a text file to text: UTF-8, else the one encoding in which they read as text, else an error that asks."""

import codecs
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final

from flexkd.errors import DataError

logger = logging.getLogger(__name__)

_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # Before UTF-16, whose mark is the beginning of this one.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PACKED: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "zip",
    b"(\xb5/\xfd": "zstd",
}
_ONE_BYTE: Final = (
    "cp1252", "iso8859_15", "mac_roman", "cp850", "cp437", "cp1250", "iso8859_2", "cp852", "cp1254", "cp1257", "cp1251",
    "koi8_r", "cp866", "iso8859_5", "mac_cyrillic", "cp1253", "iso8859_7", "cp1255", "cp1256", "cp1258", "cp874",
    "iso8859_9", "iso8859_13", "iso8859_6", "iso8859_8", "koi8_u", "kz1048", "ptcp154", "cp737", "cp855", "cp857",
    "cp858", "cp860", "cp861", "cp862", "cp863", "cp864", "cp865", "cp869", "cp1125", "mac_greek", "mac_turkish",
    "mac_iceland",
)  # fmt: skip
_TWO_BYTES: Final = ("gb18030", "big5hkscs", "cp932", "euc_jp", "cp949")
"""Encodings that programs have written, the likeliest first. The right one must be among them, or a wrong one may seem
to be the only one that fits; one that nobody writes would only leave more files open."""

_ALPHABETS: Final = frozenset(("LATIN", "GREEK", "CYRILLIC", "HEBREW", "ARABIC", "THAI"))
_INSIDE_WORDS: Final = frozenset("\u2019\u2018\u2013\u2014\u2026\u00b7\u00ad\u00a0")
"""Signs that stand between two letters: apostrophes, dashes, an ellipsis, the dot of Catalan, soft hyphen and space."""
_NO_WORDS: Final = frozenset(
    "\u0105\u0119\u0113\u010d\u0161\u017e\u00e7\u00eb\u00ee\u00ef\u00f1\u00fb\u00fc\u00df"
    "\u0107\u010f\u0142\u0144\u0155\u0159\u015b\u0165\u013a\u0402"
)
"""Letters that are a word in no language; a dash, or a word of one letter, in another encoding may read as them."""
_OTHER_WORD: Final = re.compile(r"[!-~]{0,12}[^\x00-\x7f]{1,12}[!-~]{0,12}")
_OTHER: Final = re.compile(r"[^\x00-\x7f]+")
_BROKEN: Final = "\ufffd"
_MOST_BY_CHANCE: Final = 0.05
"""Characters of UTF-8 for each byte that is not, above which they are none by chance."""
_SHOWN: Final = 4
_ADVICE: Final = "Set data.encoding (of flexkd predict: --encoding), or save the file as UTF-8."


def decode(data: bytes, name: str, encoding: str = "auto") -> str:
    """The text of a file.

    A byte order mark decides, then whether the bytes are UTF-8, which text in another encoding practically never is.
    Where they are not, the file is read only if its text is the same in every encoding that can be the right one. An
    encoding is ruled out by bytes that it does not have, and by places
    where no writer puts a character, such as a Greek letter in a Latin word or a capital after a small letter.
    Libraries that detect encodings give the likeliest one instead, which of a short text may be another.

    Args:
        name: The file, for messages.
        encoding: What files that are not UTF-8 are in, as Python names it; "auto" finds it out.

    Raises:
        DataError: The encoding is left open, or the bytes are no text in it.
    """
    packed = next((format_name for start, format_name in _PACKED.items() if data.startswith(start)), None)
    if packed is not None:
        raise DataError(f"{name}: is packed with {packed}, unlike its name says. Name it by what it is, or unpack it.")
    mark = next((codec for start, codec in _MARKS if data.startswith(start)), None)
    try:
        text = data.decode(mark or "utf-8")
    except UnicodeDecodeError as error:
        if mark is not None:
            raise DataError(
                f"{name}: begins with the mark of {mark}, and is not that ({error.reason} at byte {error.start + 1:,})."
                " Write it again."
            ) from error
        return _decode_other(data, name, encoding, error.start)
    # UTF-16 without a mark is UTF-8 too, with a zero byte at every other place.
    if mark is None and text.count("\0") > len(text) // 4:
        if encoding != "auto":
            return _decode_as(data, name, encoding)
        raise DataError(f"{name}: every other byte is zero, as in utf-16-le without a byte order mark. {_ADVICE}")
    return text


def _decode_other(data: bytes, name: str, encoding: str, start: int) -> str:
    """The text of a file that is not UTF-8 from the byte at `start` on."""
    line = data.count(b"\n", 0, start) + 1
    if encoding != "auto":
        return _decode_as(data, name, encoding)
    where = f"{name}:{line}: not UTF-8 (byte 0x{data[start]:02x})"
    repaired = data.decode("utf-8", "replace")
    num_broken = repaired.count(_BROKEN)
    if sum(map(len, _OTHER.findall(repaired))) - num_broken > _MOST_BY_CHANCE * num_broken:
        raise DataError(
            f"{where}, though other characters are: the file is damaged, or of two encodings. Write it again."
        )
    readings = _readings(data)
    if not readings:
        raise DataError(f"{where}, and no text in another encoding that is known here. {_ADVICE}")
    if len(set(readings.values())) > 1:
        raise DataError(f"{where}, and its bytes leave open what it is: {_differing(data, readings)}. {_ADVICE}")
    likeliest = next(iter(readings))
    text = data.decode(likeliest)
    logger.info("%s: not UTF-8, read as %s (as in '%s').", name, likeliest, next(_other_words(text)))
    return text


def _decode_as(data: bytes, name: str, encoding: str) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}:{line}: neither UTF-8 nor {encoding} (byte 0x{data[error.start]:02x}). {_ADVICE}"
        ) from error
    sample = next(_other_words(text), "")
    logger.info("%s: not UTF-8, read as %s as data.encoding says (as in '%s').", name, encoding, sample)
    return text


def _readings(data: bytes) -> dict[str, str]:
    """What the bytes may be: each encoding that fits, with all places that are not ASCII as it reads them."""
    places = sorted({data[max(0, run.start() - 1) : run.end() + 1] for run in re.finditer(rb"[\x80-\xff]+", data)})
    joined = b"\n".join(place.strip(b"\r\n") for place in places)
    readings: dict[str, str] = {}
    for codec in (*_ONE_BYTE, *_TWO_BYTES):
        try:
            text = (joined if codec in _ONE_BYTE else data).decode(codec)
        except UnicodeDecodeError:
            continue
        if not _has_fault(text):
            readings[codec] = text
    return readings


def _has_fault(text: str) -> bool:
    """Whether a character stands where no writer puts it."""
    padded = f"\n{text}\n"
    return any(
        _is_fault(character, padded[place - 1], padded[place + 1])
        for place, character in enumerate(padded[1:-1], start=1)
        if not character.isascii()
    )


@lru_cache(maxsize=2**16)
def _is_fault(character: str, before: str, after: str) -> bool:
    category = unicodedata.category(character)
    if category in ("Cc", "Cn", "Co", "Cs") or "\u2500" <= character <= "\u259f":  # no character, or drawn lines
        return True
    alphabet = _alphabet(character)
    if alphabet is None:
        return _is_misplaced_sign(character, category, before, after)
    neighbours = [letter for letter in (before, after) if letter.isalpha()]
    if before.isdigit() or after.isdigit() or any(_alphabet(letter) not in (alphabet, None) for letter in neighbours):
        return True
    if not neighbours:
        # Not at the edge of a cell, which may hold a letter by itself.
        return character in _NO_WORDS and before in " .!?" and after != "."
    if character.isupper():
        return before.islower() or (before.isupper() and after.islower())
    return after.isupper()


def _is_misplaced_sign(character: str, category: str, before: str, after: str) -> bool:
    """Whether a sign, or a letter of no alphabet, stands inside a word, or an accent without its letter beside one."""
    if category in ("Sk", "Lm") and character != "\u00b4":
        return before.isalpha() or after.isalpha()
    if category.startswith("L"):
        return before.islower() and after.islower() and before.isascii() and after.isascii()
    is_sign = not category.startswith("M") and character not in _INSIDE_WORDS
    return is_sign and before.isalpha() and after.isalpha()


@lru_cache(maxsize=2**16)
def _alphabet(character: str) -> str | None:
    """The alphabet of a letter or of its mark, or None for signs, digits and letters of no alphabet."""
    name = unicodedata.name(character, "").partition(" ")[0]
    return name if name in _ALPHABETS and unicodedata.category(character)[0] in "LM" else None


def _differing(data: bytes, readings: Iterable[str]) -> str:
    """The first word that the encodings read differently, as each of them reads it."""
    texts = [data.decode(codec) for codec in readings]
    words = next(row for row in zip(*map(_other_words, texts), strict=False) if len(set(row)) > 1)
    names = dict(zip(reversed(words), reversed(list(readings)), strict=True))  # the likeliest of each reading
    return ", ".join(f"'{word}' in {names[word]}" for word in list(dict.fromkeys(words))[:_SHOWN])


def _other_words(text: str) -> Iterator[str]:
    """Words that are not ASCII, cut where they are long."""
    return (match[0] for match in _OTHER_WORD.finditer(text))
