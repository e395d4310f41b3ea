import re
from collections.abc import Mapping, Sequence

import pytest

from flexkd.data.examples.labels import LabelCell, LabelColumn, LabelSpace, ParsedLabel, read_labels
from flexkd.errors import DataError

NAN = float("nan")


def read_all(
    values: Sequence[object],
    problem: str = "single_label",
    *,
    is_csv: bool = False,
    label_names: Sequence[str] | Mapping[str, str] | None = None,
    stored_names: Sequence[str] = (),
) -> tuple[LabelSpace, Sequence[ParsedLabel]]:
    placed = [LabelCell(value, f"a:{line}") for line, value in enumerate(values, start=1)]
    source = LabelColumn(placed, not is_csv, tuple(stored_names))
    read = read_labels([source], column="label", problem=problem, label_names=label_names)
    return read.space, read.labels[0]


def test_integers_booleans_and_texts_name_themselves() -> None:
    space, read = read_all([1, 0, 2, 1.0])
    assert (space, [row.label for row in read]) == (LabelSpace("single_label", ("0", "1", "2")), [1, 0, 2, 1])
    space, read = read_all([True, False, True])
    assert (space.names, [row.label for row in read]) == (("false", "true"), [1, 0, 1])
    space, read = read_all(["pos", " neg", "pos "])
    assert (space.names, [row.label for row in read]) == (("neg", "pos"), [1, 0, 1])


def test_D16_single_labels_that_are_none() -> None:
    _, read = read_all([0, 1, 0, 1, 0, NAN, -1, "2", "", None, 1.5, [0]])
    assert [row.reason for row in read[5:]] == [
        "label is NaN",
        "label is negative: -1 (in many public data sets -1 means no label)",
        "label is of another kind: text '2', most are integers",
        "label is empty",
        "label is null",
        "label is of another kind: float 1.5, most are integers",
        "label is of another kind: list [0], most are integers",
    ]
    assert all(row.label is None for row in read[5:])
    _, read = read_all(["a", "b", "a", 2, True])
    assert read[3].reason == "label is of another kind: integer 2, most are text"
    assert read[4].reason == "label is of another kind: boolean True, most are text"


def test_given_names_take_names_and_indices() -> None:
    space, read = read_all([0, 1, "pos", 7, "no"], label_names=["neg", "pos"])
    assert space.names == ("neg", "pos")
    assert read[:3] == [ParsedLabel(0, None), ParsedLabel(1, None), ParsedLabel(1, None)]
    assert read[3].reason == "label is out of range: 7 with 2 label names"
    assert read[4].reason == "label is of another kind: text 'no', most are integers"
    _, read = read_all(["pos", "neg", "neutral"], label_names=["pos", "neg"])
    assert read == [
        ParsedLabel(0, None),
        ParsedLabel(1, None),
        ParsedLabel(None, "label is not among the label names: 'neutral'"),
    ]


@pytest.mark.parametrize("is_csv", [False, True])
def test_names_that_are_numbers_are_names(is_csv: bool) -> None:
    stars = [str(star) if is_csv else star for star in (1, 2, 3, 5, 0)]
    _, read = read_all(stars, label_names=["1", "2", "3", "4", "5"], is_csv=is_csv)
    assert [row.label for row in read] == [0, 1, 2, 4, None]
    assert read[4].reason == "label is not among the label names: '0'"
    _, read = read_all([-1, 0, 1], label_names=["-1", "0", "1"])
    assert [row.label for row in read] == [0, 1, 2]


def test_stored_names_are_for_indices_and_give_way_to_given_ones() -> None:
    space, read = read_all([0, 4, 1], stored_names=["1", "2", "3", "4", "5"])
    assert (space.names, [row.label for row in read]) == (("1", "2", "3", "4", "5"), [0, 4, 1])
    space, _ = read_all([0, 1], stored_names=["no", "yes"], label_names=["bad", "good"])
    assert space.names == ("bad", "good")


def test_a_gap_is_an_error_unless_names_are_given() -> None:
    message = (
        "data.label: the integers in 'label' leave a gap: 0, 2, but no 1 (2 first appears at a:3). "
        "Set data.label_names to the name of each stored value: {'0': NAME, '2': NAME}."
    )
    with pytest.raises(DataError, match=re.escape(message)):
        read_all([0, 0, 2, 2])
    with pytest.raises(DataError, match="leave a gap: 1, 2, 4, but no 3"):
        read_all([1, 2, 4])
    _, read = read_all([0, 2], label_names=["a", "b", "c"])
    assert [row.label for row in read] == [0, 2]


