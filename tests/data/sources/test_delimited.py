"""Tables of text: which sign divides a file, hostile rows, and files that leave it open."""

import logging
from pathlib import Path

import pytest

from flexkd.data.sources.delimited import read_delimited
from flexkd.data.sources.files import read_file
from flexkd.data.sources.table import Row, TextFormat
from flexkd.errors import DataError

SIGNS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}


def values(text: str, separator: str = "auto") -> list[dict[str, object]]:
    return [dict(row.values) for row in read_delimited(text, "a.csv", None, separator).rows]


def problems(text: str) -> dict[str, str | None]:
    return {row.where: row.problem for row in read_delimited(text, "a.csv", None).rows}


@pytest.mark.parametrize("sign", SIGNS.values())
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_table_is_divided_by_whichever_sign_it_has(sign: str, end: str) -> None:
    others = "".join(other for other in SIGNS.values() if other != sign)
    rows = [
        ["text", "label"],
        [f'"a {sign} b{end}""c"""', "01"],
        [f"NA{others}", "1.0"],
        ["null", "1,234;5" if sign == "|" else ""],
    ]
    table = read_delimited(end.join(sign.join(row) for row in rows), "a.csv", None)
    texts = [row.values["text"] for row in table.rows]
    assert texts == [f'a {sign} b{end}"c"', f"NA{others}", "null"]
    assert [row.values["label"] for row in table.rows] == ["01", "1.0", rows[3][1]]
    assert [row.where for row in table.rows] == ["a.csv:2", "a.csv:4", "a.csv:5"]


def test_texts_full_of_another_sign_do_not_decide(caplog: pytest.LogCaptureFixture) -> None:
    prose = "\n".join(f"one, two, three{', more' * (number % 3)};{number % 2}" for number in range(30))
    with caplog.at_level(logging.INFO):
        assert values(f"text, as written;label\n{prose}")[0] == {"text, as written": "one, two, three", "label": "0"}
    assert caplog.messages == ["a.csv: read as fields separated by ';' (text, as written, label)."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text;label,source\na;1,x\nb;0,y\n", r"more than one sign divides it evenly \(comma: .*; semicolon: "),
        ("text;label,source\na;1\nb,0\n", r"no sign divides its rows as its header"),
        ("text\ngood,1\nbad,0\n", r"every row has 1 ',', so that it may be one column or 2\."),
        ("sep=#\ntext#label\n", r":1: names '#' as its separator\. Use one of ',', ';', '\\t', '\|'\."),
    ],
)
def test_a_file_that_leaves_it_open_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.csv.*{message}"):
        values(text)


def test_what_the_user_says_decides() -> None:
    text = "text;label,source\na;1,x\nb;0,y\n"
    assert values(text, "comma")[0] == {"text;label": "a;1", "source": "x"}
    assert values(text, "semicolon")[0] == {"text": "a", "label,source": "1,x"}
    assert values("text\ngood,1\nbad,0\n", "none") == [{"text": "good,1"}, {"text": "bad,0"}]


def test_one_column_is_whole_lines() -> None:
    assert values('text\nyes, it is; really\n"no, two\nlines"\nplain') == [
        {"text": "yes, it is; really"}, {"text": "no, two\nlines"}, {"text": "plain"}
    ]  # fmt: skip
    assert values("text\n  indented\n") == [{"text": "  indented"}]
    assert values('text\n"Great" he said, and left\nplain\n')[0] == {"text": '"Great" he said, and left'}


def test_the_first_line_of_excel_names_the_separator() -> None:
    for first in ("sep=;", '"sep=;"', "SEP=;"):
        table = read_delimited(f"{first}\r\ntext;a,b\r\nx;1,2\r\n", "a.csv", None)
        assert (table.columns, table.rows[0]) == (("text", "a,b"), Row({"text": "x", "a,b": "1,2"}, "a.csv:3"))


def test_names_in_the_header() -> None:
    assert values('text, label\n"a, b", 1\nc, 0\n'.replace('"a, b"', "a"))[0] == {"text": "a", "label": "1"}
    assert values('label , text\n1, "a, b"\n') == [{"label": "1", "text": "a, b"}]
    index = read_delimited(",text,label,,\n0,a,1,,\n1,b,0,,\n" + '"a "b" c d e f",1\n', "a.csv", None)
    assert index.columns == ("column 1", "text", "label")
    with pytest.raises(DataError, match="the column 'text' appears twice"):
        values("text,text \na,b\n")
    with pytest.raises(DataError, match=r"a\.csv:1: the header holds a zero byte"):
        values("te\0xt,label\na,b\n")


def test_rows_that_do_not_fit_are_bad_rows() -> None:
    rows = ["two", "three,1,2", '"a "b" c",0', "more,1,,", "text,label", "a\0b,1", "five,1"]
    assert problems("text,label\n" + "\n".join(rows)) == {
        "a.csv:2": "row has another number of fields than the header: 1, not 2",
        "a.csv:3": "row has another number of fields than the header: 3, not 2",
        "a.csv:4": "row cannot be divided into fields: ',' expected after '\"'",
        "a.csv:5": None,
        "a.csv:6": "row repeats the header",
        "a.csv:7": "row holds a zero byte",
        "a.csv:8": None,
    }
    with pytest.raises(DataError, match=r"^a\.csv:3: a quote that opens in this row is never closed\."):
        values('text,label\none,1\n"two,1\nthree,0\nfour,1\n')
    assert values(f"text,label\n{'x' * 200_000},1\n")[0]["text"] == "x" * 200_000


def test_tsv_quotes_are_characters_where_they_do_not_pair_up() -> None:
    plain = 'text\tlabel\n"It is" he said\t1\nno "quote" at start\t0\n" alone\t1\n'
    assert [row["text"] for row in values(plain)] == ['"It is" he said', 'no "quote" at start', '" alone']
    quoted = 'text\tlabel\n"a\ttab"\t1\n"two\nlines"\t0\n'
    assert values(quoted) == [{"text": "a\ttab", "label": "1"}, {"text": "two\nlines", "label": "0"}]


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One, two.\n\nThree; four, five", encoding="utf-8")
    assert read_file(path).rows == [
        Row({"text": "One, two."}, "a.txt:1"),
        Row({"text": "Three; four, five"}, "a.txt:3"),
    ]
    path.write_text("label\ttext\n1\ta\n0\tb\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"a\.txt: every row has 1 '\\t', .* Set data\.separator \(of flexkd predict: --"
    ):
        read_file(path)
    assert read_file(path, text_format=TextFormat("tab")).columns == ("label", "text")
    assert len(read_file(path, text_format=TextFormat("none")).rows) == 3
