"""Training rows that a student's start reads and that the student learns from, drawn by a seed."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from flexkd.data.encoding.encoded import EncodedRow


@dataclass(frozen=True)
class DrawnRows:
    """Training rows of one student.

    Attributes:
        first: In the order in which calibration and scores take as many as they read.
        training: Those that the student learns from, in the order of all training rows.
    """

    first: list[EncodedRow]
    training: list[EncodedRow]


def draw_rows(rows: Sequence[EncodedRow], *, seed: int | None, share: float | None) -> DrawnRows:
    """The rows of a student; of two shares with one seed, the smaller is part of the larger.

    Args:
        rows: All training rows, whose order is random already.
        seed: Draws the rows; None: they are taken in their order.
        share: Share of the rows that the student may see at all; None: all.
    """
    order = list(range(len(rows)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    order = order[: num_drawn(len(rows), share)]
    return DrawnRows([rows[index] for index in order], [rows[index] for index in sorted(order)])


def num_drawn(num_rows: int, share: float | None) -> int:
    """How many of so many training rows a student may see."""
    return num_rows if share is None else math.ceil(share * num_rows)