def test_csv_labels_are_integers_where_most_look_like_them() -> None:
    space, read = read_all(["0", " 1", "1.0", "", "two", "1"], is_csv=True)
    assert space.names == ("0", "1")
    assert [row.label for row in read] == [0, 1, 1, None, None, 1]
    assert read[3] == ParsedLabel(None, "label is null", is_missing=True)
    assert read[4].reason == "label is of another kind: text 'two', most are integers"
    space, read = read_all(["pos", "neg", "7", "pos"], is_csv=True)
    assert space.names == ("7", "neg", "pos")
    space, read = read_all(["404", "500", "timeout", "404"], is_csv=True, label_names=["404", "500", "timeout"])
    assert [row.label for row in read] == [0, 1, 2, 0]


@pytest.mark.parametrize("is_csv", [False, True])
def test_numbers_between_classes_point_to_regression(is_csv: bool) -> None:
    values = [str(value) if is_csv else value for value in (3.8, 0.25, 5.0, 1.0)]
    with pytest.raises(DataError, match=r"between classes \(first 3\.8 at a:1\)\. Set task\.problem: regression"):
        read_all(values, is_csv=is_csv)


def test_a_column_of_distinct_values_is_no_label() -> None:
    with pytest.raises(DataError, match="'label' holds 300 different labels in 300 rows"):
        read_all([f"text {n}" for n in range(300)])
    with pytest.raises(DataError, match="'label' holds 300 different labels in 300 rows"):
        read_all(list(range(300)))


def test_label_names_are_checked() -> None:
    with pytest.raises(DataError, match="one class only, 'a'"):
        read_all([0, 0], label_names=["a"])
    with pytest.raises(DataError, match="'a' appears more than once"):
        read_all([0, 1], label_names=["a", "b", "a"])
    with pytest.raises(DataError, match="2 names, but a regression has one output"):
        read_all([0.5], "regression", label_names=["a", "b"])
    with pytest.raises(DataError, match=r"unknown problem 'multi-label'.*Did you mean 'multi_label'\?"):
        read_all([0.5], "multi-label")


def test_multi_label_flags() -> None:
    space, read = read_all(
        [[1, 0, 1], [0, 0, 0], [True, 1.0, 0], [1, 0], [0, 2, 1], [0, NAN, 1], 1, None], "multi_label"
    )
    assert space == LabelSpace("multi_label", ("0", "1", "2"))
    assert [row.label for row in read[:3]] == [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 0.0)]
    assert [row.reason for row in read[3:]] == [
        "label has the wrong length: 2, not 3",
        "label is not all 0 or 1: 2",
        "label is not all 0 or 1: nan",
        "label is not a list: 1",
        "label is null",
    ]
    _, read = read_all([[1, 0, 1], [0, 1]], "multi_label", label_names=["a", "b"])
    assert [row.label for row in read] == [None, (0.0, 1.0)]


@pytest.mark.parametrize("is_csv", [False, True])
def test_multi_label_names(is_csv: bool) -> None:
    values: list[object] = [["joy", "anger"], [], ["fear", "joy", " joy"], "joy"]
    if is_csv:
        values = ['["joy", "anger"]', "[]", '["fear", "joy", " joy"]', "joy"]
    space, read = read_all(values, "multi_label", is_csv=is_csv)
    assert space.names == ("anger", "fear", "joy")
    assert [row.label for row in read] == [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 1.0), None]
    assert read[3].reason == "label is not a list: 'joy'"
    _, read = read_all([["b"], ["c"], ["a", 3]], "multi_label", label_names=["b", "a"])
    assert read[0].label == (1.0, 0.0)
    assert read[1].reason == "label is not among the label names: 'c'"
    assert read[2].reason == "label is of another kind: integer 3, most are text"


def test_regression_values() -> None:
    space, read = read_all([3, 2.5, True, "2.5", NAN, float("inf"), 10**400, None], "regression")
    assert space == LabelSpace("regression", ("label",))
    assert [row.label for row in read[:4]] == [3.0, 2.5, None, 2.5]
    assert [row.reason for row in read[4:]] == [
        "label is NaN",
        "label is not finite: inf",
        "label is not finite: inf",
        "label is null",
    ]
    assert read[2].reason == "label is not a number: True"
    _, read = read_all(["3", " 2.5e0", "", "nan", "1_0", "high"], "regression", is_csv=True)
    assert [row.label for row in read] == [3.0, 2.5, None, None, None, None]
    assert [row.reason for row in read[2:]] == [
        "label is null",
        "label is NaN",
        "label is not a number: '1_0'",
        "label is not a number: 'high'",
    ]


def test_D19_a_label_that_cannot_be_written_is_refused() -> None:
    space, read = read_all(["good", "bad", "g\u00fct", "\ud800"])
    assert space.names == ("bad", "good", "g\u00fct")
    assert read[3].reason == r"label is of another kind: half of a surrogate pair '\ud800', most are text"
    space, read = read_all([["a"], ["b", "\ud800"]], "multi_label")
    assert space.names == ("a", "b")
    assert read[1].reason == r"label is of another kind: half of a surrogate pair '\ud800', most are text"
