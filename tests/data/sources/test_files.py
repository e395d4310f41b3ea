import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from flexkd.data.sources.files import read_file
from flexkd.data.sources.table import Row
from flexkd.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def values(path: Path) -> list[dict[str, object]]:
    return [dict(row.values) for row in read_file(path).rows]


def places(path: Path) -> list[str]:
    return [row.where for row in read_file(path).rows]


def test_D19_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbftext,label\r\ngood,1\r\nbad,0\r\n")
    assert values(path) == [{"text": "good", "label": "1"}, {"text": "bad", "label": "0"}]
    assert places(path) == ["a.csv:2", "a.csv:3"]
    lines = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "good"}\r\n\r\n{"text": "bad"}\r\n')
    assert values(lines) == [{"text": "good"}, {"text": "bad"}]
    assert places(lines) == ["a.jsonl:1", "a.jsonl:3"]


def test_D19_csv_field_with_newline_keeps_line_numbers_right(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"one\ntwo\nthree",1\nplain,0\n\n"x\r\ny",1\nlast,0')
    assert [row["text"] for row in values(path)] == ["one\ntwo\nthree", "plain", "x\r\ny", "last"]
    assert places(path) == ["a.csv:2", "a.csv:5", "a.csv:7", "a.csv:9"]


def test_D19_last_line_without_newline_and_line_separators_inside_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one\u2028still one"}\n{"text": "two"}')
    assert values(path) == [{"text": "one\u2028still one"}, {"text": "two"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_D19_one_json_array_has_the_line_of_each_row(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, '\n[\n {"text": "one"},\n {"text":\n  "two"}\n, 5, {"text": "three"}]\n')
    table = read_file(path)
    assert [row.where for row in table.rows] == [f"{name}:3", f"{name}:4", f"{name}:6", f"{name}:6"]
    assert [row.values.get("text") for row in table.rows] == ["one", "two", None, "three"]
    assert table.rows[2].problem == "row is not an object: int"
    assert values(write(tmp_path / "empty.json", "[ ]")) == []


def test_D19_everything_at_once_in_an_ascii_locale(tmp_path: Path) -> None:
    """The case's own run: PYTHONUTF8=0 and LC_ALL=C, where open() without an encoding reads ASCII."""
    grin = "\U0001f600"
    write(tmp_path / "a.csv", f'\ufefftext,label\r\n"{grin} first\nline",1\r\nna\u00efve,0\r\n')
    write(tmp_path / "b.jsonl", f'[{{"text": "{grin}", "label": 0}},\n {{"text": "\\ud83d", "label": 1}}]')
    write(tmp_path / "c.jsonl", f'{{"text": "{grin} \\ud83d\\ude00", "label": 0}}\n{{"text": "caf\u00e9", "label": 1}}')
    program = """
        import json, locale, pathlib, sys
        from flexkd.data.sources.rows import read_rows
        from flexkd.data.examples.classification import load_classification
        assert locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8"), "the locale is not ASCII"
        folder = pathlib.Path(sys.argv[1])
        a, b, c = (str(folder / name) for name in ("a.csv", "b.jsonl", "c.jsonl"))
        found = [[[row.where, row.values["text"]] for row in read_rows(path)] for path in (a, b, c)]
        data = load_classification(train=c, validation=c, test=b, text="text", text_pair=None, label="label",
                                   bad_rows="skip")
        print(json.dumps([found, [[bad.where, bad.reason] for bad in data.bad_rows]]))
    """
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    (table, array, lines), bad = json.loads(done.stdout)
    assert table == [["a.csv:2", f"{grin} first\nline"], ["a.csv:4", "na\u00efve"]]
    assert array == [["b.jsonl:1", grin], ["b.jsonl:2", "\ud83d"]]
    assert lines == [["c.jsonl:1", f"{grin} {grin}"], ["c.jsonl:2", "caf\u00e9"]]
    assert bad == [["b.jsonl:2", "text holds half of a surrogate pair: U+D83D at character 1"]]


def test_a_broken_json_line_is_one_bad_row(tmp_path: Path) -> None:
    huge = "1" * 5000
    path = write(tmp_path / "a.jsonl", f'{{"text": "one"}}\n{{"text": \n[1]\n{{"n": {huge}}}\n{"[" * 100_000}\n')
    rows = read_file(path).rows
    assert rows[0] == Row({"text": "one"}, "a.jsonl:1")
    assert rows[1].problem == "row is not JSON: Expecting value at column 10"
    assert rows[2].problem == "row is not an object: list"
    assert [row.problem is None for row in rows] == [True, False, False, False, False]


def test_a_broken_array_is_refused_with_the_line(tmp_path: Path) -> None:
    for content, message in [
        ('[{"a": 1},\n{"a": }]', "a.json:2: the array is not JSON: Expecting value"),
        ('[{"a": 1}\n{"a": 2}]', "a.json:2: the array goes on without ','"),
        ('[{"a": 1}\n\n', "a.json:3: the array goes on without ',' or ends without ']'"),
        ('[{"a": 1}]\n[]', "a.json:2: more text follows the array"),
    ]:
        with pytest.raises(DataError) as caught:
            read_file(write(tmp_path / "a.json", content))
        assert str(caught.value).startswith(message)


def test_R10_one_object_of_columns_is_not_a_row(tmp_path: Path) -> None:
    columns = {"text": {"0": "x", "1": "y"}, "label": {"0": 0, "1": 1}}
    for content in (columns, {name: list(values.values()) for name, values in columns.items()}):
        for indent in (None, 1):
            path = write(tmp_path / "a.json", json.dumps(content, indent=indent))
            with pytest.raises(DataError, match=r"a\.json: holds one object \(text, label\), not rows\."):
                read_file(path)
    assert len(read_file(write(tmp_path / "a.json", '{"text": "x", "label": [0, 1]}')).rows) == 1


def test_R10_a_pointer_of_git_lfs_is_no_data(tmp_path: Path) -> None:
    for ending in ("csv", "jsonl", "parquet"):
        path = write(tmp_path / f"rows.{ending}", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(DataError, match="is a pointer of Git LFS and holds no rows"):
            read_file(path)


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_a_packed_file_has_the_rows_and_places_of_the_plain_one(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    for name, content in [
        ("a.csv", 'text,label\n"one\ntwo",1\nthree,0\n'),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}'),
        ("a.json", '[{"text": "one"}]'),
        ("a.txt", "one\n\ntwo"),
    ]:
        plain = read_file(write(tmp_path / name, content))
        packed = write(tmp_path / f"{name}{ending}", pack(content.encode()))
        assert read_file(packed) == plain
        write(packed, packed.read_bytes()[:-4])
        with pytest.raises(DataError, match=rf"{name}\{ending}: cannot be unpacked"):
            read_file(packed)
    with pytest.raises(DataError, match="Parquet is packed by itself"):
        read_file(write(tmp_path / f"a.parquet{ending}", pack(b"rows")))


def test_R10_a_packed_file_is_what_its_name_says(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown ending '\.zip'\. Known: .* behind them\. Unpack it first\."):
        read_file(tmp_path / "rows.csv.zip")
    with pytest.raises(DataError, match=r"^rows\.csv: is packed with gzip, unlike its name says"):
        read_file(write(tmp_path / "rows.csv", gzip.compress(b"text\none\n")))
    with pytest.raises(DataError, match=r"rows\.csv\.gz: cannot be unpacked \(Not a gzipped file"):
        read_file(write(tmp_path / "rows.csv.gz", b"text\none\n"))


def test_one_object_is_not_a_list_of_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"version": 1, "data": [{"text": "x"}]}, indent=1))
    with pytest.raises(DataError, match=r"a\.json: holds one object \(version, data\), not rows\."):
        read_file(path)


def test_empty_files_and_unknown_endings_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"\xef\xbb\xbf", b"\r\n \n"):
        with pytest.raises(DataError, match="the file is empty"):
            read_file(write(tmp_path / "b.csv", content))
    with pytest.raises(
        DataError, match=r"unknown ending '\.xlsx'\. Known: \.jsonl, \.json, \.csv, \.tsv, \.parquet, \.txt, and"
    ):
        read_file(tmp_path / "c.xlsx")


def test_parquet_rows_types_and_stored_class_names(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["one", None], "label": [1, 0], "flags": [[1, 0], [0, 1]]})
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    stored = json.dumps({"info": {"features": features}}).encode()
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": stored}), tmp_path / "a.parquet")
    read = read_file(tmp_path / "a.parquet")
    assert read.rows[1] == Row({"text": None, "label": 0, "flags": [0, 1]}, "a.parquet:row 2")
    assert read.class_names == {"label": ("no", "yes")}
    with pytest.raises(DataError, match="not a Parquet file"):
        read_file(write(tmp_path / "b.parquet", b"no parquet"))


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_R10_a_column_that_stands_twice_is_refused_in_every_kind_of_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        columns = [pyarrow.array(["one"]), pyarrow.array(["two"]), pyarrow.array([1])]
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, ["text", "text", "label"]), path)
    else:
        write(path, "text,text,label\none,two,1\n".replace(",", "\t" if ending == "tsv" else ","))
    for columns in (None, ["text"], ["label"]):
        with pytest.raises(DataError, match="the column 'text' appears twice"):
            read_file(path, columns)


