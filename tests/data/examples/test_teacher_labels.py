import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, BartConfig, BertConfig

from flexkd.data.examples.labels import LabelSpace
from flexkd.data.examples.teacher_labels import ModelLabels, model_labels, output_order
from flexkd.errors import VocabularyError


def model(*names: str, problem_type: str | None = None, where: str = "teacher.model") -> ModelLabels:
    return ModelLabels(where, "./model", names, problem_type)


def data(*names: str, problem: str = "single_label", is_ordered: bool = True) -> LabelSpace:
    return LabelSpace(problem, names, is_ordered)


def test_the_same_names_in_the_same_order_need_no_word() -> None:
    for names in (("no", "yes"), ("NO", "Yes"), ("A", "a")):
        order = output_order(model(*names), data(*(names if "a" in names else ("no", "yes"))))
        assert (order.classes, order.outputs, order.note, order.is_same) == ((0, 1), (0, 1), None, True)
    assert output_order(model("LABEL_0", problem_type="regression"), data("score", problem="regression")).note is None


@pytest.mark.parametrize("is_ordered", [True, False])
def test_R02_the_same_names_in_another_order_are_taken_by_name(is_ordered: bool) -> None:
    order = output_order(
        model("CONTRADICTION", "NEUTRAL", "ENTAILMENT"),
        data("contradiction", "entailment", "neutral", is_ordered=is_ordered),
    )
    assert (order.classes, order.is_same) == ((0, 2, 1), False)
    assert order.note is not None
    assert "taken by name" in order.note
    order = output_order(model("b", "c", "a"), data("a", "b", "c"))
    assert (order.classes, order.outputs) == ((1, 2, 0), (2, 0, 1))


def test_R02_names_that_only_count_are_taken_in_order_and_said() -> None:
    for names in (("LABEL_0", "LABEL_1"), ("label_0", "label_1"), ("0", "1")):
        order = output_order(model(*names), data("bad", "good", is_ordered=False))
        assert order.is_same
        said = f"teacher.model: its labels {list(names)} are taken for ['bad', 'good'] of the data, in this order."
        assert order.note is not None
        assert order.note.startswith(said)
    # Classes that have an order of their own meet other names in it.
    assert output_order(model("negative", "positive"), data("0", "1")).note is not None
    # Names that agree in part, each in its place, leave nothing open.
    assert output_order(model("neg", "neutral", "pos"), data("negative", "neutral", "positive")).is_same


@pytest.mark.parametrize(
    ("teacher", "labels", "message"),
    [
        (model("a", "b", "c"), data("x", "y"), "'./model' has 3 labels ['a', 'b', 'c'], the data have 2 ['x', 'y']."),
        (model("a"), data("a", "b", problem="multi_label"), "has 1 labels ['a'], the data have 2"),
        (model("x", "y"), data("a", "b", is_ordered=False), "it is not clear which is which"),
        (model("neutral", "neg", "pos"), data("negative", "neutral", "positive"), "it is not clear which is which"),
        (model("A", "a"), data("a", "b"), "it is not clear which is which"),
        (model("0", "1"), data("1", "2"), "it is not clear which is which"),
        (
            model("a", "b", problem_type="multi_label_classification"),
            data("a", "b"),
            "was made for multi_label_classification, the data are single_label_classification. Set teacher.fine_tune",
        ),
        (
            model("a", "b", problem_type="single_label_classification"),
            data("a", "b", problem="multi_label"),
            "was made for single_label_classification, the data are multi_label_classification.",
        ),
        (
            model("a", problem_type="regression", where="evaluate"),
            data("a", "b"),
            "evaluate: './model' was made for regression, the data are single_label_classification. Use another model.",
        ),
    ],
)
def test_R02_what_cannot_be_decided_is_refused(teacher: ModelLabels, labels: LabelSpace, message: str) -> None:
    with pytest.raises(VocabularyError, match=re.escape(message)):
        output_order(teacher, labels)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, ("LABEL_0", "LABEL_1")),
        ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({"id2label": {1: "b", 0: "a"}, "problem_type": None}, ("a", "b")),
        ({"id2label": {str(n): f"c{n}" for n in range(12)}}, tuple(f"c{n}" for n in range(12))),
    ],
)
def test_labels_of_a_config(config: dict[str, Any], names: tuple[str, ...]) -> None:
    assert model_labels(config, where="teacher.model", source="./model") == model(*names)


def test_R02_labels_that_leave_a_number_out_are_refused() -> None:
    with pytest.raises(VocabularyError, match=re.escape("'./model' numbers its labels ['0', '2'] in id2label")):
        model_labels({"id2label": {"0": "a", "2": "b"}}, where="teacher.model", source="./model")


def test_R02_a_count_that_is_not_that_of_the_names_counts_as_in_transformers() -> None:
    config = {"id2label": {"0": "neg", "1": "pos"}, "num_labels": 3}
    labels = model_labels(config, where="teacher.model", source="./model")
    assert labels.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert labels.names == tuple(BertConfig(**config).id2label.values())
    assert model_labels({**config, "num_labels": 2}, where="teacher.model", source="./model").names == ("neg", "pos")


@pytest.mark.parametrize("config", [BertConfig(num_labels=2), BartConfig(num_labels=2), BartConfig(num_labels=3)])
def test_R02_a_config_without_names_counts_as_in_transformers(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    labels = model_labels(stored, where="teacher.model", source="./model")
    assert labels.names == tuple(AutoConfig.from_pretrained(tmp_path).id2label.values())


def test_R02_numbered_outputs_of_another_number_may_be_named() -> None:
    with pytest.raises(VocabularyError, match="If its head has 2 outputs, name them in id2label of its config"):
        output_order(model("LABEL_0", "LABEL_1", "LABEL_2"), data("a", "b"))


def test_R02_names_of_outputs_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(VocabularyError, match="has a list as id2label in config"):
        model_labels({"id2label": ["a", "b"]}, where="teacher.model", source="./model")
