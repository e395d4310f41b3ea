"""Text that is not UTF-8: read only where no letter can be taken for another."""

import itertools
import logging

import pytest

from flexkd.data.sources.encodings import decode
from flexkd.errors import DataError

ENGLISH = "\u201cDon\u2019t buy\u201d \u2013 it\u2019s bad\u2026 5 \u20ac at the caf\u00e9"
GERMAN = "Das M\u00e4dchen h\u00f6rt sch\u00f6ne Musik \u00fcber die Stra\u00dfe"
FRENCH = "Voil\u00e0 un tr\u00e8s bon h\u00f4tel, o\u00f9 l\u2019on mange \u00e0 c\u00f4t\u00e9 d\u2019une \u00eele"
SPANISH = "Se\u00f1or, \u00bfQu\u00e9 tal est\u00e1 el ni\u00f1o?"
POLISH = "Za\u017c\u00f3\u0142\u0107 g\u0119\u015bl\u0105 ja\u017a\u0144, dobry hotel i mi\u0142a obs\u0142uga"
CZECH = (
    "P\u0159\u00edli\u0161 \u017elu\u0165ou\u010dk\u00fd k\u016f\u0148 \u00fap\u011bl \u010f\u00e1belsk\u00e9 \u00f3dy"
)
HUNGARIAN = "Nagyon j\u00f3 sz\u00e1lloda, k\u00f6sz\u00f6n\u00f6m sz\u00e9pen \u0151 is b\u0171v\u00f6s"
LITHUANIAN = "\u0160is vie\u0161butis labai geras, \u0105\u017euolas \u010dia"
TURKISH = "\u00c7ok g\u00fczel bir otel, \u015fehir i\u00e7inde, a\u011fa\u00e7"
RUSSIAN = "\u041e\u0447\u0435\u043d\u044c \u0445\u043e\u0440\u043e\u0448\u0438\u0439 \u043e\u0442\u0435\u043b\u044c"
GREEK = "\u03a0\u03bf\u03bb\u03cd \u03ba\u03b1\u03bb\u03cc \u03be\u03b5\u03bd\u03bf\u03b4\u03bf\u03c7\u03b5\u03af\u03bf"
CHINESE = "\u8fd9\u5bb6\u9152\u5e97\u975e\u5e38\u597d"
JAPANESE = "\u3068\u3066\u3082\u826f\u3044\u30db\u30c6\u30eb"

READ = [(text, "cp1252") for text in (ENGLISH, "caf\u00e9", GERMAN, FRENCH, SPANISH)] + [
    (POLISH, "cp1250"), (CZECH, "cp1250"), (FRENCH, "mac_roman"), (SPANISH, "mac_roman"),
]  # fmt: skip
TEXTS = [
    ENGLISH,
    GERMAN,
    FRENCH,
    SPANISH,
    POLISH,
    CZECH,
    HUNGARIAN,
    LITHUANIAN,
    TURKISH,
    RUSSIAN,
    GREEK,
    CHINESE,
    JAPANESE,
]
ENCODINGS = (
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1257", "koi8_r", "iso8859_2", "iso8859_15", "mac_roman",
    "cp437", "cp850", "cp852", "cp866", "cp737", "cp857", "gb18030", "big5", "cp932", "euc_jp",
)  # fmt: skip


def rows_of(text: str) -> str:
    return "text;label\r\n" + "".join(f"{text};{number % 2}\r\n" for number in range(3))


@pytest.mark.parametrize(("text", "encoding"), READ)
def test_text_of_common_programs_is_read(text: str, encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert decode(rows_of(text).encode(encoding), "a.csv") == rows_of(text)
    assert caplog.messages[0].startswith("a.csv: not UTF-8, read as ")


def test_no_letter_is_taken_for_another() -> None:
    """Every word by itself and every text as a whole, in every encoding that has it: read as written, or refused."""
    refused = 0
    for text, encoding in itertools.product(TEXTS, ENCODINGS):
        for part in (rows_of(text), f"text\n{text}", *(f"text\n{word}\n" for word in text.split())):
            try:
                data = part.encode(encoding)
            except UnicodeEncodeError:
                continue
            try:
                assert decode(data, "a.csv") == part, (part, encoding)
            except DataError:
                refused += 1
    assert refused > 100


def test_a_file_that_leaves_it_open_shows_what_it_may_be() -> None:
    data = rows_of("tr\u00e8s bien").encode("cp1252")
    with pytest.raises(DataError) as refusal:
        decode(data, "a.csv")
    message = str(refusal.value)
    assert message.startswith(
        "a.csv:2: not UTF-8 (byte 0xe8), and its bytes leave open what it is: 'tr\u00e8s' in cp1252,"
    )
    assert "'tr\u010ds' in cp1250" in message
    assert message.endswith("Set data.encoding (of flexkd predict: --encoding), or save the file as UTF-8.")
    assert decode(data, "a.csv", "cp1250") == rows_of("tr\u010ds bien")
    assert decode(rows_of(FRENCH).encode(), "a.csv", "cp1252") == rows_of(FRENCH)
    with pytest.raises(DataError, match=r"a\.csv:2: neither UTF-8 nor ascii"):
        decode(data, "a.csv", "ascii")


def test_byte_order_marks_decide() -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        assert decode(rows_of(GREEK).encode(encoding), "a.csv") == rows_of(GREEK)
    unmarked = rows_of(ENGLISH[:12]).encode("utf-16-le")
    with pytest.raises(DataError, match=r"every other byte is zero|no text in another encoding"):
        decode(unmarked, "a.csv")
    assert decode(unmarked, "a.csv", "utf-16-le") == rows_of(ENGLISH[:12])
    with pytest.raises(DataError, match=r"begins with the mark of utf-16, and is not that"):
        decode(rows_of("x").encode("utf-16")[:-1], "a.csv")


def test_utf8_with_a_broken_place_is_damaged() -> None:
    for broken in (rows_of(FRENCH).encode().replace(b"\xc3", b"", 1), (rows_of(FRENCH) * 2).encode() + b"\xe9"):
        with pytest.raises(DataError, match="though other characters are: the file is damaged, or of two encodings"):
            decode(broken, "a.csv")
