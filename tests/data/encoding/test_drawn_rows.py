"""Rows of a start are drawn by its seed, and smaller shares are parts of larger ones."""

from typing import Any

from flexkd.data.encoding.drawn_rows import draw_rows
from flexkd.data.encoding.encoded import EncodedRow


def numbered(count: int) -> list[EncodedRow]:
    rows: list[Any] = [{"id": str(index), "input_ids": [index], "labels": 0} for index in range(count)]
    return rows


def ids_of(rows: list[EncodedRow]) -> list[str]:
    return [str(row["id"]) for row in rows]


def test_a_smaller_share_is_part_of_a_larger_one_and_training_keeps_the_order() -> None:
    rows = numbered(40)
    small, large, every = (draw_rows(rows, seed=3, share=share) for share in (0.05, 0.26, None))
    assert [len(drawn.first) for drawn in (small, large, every)] == [2, 11, 40]
    assert ids_of(large.first)[:2] == ids_of(small.first)
    assert ids_of(every.first)[:11] == ids_of(large.first)
    assert every.training == rows
    assert ids_of(large.training) == sorted(ids_of(large.first), key=int)
    assert ids_of(draw_rows(rows, seed=4, share=0.26).first) != ids_of(large.first)
    assert draw_rows(rows, seed=None, share=0.25).first == rows[:10]
