"""R02: equal content gives equal classes, or the same refusal, in whatever file and type it is stored."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flexkd.data.examples.classification import ClassificationData, load_classification
from flexkd.data.examples.label_classes import LabelNames
from flexkd.data.examples.teacher_labels import ModelLabels
from flexkd.errors import DataError, FlexKDError, VocabularyError

TYPES: Final = {"int": int, "float": float, "text": str, "padded text": lambda value: f" {value} "}
FILES: Final = ("csv", "tsv", "jsonl", "json", "parquet")
REPEATS: Final = 8


def write(path: Path, labels: Sequence[Any], arrow: pa.DataType | None = None) -> str:
    """Rows of two columns, text and label, in the format of the file's ending."""
    texts = [f"text number {number}" for number in range(len(labels))]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            cells = [json.dumps(label) if isinstance(label, list) else label for label in labels]
            writer.writerows([("text", "label"), *zip(texts, cells, strict=True)])
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts, "label": pa.array(labels, type=arrow)}), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def load(source: str, **options: Any) -> ClassificationData:
    return load_classification(
        train=source, validation=0.2, test=0.2, text="text", text_pair=None, label="label", **options
    )


def classes_by_text(data: ClassificationData) -> dict[str, Any]:
    """The names of each row's classes."""

    def named(label: Any) -> Any:
        if isinstance(label, tuple):
            return tuple(name for name, flag in zip(data.labels.names, label, strict=True) if flag)
        return data.labels.names[label]

    return {row.texts[0]: named(row.label) for rows in (data.train, data.validation, data.test) for row in rows}


def outcome(source: str, **options: Any) -> Any:
    """Names, class of each row and fingerprint, or the refusal without its places."""
    try:
        data = load(source, **options)
    except FlexKDError as error:
        return re.sub(r"data\.\w+:(row )?\d+", "...", str(error))
    return data.labels.names, classes_by_text(data), data.fingerprint


def storages(folder: Path, content: Sequence[Any]) -> dict[str, str]:
    """The same content in every type and file."""
    paths = {}
    for name, convert in TYPES.items():
        if name in ("int", "float") and not all(isinstance(value, int) for value in content):
            continue
        for ending in FILES:
            place = folder / name
            place.mkdir(exist_ok=True)
            paths[f"{name} {ending}"] = write(place / f"data.{ending}", [convert(value) for value in content])
    dictionary = folder / "dictionary"
    dictionary.mkdir()
    values = list(map(str, content))
    paths["dictionary parquet"] = write(dictionary / "data.parquet", values, pa.dictionary(pa.int8(), pa.string()))
    return paths


FOUR: Final = ["World", "Sports", "Business", "Science"]
LAYOUTS: Final[dict[str, list[Any]]] = {
    "from 0": [0, 1, 2, 3],
    "from 1": [1, 2, 3, 4],
    "gaps": [0, 2, 5, 9],
    "no 0 and no end": [1, 2, 3],
    "beyond both": [0, 1, 2, 3, 4],
    "twelve": list(range(12)),
    "padded codes": ["00", "01", "02", "03"],
    "two spellings": ["0", "00", "1", "01"],
    "text": FOUR,
    "other case": ["WORLD", "sports", "Business", "SCIENCE"],
    "truth": ["true", "false"] * 2,
}
ORDER: Final = tuple(FOUR)
UNDECIDED: Final = "UNDECIDED"
EXPECTED: Final[dict[tuple[str, str], Any]] = {
    ("from 0", "none"): ("0", "1", "2", "3"),
    ("from 1", "none"): ("1", "2", "3", "4"),
    ("gaps", "none"): UNDECIDED,
    ("no 0 and no end", "none"): ("1", "2", "3"),
    ("beyond both", "none"): ("0", "1", "2", "3", "4"),
    ("twelve", "none"): tuple(map(str, range(12))),
    ("padded codes", "none"): ("00", "01", "02", "03"),
    ("two spellings", "none"): UNDECIDED,
    ("text", "none"): ("Business", "Science", "Sports", "World"),
    ("other case", "none"): ("Business", "SCIENCE", "WORLD", "sports"),
    ("truth", "none"): ("false", "true"),
    ("from 0", "list"): ORDER,
    ("from 1", "list"): ORDER,
    ("gaps", "list"): UNDECIDED,
    ("no 0 and no end", "list"): UNDECIDED,
    ("beyond both", "list"): UNDECIDED,
    ("twelve", "list"): UNDECIDED,
    ("padded codes", "list"): ORDER,
    ("text", "list"): ORDER,
    ("other case", "list"): ORDER,
    ("truth", "list"): UNDECIDED,
    **{(layout, "mapping"): "as mapped" for layout in LAYOUTS},
}


