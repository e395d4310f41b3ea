"""Rows of the table of benchmarks: two sides, their setting, and the bars for their ratio."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from benchmarks import caching, losses, objectives, rivals, sides, small_step, values
from benchmarks.pairs import Work
from benchmarks.setting import Setting

Side = Callable[[Setting], AbstractContextManager[Work]]

WARM_UP: Final = 3
"""Warm-up calls of a step; the second is the first with optimizer state and gradients to free."""

LOOK: Final = math.inf
"""A bar for ratios that are measured without a bar."""


@dataclass(frozen=True)
class Row:
    """A ratio of two sides.

    Attributes:
        title: Names of numerator and denominator.
        sides: Numerator and denominator.
        setting: Models and rows of both sides.
        bars: Upper bounds by measure: `time` (wall and CPU) and `memory`; measures without a bar are not taken.
        warm_up: Calls before the first timed one; the peak of these is the memory.
    """

    title: str
    sides: tuple[Side, Side]
    setting: Setting
    bars: Mapping[str, float]
    warm_up: int = WARM_UP


@dataclass(frozen=True)
class Value:
    """A single figure without another side.

    Attributes:
        title: Name of the figure.
        measure: Measures it a number of times.
        setting: Models and rows.
        bar: Upper bound; None: no bar.
    """

    title: str
    measure: Callable[[Setting, int], list[float]]
    setting: Setting
    bar: float | None = None


_FEW: Final = Setting(0.12)
_ALL: Final = Setting(1.0)
_FINE_TUNING, _KD, _FLEX_KD, _PROJECTOR = (
    partial(sides.our_step, make_objective=make)
    for make in (objectives.fine_tuning, objectives.kd, objectives.flexkd_kd, objectives.projector_kd)
)
_BARE: Final = partial(sides.bare_step, make_objective=objectives.flexkd_kd)
_CHUNKED, _WHOLE, _TRL_CHUNKED = (
    partial(losses.loss_work, make=make) for make in (losses.chunked, losses.whole, rivals.chunked_divergence)
)


def _rows(
    name: str,
    title: str,
    above: Side,
    below: Side,
    bars: Mapping[Setting, Mapping[str, float]],
    warm_up: int = WARM_UP,
) -> dict[str, Row]:
    return {
        f"{name}-{setting.share:g}": Row(title, (above, below), setting, row_bars, warm_up)
        for setting, row_bars in bars.items()
    }


def _same_bars(**bars: float) -> dict[Setting, Mapping[str, float]]:
    return {_FEW: bars, _ALL: bars}


def _longer(setting: Setting) -> Setting:
    """A copy with more batches, so that work done once weighs no more than in a real pass."""
    return replace(setting, num_batches=4)


ROWS: Final = {
    **_rows(
        "scoring", "scoring pass / teacher forward with logits", sides.scoring, sides.teacher_pass,
        {_longer(_FEW): {"time": 0.95}, _longer(_ALL): {"time": 1.25}},
    ),
    **_rows("flexkd", "Flex-KD + KD step / KD step", _FLEX_KD, _KD, _same_bars(time=1.03, memory=1.05)),
    **_rows("projector", "Flex-KD + KD step / projector + KD step", _FLEX_KD, _PROJECTOR, _same_bars(time=1.02)),
    **_rows(
        "gkd", "our KD step / TRL's GKD step without generation", _KD, rivals.gkd_step,
        {_FEW: {"time": 0.65, "memory": LOOK}, _ALL: {"time": 0.8, "memory": 0.5}},
    ),
    **_rows(
        "sft", "our fine-tuning step / TRL's SFT step", _FINE_TUNING, rivals.sft_step,
        _same_bars(time=LOOK, memory=LOOK),
    ),
    **_rows(
        "plain", "Flex-KD + KD step / the same with all hidden states and whole logits", _FLEX_KD, sides.plain_step,
        _same_bars(time=LOOK, memory=LOOK),
    ),
    **_rows(
        "divergence", "our chunked loss / TRL's chunked divergence on the same states", _CHUNKED, _TRL_CHUNKED,
        _same_bars(time=1.0, memory=1.0),
    ),
    **_rows(
        "chunked", "chunked / plain logit loss, 2,048 predictions", _CHUNKED, _WHOLE,
        {Setting(1.0, vocabulary=151_936): {"time": 1.1, "memory": 0.15}},
    ),
    **_rows(
        "cached", "cached step / fine-tuning step of the same student", caching.cached_step, _FINE_TUNING,
        {_FEW: {"time": 1.05}, _ALL: {"time": 1.15}},
    ),
    **_rows(
        "run", "cached run of 3 epochs / one teacher pass + its epochs of the student", caching.cached_run,
        caching.separate_run, {_FEW: {"time": 1.08}, _longer(_ALL): {"time": 1.08}}, warm_up=1,
    ),
    **_rows("trainer", "Flex-KD + KD step / bare loop with the same losses", _FLEX_KD, _BARE, _same_bars(time=1.02)),
    "small": Row(
        "trainer step / bare loop, classification demo", (small_step.small_trainer_step, small_step.small_bare_step),
        _ALL, {"time": 1.15},
    ),
}  # fmt: skip

VALUES: Final = {
    "peak": Value("share of the measured bf16 matmul peak in a Flex-KD + KD step", values.share_of_peak, _ALL),
    **{
        f"cache-{storage}": Value(
            f"bytes a token of the cache, {storage}",
            partial(caching.bytes_a_token, storage=storage),
            _ALL,
            bar,
        )
        for storage, bar in (("float16", 800), ("int8", 480))
    },
}
