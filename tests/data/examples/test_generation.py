import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from flexkd.data.examples.generation import GenerationData, GenerationExample, Turn, load_generation
from flexkd.data.examples.row_checks import BadRow
from flexkd.errors import DataError


def rows_of(count: int, start: int = 0) -> list[dict[str, object]]:
    return [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(start, start + count)]


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def load(train: str, **changes: Any) -> GenerationData:
    options: dict[str, Any] = {"validation": 0.2, "test": 0.2, "kind": "instruction"}
    return load_generation(train=train, **(options | changes))


def all_of(data: GenerationData) -> list[GenerationExample]:
    return [*data.train, *data.validation, *data.test]


def found(data: GenerationData, text: str) -> GenerationExample:
    (example,) = [entry for entry in all_of(data) if any(turn.content == text for turn in entry.turns)]
    return example


def test_alpaca_rows_with_and_without_input(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"instruction": " Sort ", "input": "b a\n", "output": " a b "},
        {"instruction": "Greet", "input": "", "output": ["Hi", "Hello", "Hi", " "]},
        *({"instruction": f"i {n}", "output": "o"} for n in range(30)),
    ]
    columns = {"prompt": "instruction", "context": "input", "response": "output"}
    data = load(write(tmp_path / "a.jsonl", rows), **columns)
    sort, greet = found(data, "Sort"), found(data, "Greet")
    assert (sort.turns, sort.document, sort.answer) == ((Turn("user", "Sort"),), "b a", "a b")
    assert (greet.document, greet.answer, greet.references) == (None, "Hi", ("Hi", "Hello"))
    assert sort.id.startswith("a.jsonl:1#")
    assert sum(data.num_rows.values()) == 32
    assert not data.has_messages


def test_both_spellings_of_messages(tmp_path: Path) -> None:
    roles = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "see you")]
    older = {"system": "system", "user": "human", "assistant": "gpt"}
    rows: list[dict[str, object]] = [
        {"messages": [{"role": role, "content": text} for role, text in roles]},
        {"messages": [{"from": older[role], "value": f"{text}!"} for role, text in roles]},
        *(
            {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}]}
            for n in range(30)
        ),
    ]
    data = load(write(tmp_path / "a.jsonl", rows), messages="messages")
    example, other = found(data, "bye"), found(data, "bye!")
    assert example.turns == tuple(Turn(role, text) for role, text in roles[:-1])  # type: ignore[arg-type]
    assert example.answer == "see you"
    assert [turn.role for turn in other.turns] == [turn.role for turn in example.turns]
    assert data.has_messages


def test_D16_every_bad_row_is_listed_by_line_and_reason(tmp_path: Path) -> None:
    user = {"role": "user", "content": "q"}
    bad: list[tuple[dict[str, object], str]] = [
        ({"messages": "hi"}, "messages is no list of turns: 'hi'"),
        ({"messages": []}, "messages is no list of turns: []"),
        ({"messages": ["hi"]}, "messages: turn 1 is no object: 'hi'"),
        (
            {"messages": [{"role": "tool", "content": "q"}]},
            "messages has an unknown role: 'tool' in turn 1. Known: system,",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "messages has a turn that is not text: int 3: turn 1"),
        ({"messages": [user, user]}, "messages does not go from user to assistant in turn: user, user"),
        (
            {"messages": [{"role": "system", "content": "q"}]},
            "messages does not go from user to assistant in turn: system",
        ),
        ({"messages": [user]}, "empty answer"),
        ({"messages": [user, {"role": "assistant", "content": None}]}, "empty answer"),
    ]
    good = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "a"}]} for n in range(40)
    ]
    data = load(write(tmp_path / "a.jsonl", [*(row for row, _ in bad), *good]), messages="messages", bad_rows="skip")
    listed = {row.where: row.reason for row in data.bad_rows}
    assert [listed[f"a.jsonl:{n}"][: len(reason)] for n, (_, reason) in enumerate(bad, 1)] == [
        entry for _, entry in bad
    ]
    assert sum(data.num_rows.values()) == 40
    plain: list[dict[str, object]] = [{"prompt": None}, {"prompt": "a", "response": 3}, {"prompt": "x" * 1_000_000}]
    data = load(write(tmp_path / "b.jsonl", [*plain, *rows_of(40)]))
    assert [row.reason for row in data.bad_rows] == [
        "prompt is null",
        "response is not text: int 3",
        "prompt is too long: 1,000,000 characters, at most 999,999",
    ]