def names_for(layout: str, kind: str) -> LabelNames | None:
    if kind == "none":
        return None
    return FOUR if kind == "list" else {str(value): f"class {value}" for value in reversed(LAYOUTS[layout])}


@pytest.mark.parametrize(("layout", "kind"), list(EXPECTED))
def test_R02_equal_content_gives_equal_classes_from_any_storage(tmp_path: Path, layout: str, kind: str) -> None:
    content, names = LAYOUTS[layout] * REPEATS, names_for(layout, kind)
    outcomes = {name: outcome(path, label_names=names) for name, path in storages(tmp_path, content).items()}
    first, *others = outcomes.values()
    assert all(other == first for other in others), outcomes
    expected = EXPECTED[layout, kind]
    if expected == UNDECIDED:
        assert isinstance(first, str), first
        assert re.search(r"\n  value +class +rows\n", first) or "cannot be used, more than a tenth" in first
        return
    if kind == "mapping":
        assert isinstance(names, dict)
        expected = tuple(names.values())
    assert first[0] == expected
    position = {value: index for index, value in enumerate(LAYOUTS[layout])}
    by_place = kind == "list" and layout in ("from 0", "from 1", "padded codes")
    for text, name in first[1].items():
        value = content[int(text.split()[-1])]
        meant = f"class {value}" if kind == "mapping" else FOUR[position[value]] if by_place else str(value)
        assert name.casefold() == meant.casefold()


@pytest.mark.parametrize("kind", ["none", "same names", "another order", "new names", "mapping"])
def test_R02_names_in_the_file_say_which_class_a_number_is(tmp_path: Path, kind: str) -> None:
    names: dict[str, Any] = {
        "none": None,
        "same names": [name.upper() for name in FOUR],
        "another order": FOUR[::-1],
        "new names": ["a", "b", "c", "d"],
        "mapping": {"2": "money", "World": "news", "sports": "news", "Science": "news"},
    }
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=FOUR))
    numbers = [0, 1, 2, 3] * REPEATS
    texts = [f"text number {number}" for number in range(len(numbers))]
    stored = tmp_path / "data.parquet"
    datasets.Dataset.from_dict({"text": texts, "label": numbers}, features=features).to_parquet(stored)
    coded = load(str(stored), label_names=names[kind])
    meanings = {
        "none": FOUR,
        "same names": [name.upper() for name in FOUR],
        "another order": FOUR,
        "new names": ["a", "b", "c", "d"],
        "mapping": ["news", "news", "money", "news"],
    }[kind]
    assert {text: meanings[numbers[int(text.split()[-1])]] for text in texts} == classes_by_text(coded)
    if kind in ("same names", "another order"):
        # The same content as text, with the same names, is the same data.
        plain = write(tmp_path / "data.csv", [FOUR[number] for number in numbers])
        assert load(plain, label_names=names[kind]).fingerprint == coded.fingerprint


LISTS: Final[dict[str, tuple[list[Any], tuple[str, ...] | None]]] = {
    "names": ([["joy", "anger"], [], [" fear", "joy"]], ("anger", "fear", "joy")),
    "numbers": ([[0, 11], [], [2, 10], *([number] for number in range(12))], tuple(map(str, range(12)))),
    "numbers as text": ([["0", "11"], [], ["2", "10"], *([str(n)] for n in range(12))], tuple(map(str, range(12)))),
    "flags": ([[1, 0, 1], [0, 0, 0], [0, 1, 1]], ("0", "1", "2")),
    "flags as truth": ([[True, False, True], [False] * 3, [False, True, True]], ("0", "1", "2")),
    "flags as text": ([["1", "0", "1"], ["0"] * 3, ["0", "1", "1"]], ("0", "1", "2")),
    "gaps": ([[3], [3, 7], [7]], None),
}