def test_R10_a_row_of_json_with_a_key_twice_is_a_bad_row(tmp_path: Path) -> None:
    rows = ['{"text": "one", "text": "two"}', '{"text": "one", "of": {"a": 1, "a": 2}}', '{"text": "one"}']
    for path in (write(tmp_path / "a.jsonl", "\n".join(rows)), write(tmp_path / "a.json", f"[{', '.join(rows)}]")):
        read = read_file(path).rows
        assert [row.problem for row in read] == ["row holds a key twice: 'text'", "row holds a key twice: 'a'", None]
        assert read[2].values == {"text": "one"}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet"])
def test_R10_only_columns_that_are_asked_for_are_kept_and_all_are_known(tmp_path: Path, name: str) -> None:
    path, rows = (
        tmp_path / name,
        [{"text": "one", "more": "x" * 99, "label": "1"}, {"text": "two", "more": "", "label": "0"}],
    )
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith(("csv", "tsv")):
        sign = "," if name.endswith("csv") else "\t"
        write(path, "\n".join(sign.join(row) for row in (list(rows[0]), *(list(row.values()) for row in rows))))
    else:
        write(path, json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows)))
    table = read_file(path, ["label", "text", "no such"])
    assert [dict(row.values) for row in table.rows] == [{"text": "one", "label": "1"}, {"text": "two", "label": "0"}]
    assert table.columns == ("text", "more", "label")
    assert [row.values for row in read_file(path, []).rows] == [{}, {}]


def test_R10_a_column_that_is_not_asked_for_is_not_decoded(tmp_path: Path) -> None:
    far = pyarrow.array([3 * 10**17, 0], pyarrow.timestamp("us"))
    dotted = pyarrow.array([{"b": "inner"}] * 2)
    table = pyarrow.table({"text": ["one", "two"], "when": far, "a": dotted, "a.b": ["outer"] * 2})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    assert values_of(path, "text") == [{"text": "one"}, {"text": "two"}]
    assert values_of(path, "a.b")[0] == {"a.b": "outer"}
    with pytest.raises(DataError, match=r"column 'when' of type timestamp\[.*\] holds a value that cannot be read"):
        read_file(path, ["when"])


def values_of(path: Path, *columns: str) -> list[dict[str, object]]:
    return [dict(row.values) for row in read_file(path, columns).rows]