def test_D10_rows_without_an_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Hi {n}"} for n in range(5)])
    with pytest.raises(DataError) as caught:
        load(prompts)
    assert "5 of 5 rows have an empty answer (first: prompts.jsonl:1), no row has one" in str(caught.value)
    assert "unknown column 'response'" in str(caught.value)
    empty = write(tmp_path / "empty.jsonl", [{"prompt": "Hi", "response": ""}])
    with pytest.raises(
        DataError, match=r"1 of 1 rows have an empty answer \(first: empty\.jsonl:1\), no row has one\. "
    ):
        load(empty)
    few_rows = write(tmp_path / "some.jsonl", [*rows_of(40), {"prompt": "Hi", "response": " "}])
    assert load(few_rows).skipped == {"empty answer": 1}
    assert caplog.messages == [
        "data: 1 of 41 rows are skipped (empty answer: 1, first some.jsonl:41). Set bad_rows: stop to refuse them."
    ]
    with pytest.raises(DataError, match=r"data: 1 of 41 rows are bad"):
        load(few_rows, bad_rows="stop")
    remaining = load(write(tmp_path / "many.jsonl", [{"prompt": f"Hi {n}"} for n in range(60)]), unlabelled="keep")
    assert sum(remaining.num_rows.values()) == 60
    assert {(entry.answer, entry.references) for entry in all_of(remaining)} == {(None, ())}


def test_summaries_with_several_references_and_missing_columns(tmp_path: Path) -> None:
    rows = [{"article": f"long text {n}", "highlights": [f"short {n}", "brief"]} for n in range(40)]
    path = write(tmp_path / "a.jsonl", rows)
    data = load(path, kind="summarization", document="article", summary="highlights")
    assert {(entry.turns, len(entry.references)) for entry in all_of(data)} == {((), 2)}
    assert all(entry.references == (entry.answer, "brief") for entry in all_of(data))
    assert all(str(entry.document).split()[-1] == str(entry.answer).split()[-1] for entry in all_of(data))
    with pytest.raises(DataError, match=r"unknown column 'document'\. Known: article, highlights\."):
        load(path, kind="summarization")
    # A table of text alone: one reference, whatever it looks like.
    (tmp_path / "a.csv").write_text("document,summary\n" + "".join(f'text {n},"[1, 2]"\n' for n in range(40)))
    csv = load(str(tmp_path / "a.csv"), kind="summarization")
    assert {entry.references for entry in all_of(csv)} == {("[1, 2]",)}


def test_equal_prompts_fall_on_one_side_whatever_the_answer(tmp_path: Path) -> None:
    other = [{"prompt": f" Question  {n}", "response": f"another {n}"} for n in range(150)]
    rows = [*rows_of(150), *other]
    first = load(write(tmp_path / "a.jsonl", rows))
    sides: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for entry in getattr(first, split):
            sides.setdefault(entry.turns[0].content.lower().replace("  ", " "), set()).add(split)
    assert len(sides) == 150
    assert all(len(side) == 1 for side in sides.values())
    assert first.notes == ()
    random.Random(1).shuffle(rows)
    second = load(write(tmp_path / "a.jsonl", rows), seed=3)
    assert first.fingerprint == second.fingerprint
    assert [entry.turns for entry in first.test] == [entry.turns for entry in second.test]
    assert [entry.turns for entry in first.train] != [entry.turns for entry in second.train]
    few = load(write(tmp_path / "a.jsonl", rows), max_rows=60)
    assert sum(few.num_rows.values()) == 60
    assert few.fingerprint != first.fingerprint


def test_a_group_falls_on_one_side(tmp_path: Path) -> None:
    rows = [{**row, "source": f"source {index // 4}"} for index, row in enumerate(rows_of(200))]
    data = load(write(tmp_path / "a.jsonl", rows), group="source")
    sides: dict[int, set[str]] = {}
    for split, examples in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        for entry in examples:
            sides.setdefault(int(entry.turns[0].content.split()[1]) // 4, set()).add(split)
    assert len(sides) == 50
    assert all(len(side) == 1 for side in sides.values())
    without = write(tmp_path / "b.jsonl", [*rows, {"prompt": "q", "response": "a", "source": None}])
    assert load(without, group="source").skipped == {"source is empty": 1}


def test_copies_are_left_out_and_shared_prompts_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = write(tmp_path / "train.jsonl", [*rows_of(30), *rows_of(2)])
    test = write(tmp_path / "test.jsonl", [{"prompt": "QUESTION 3", "response": "other"}, *rows_of(2, start=90)])
    data = load(train, test=test)
    assert sum(data.num_rows.values()) == 33
    assert data.bad_rows == (
        BadRow("train.jsonl:31", "copy: of train.jsonl:1"),
        BadRow("train.jsonl:32", "copy: of train.jsonl:2"),
    )
    side = "train" if any(entry.turns[0].content == "question 3" for entry in data.train) else "validation"
    assert (side == "train") == any("1 of 3 rows of test are also in train" in note for note in data.notes)
    assert data.notes[-1] == "2 rows are copies of another row and are left out (first train.jsonl:31)."
    assert caplog.messages[-1] == f"data: {data.notes[-1]}"


def test_fingerprint_and_ids_follow_the_answers(tmp_path: Path) -> None:
    rows = rows_of(60)
    first = load(write(tmp_path / "a.jsonl", rows))
    changed = load(write(tmp_path / "a.jsonl", [*rows[:5], {**rows[5], "response": "new"}, *rows[6:]]))
    assert first.fingerprint != changed.fingerprint
    old, new = ({entry.id for entry in all_of(data)} for data in (first, changed))
    assert len(old - new) == 1
    with pytest.raises(DataError, match=r"data\.validation: 1\.5 is no share of train"):
        load(write(tmp_path / "a.jsonl", rows), validation=1.5)