@pytest.mark.parametrize("layout", list(LISTS))
def test_R02_lists_of_labels_mean_the_same_in_any_storage(tmp_path: Path, layout: str) -> None:
    lists, expected = LISTS[layout]
    content = lists * REPEATS
    paths = [write(tmp_path / f"data.{ending}", content) for ending in FILES]
    (tmp_path / "text").mkdir()
    paths.append(write(tmp_path / "text" / "data.jsonl", [json.dumps(label) for label in content]))
    first, *others = (outcome(path, problem="multi_label") for path in paths)
    assert all(other == first for other in others)
    if expected is None:
        assert isinstance(first, str)
        assert "leave a gap: 3, 7, but no 0" in first
        return
    assert first[0] == expected
    for text, names in first[1].items():
        value = content[int(text.split()[-1])]
        if "flags" in layout:
            value = [index for index, flag in enumerate(value) if str(flag).lower() in ("1", "true")]
        assert set(names) == {str(item).strip() for item in value}


def test_R02_lists_of_class_numbers_say_the_names_of_the_file(tmp_path: Path) -> None:
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.List(datasets.ClassLabel(names=["joy", "anger", "fear"]))
    )
    numbers = [[0, 1], [], [2, 0]] * REPEATS
    texts = [f"text number {number}" for number in range(len(numbers))]
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_dict({"text": texts, "label": numbers}, features=features).to_parquet(path)
    data = load(str(path), problem="multi_label")
    assert data.labels.names == ("joy", "anger", "fear")
    assert classes_by_text(data)["text number 2"] == ("joy", "fear")
    plain = write(tmp_path / "plain.jsonl", [[["joy", "anger", "fear"][n] for n in items] for items in numbers])
    assert load(plain, problem="multi_label", label_names=["joy", "anger", "fear"]).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (None, ("false", "true")),
        (["no", "yes"], ("no", "yes")),
        ({"false": "yes", "true": "no"}, ("yes", "no")),
    ],
)
def test_R02_truth_is_the_same_as_a_word_and_as_a_value(
    tmp_path: Path, names: LabelNames | None, classes: tuple[str, ...]
) -> None:
    outcomes = []
    for values in ([True, False], ["True", "False"], ["true", "FALSE"]):
        paths = [write(tmp_path / f"data.{ending}", values * 20) for ending in FILES]
        outcomes += [outcome(path, label_names=names) for path in paths]
    assert all(other == outcomes[0] for other in outcomes)
    assert outcomes[0][0] == classes


