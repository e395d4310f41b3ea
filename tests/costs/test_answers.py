"""Bytes of a cache before it is built: those that building it would find, and known arithmetic."""

import pytest

from flexkd.core.outputs import TopRule
from flexkd.costs.answers import Answers
from flexkd.teacher.cache.writer import CachePlan
from flexkd.teacher.live import LiveTeacher
from tests.teacher.cache.caches import request_of
from tests.tiny import VOCABULARY, tiny_model
from tests.training.language_rows import answer_rows, collator_of

ROWS = answer_rows(40)
PREDICTIONS = sum(label != -100 for row in ROWS for label in row["labels"])
TOKENS = sum(len(row["input_ids"]) for row in ROWS)


def answers(*, positions: float = 0, columns: int = 0, outputs: int = VOCABULARY, top_k: int | None = None) -> Answers:
    return Answers(len(ROWS), positions, columns, PREDICTIONS, outputs, top_k, writes_text=True)


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("positions", ["tokens", "supervised"])
def test_K09_bytes_are_those_that_building_the_cache_finds(storage: str, top_k: int | None, positions: str) -> None:
    model = tiny_model("llama", "causal")
    request = request_of((1, 5, 6, 30), positions, top=None if top_k is None else TopRule(top_k))
    plan = CachePlan(LiveTeacher(model), request, ROWS, collator_of(model), storage)
    count = TOKENS if positions == "tokens" else PREDICTIONS
    assert answers(positions=count, columns=4, top_k=top_k).bytes(storage) == plan.bytes


def test_K09_whole_outputs_of_a_large_vocabulary_take_hundreds_of_times_their_top() -> None:
    million = Answers(1, 0, 0, 1e6, 151_936, None, writes_text=True)
    assert million.bytes("float16") == pytest.approx(304e9, rel=1e-3)
    assert 100 * million.bytes("float16", 64) == pytest.approx(38.8e9, rel=1e-3)


def test_forms_are_those_that_can_be_chosen() -> None:
    assert list(answers(outputs=5000).forms()) == ["float16, all outputs", "float16, top 64 outputs"]
    assert list(answers(outputs=5000, columns=2, positions=9, top_k=3).forms()) == [
        "float16, top 3 outputs",
        "int8, top 3 outputs",
    ]
    assert Answers(0, 0, 4, 0, 10, None, writes_text=True).forms() == {}
    # A classifier's few outputs stay float32.
    assert Answers(10, 0, 0, 10, 3, None, writes_text=False).forms() == {"float16, all outputs": 10 * (3 * 4 + 32)}