def test_R02_splits_of_different_types_have_one_set_of_classes(tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", [float(number) for number in range(12)] * REPEATS)
    test = write(tmp_path / "test.jsonl", [str(number) for number in range(12)])
    data = load_classification(train=train, validation=0.2, test=test, text="text", text_pair=None, label="label")
    assert data.labels.names == tuple(map(str, range(12)))
    assert {row.texts[0]: row.label for row in data.test} == {f"text number {n}": n for n in range(12)}


def test_R02_files_that_name_the_classes_in_another_order_are_read_by_name(tmp_path: Path) -> None:
    def stored(name: str, names: list[str], numbers: list[int]) -> str:
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
        texts = [f"{name} number {number}" for number in range(len(numbers))]
        path = tmp_path / f"{name}.parquet"
        datasets.Dataset.from_dict({"text": texts, "label": numbers}, features=features).to_parquet(path)
        return str(path)

    train = stored("train", ["no", "yes"], [0, 1] * 20)
    test = stored("test", ["yes", "no"], [0, 1])
    options: dict[str, Any] = {"validation": 0.2, "text": "text", "text_pair": None, "label": "label"}
    data = load_classification(train=train, test=test, **options)
    assert {row.texts[0]: row.label for row in data.test} == {"test number 0": 1, "test number 1": 0}
    with pytest.raises(DataError, match="the sources that are read as one name its classes differently"):
        load_classification(train=f"{train} + {test}", test=test, **options)
    other = stored("other", ["yes", "maybe"], [0, 1])
    with pytest.raises(DataError, match="the sources name the classes of 'label' differently"):
        load_classification(train=train, test=other, **options)
    plain = write(tmp_path / "plain.csv", ["0", "1"])
    data = load_classification(train=train, test=plain, **options)
    assert {row.texts[0]: row.label for row in data.test} == {"text number 0": 0, "text number 1": 1}
    with pytest.raises(DataError, match="the numbers 1, 2 without names, which may count from 0 or from 1"):
        load_classification(train=train, test=write(tmp_path / "plain.csv", ["1", "2"]), **options)
    data = load_classification(train=train, test=other, label_names=["no", "yes", "maybe"], **options)
    assert {row.texts[0]: row.label for row in data.test} == {"other number 0": 1, "other number 1": 2}


def followed(message: str, names: Mapping[str, str]) -> dict[str, str]:
    """The mapping that an error asks for, with these names in the places of NAME."""
    mapping = yaml.safe_load(re.search(r"\{.*?\}", message)[0])  # type: ignore[index]
    return {value: names[value] for value in mapping}


@pytest.mark.parametrize(
    ("content", "names", "meant"),
    [
        ([0, 2, 5, 9], None, ("a", "b", "c", "d")),
        (["0", "00", "1", "01"], None, ("a", "a", "b", "b")),
        (["Pos", "pos", "neg"], None, ("positive", "positive", "negative")),
        ([1, 2, 3], ["a", "b", "c", "d"], ("a", "b", "c")),
        ([0, 1, 2, 3, 4], ["a", "b", "c", "d"], ("none", "a", "b", "c", "d")),
        ([-1, 1], None, ("bad", "good")),
        ([-1, 0, 1], ["bad", "fair", "good"], ("bad", "fair", "good")),
        ([True, False], ["a", "b", "c"], ("a", "b")),
    ],
)
def test_R02_the_advice_of_a_refusal_works_when_it_is_followed(
    tmp_path: Path, content: list[Any], names: list[str] | None, meant: tuple[str, ...]
) -> None:
    path = write(tmp_path / "data.jsonl", content * 12)
    with pytest.raises(DataError) as refusal:
        load(path, label_names=names)
    spelled = [str(value).lower() if isinstance(value, bool) else str(value) for value in content]
    mapping = followed(str(refusal.value), dict(zip(spelled, meant, strict=True)))
    assert mapping.keys() == set(spelled)
    data = load(path, label_names=mapping)
    assert data.bad_rows == ()
    assert classes_by_text(data) == {f"text number {n}": meant[n % len(content)] for n in range(len(content) * 12)}


def test_R02_numbers_from_1_are_printed_with_their_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    data = load(write(tmp_path / "data.csv", [1, 2, 3, 4] * REPEATS), label_names=FOUR)
    mapping = "'1' is 'World' (8 rows), '2' is 'Sports' (8 rows), '3' is 'Business' (8 rows), '4' is 'Science' (8 rows)"
    assert data.label_notes == (
        f"data.label: the numbers in 'label' start at 1 and are taken for the label names in order: {mapping}",
    )
    assert f"data.label: {mapping}" in caplog.messages


def test_R02_a_changed_mapping_changes_the_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", [0, 1] * 20)
    swapped = ModelLabels("teacher.model", "t", ("yes", "no"))
    data = [
        load(path, label_names=["no", "yes"]),
        load(path, label_names=["yes", "no"]),
        load(path, label_names={"0": "yes", "1": "no"}),
        load(path, label_names=["no", "yes"], teacher=swapped),
    ]
    fingerprints = [entry.fingerprint for entry in data]
    assert fingerprints[1] == fingerprints[2]
    assert len({fingerprints[0], fingerprints[1], fingerprints[3]}) == 3


def test_R02_many_bad_rows_stop_unless_they_may_be_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", [*([0, 1] * 120), *([7] * 160)])
    with pytest.raises(DataError) as refusal:
        load(path, label_names=["no", "yes"])
    assert str(refusal.value).splitlines() == [
        "data.train: 160 of 400 rows cannot be used, more than a tenth. Correct them, or set data.bad_rows: skip to go"
        " on without them.",
        "  160 x label is out of range: 7 with 2 label names (data.csv:242, data.csv:243, data.csv:244, ...)",
    ]
    assert sum(load(path, label_names=["no", "yes"], bad_rows="skip").num_rows.values()) == 240
    few = write(tmp_path / "few.csv", [*([0, 1] * 18), *([7] * 4)])
    assert load(few, label_names=["no", "yes"]).skipped == {"label is out of range": 4}


@pytest.mark.parametrize("missing", [None, "", "  ", float("nan"), "NaN"])
def test_R02_no_label_is_no_label_in_any_spelling(tmp_path: Path, missing: object) -> None:
    path = write(tmp_path / "data.jsonl", [*([0, 1] * 20), *([missing] * 40)])
    with pytest.raises(DataError, match=r"or data\.unlabelled: keep to learn rows without a label"):
        load(path)
    data = load(path, unlabelled="keep", bad_rows="skip")
    assert data.labels.names == ("0", "1")
    assert sum(row.label is None for row in data.train) == 40


def test_R02_a_teachers_classes_come_first_and_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", [0, 1] * 20)
    swapped = ModelLabels("teacher.model", "t", ("POSITIVE", "Negative"))
    data = load(path, label_names=["negative", "positive"], teacher=swapped)
    assert data.labels.names == ("positive", "negative")
    assert classes_by_text(data)["text number 0"] == "negative"
    assert data.label_notes == (
        "teacher.model: its labels ['POSITIVE', 'Negative'] are in another order than ['negative', 'positive']: "
        "taken by name.",
    )
    flags = write(tmp_path / "flags.jsonl", [[1, 0], [0, 1]] * 20)
    data = load(flags, problem="multi_label", label_names=["negative", "positive"], teacher=swapped)
    assert data.labels.names == ("positive", "negative")
    assert classes_by_text(data)["text number 0"] == ("negative",)


def test_R02_texts_that_no_teacher_names_are_refused_and_the_advice_works(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", ["bad", "good"] * 20)
    teacher = ModelLabels("teacher.model", "t", ("POSITIVE", "NEGATIVE"))
    with pytest.raises(VocabularyError, match="it is not clear which is which") as refusal:
        load(path, teacher=teacher)
    mapping = followed(str(refusal.value), {"bad": "NEGATIVE", "good": "POSITIVE"})
    data = load(path, label_names=mapping, teacher=teacher)
    assert data.labels.names == ("POSITIVE", "NEGATIVE")
    assert classes_by_text(data)["text number 0"] == "NEGATIVE"
    more = ModelLabels("teacher.model", "t", ("neutral", "good", "bad"))
    with pytest.raises(VocabularyError, match=r"Or set data\.label_names") as refusal:
        load(path, teacher=more)
    names = yaml.safe_load(re.search(r"data\.label_names: (\[.*?\])", str(refusal.value))[1])  # type: ignore[index]
    data = load(path, label_names=names, teacher=more)
    assert data.labels.names == more.names
    assert classes_by_text(data)["text number 1"] == "good"


@pytest.mark.parametrize("names", [None, ["neg", "pos"]])
@pytest.mark.parametrize("label", [1, "1", 5])
def test_R02_one_class_is_refused_as_one_class(tmp_path: Path, label: object, names: LabelNames | None) -> None:
    with pytest.raises(DataError, match=r"every row has the same label, '?[15]'?, so there is nothing to learn"):
        load(write(tmp_path / "rows.jsonl", [label] * 20), label_names=names)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["pos"], "every row has the same label, 'pos'"), ([["pos"], ["neg"]], "Nothing is left; correct them")],
)
def test_R02_rows_without_two_classes_say_so_beside_a_teacher(tmp_path: Path, labels: list[Any], message: str) -> None:
    teacher = ModelLabels("teacher.model", "./model", ("neg", "pos"))
    with pytest.raises(DataError, match=re.escape(message)):
        load(write(tmp_path / "rows.jsonl", labels * 10), teacher=teacher)


def test_R02_labels_that_nothing_can_be_made_of_are_not_compared_with_others(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"label is no number, text or truth: dict \{'id': 1\}"):
        load(write(tmp_path / "rows.jsonl", [{"id": 1}] * 8))
