"""What to do after several sizes of one recipe: smaller or larger ones, more seeds, or another training."""

import math
from collections.abc import Sequence
from typing import Final

from flexkd.compare_record import CompareCell
from flexkd.evaluate.sizes.curve import capital, sign_of, size_words
from flexkd.facts.metrics import LOWER_IS_BETTER
from flexkd.facts.names import VALIDATION_PREFIX
from flexkd.sizes_record import SizeResult, SizesRecord, number_text

_FEWEST_EVALUATIONS: Final = 3
"""With fewer, the place of the best checkpoint says little."""


def next_step(record: SizesRecord) -> str:
    """What to do after these sizes, with the call that does it; empty where that is not known.

    Less is better: where the smallest size is as good as the largest as far as can be told, smaller ones come next;
    larger ones do only where the largest is better than the one before it, and nothing smaller keeps enough.
    """
    *smaller, largest = record.sizes
    if not smaller or any(result.model.metrics.get(record.metric) is None for result in record.sizes):
        return ""
    baseline = _not_surpassed(record)
    if baseline is not None:
        return (
            f"Next: another training. No size is better than '{baseline}', which needs no model, so that they cannot "
            "be told apart yet: train longer (training.max_steps), or with another training.learning_rate."
        )
    if smaller[0].behind_low is None:
        if record.interval_over:
            return ""  # a record of an earlier version
        return f"Next: more seeds, as one says nothing of what chance alone changes: {_seeds_command(record)}."
    enough = next((result for result in smaller if _is_enough(record, result)), largest)
    text = {smaller[0].name: _smaller, largest.name: _larger}.get(enough.name, _flat)(record, enough)
    return f"{text}{_training_note(record, enough)}"


def _is_sure(record: SizesRecord, result: SizeResult) -> bool:
    """Whether a size keeps enough of the teacher beyond doubt."""
    return result.share_low is not None and result.share_low >= record.keep


def _is_enough(record: SizesRecord, result: SizeResult) -> bool:
    """Whether a size keeps enough beyond doubt, or the largest is not better beyond what chance may explain."""
    return _is_sure(record, result) or (result.behind_low is not None and result.behind_low <= 0)


def _not_surpassed(record: SizesRecord) -> str | None:
    """A baseline that is as good as the best size."""
    sign = sign_of(record)
    best = max(sign * value for result in record.sizes if (value := result.model.metrics[record.metric]) is not None)
    qualities = {model.name: model.metrics.get(record.metric) for model in record.baselines}
    return next((name for name, value in qualities.items() if value is not None and sign * value >= best), None)


def _smaller(record: SizesRecord, first: SizeResult) -> str:
    """Smaller sizes, where the smallest is enough; or first more seeds, where its figures leave that open."""
    words, teacher = size_words(record, first), record.teacher.metrics.get(record.metric)
    tolerated = math.inf if teacher is None else (1 - record.keep) * abs(teacher)
    if not _is_sure(record, first) and first.behind_high is not None and first.behind_high > tolerated:
        return (
            f"Next: more seeds or more test rows. Whether {words}, the smallest, is as good as the largest is "
            f"open{_gap(first)}: {_seeds_command(record)}."
        )
    values = _smaller_values(record)
    if not values:
        return f"Next: another key, as nothing smaller is left of student.{record.key}. {_reason(record, first)}."
    return f"Next: smaller ones. {_reason(record, first)}: {_command(record, values)}."


def _larger(record: SizesRecord, largest: SizeResult) -> str:
    """Larger sizes, where there are any below the teacher's."""
    before, values = record.sizes[-2], _larger_values(record)
    rise = f"{capital(size_words(record, largest))} is better than {size_words(record, before)}{_gap(before)}"
    if not values:
        return f"Next: another training, as nothing larger is left of student.{record.key}. {rise}."
    return f"Next: larger ones. {rise}: {_command(record, values)}."


def _flat(record: SizesRecord, enough: SizeResult) -> str:
    """Nothing larger, where a size between the smallest and the largest is enough."""
    shares = [result.share for result in record.sizes]
    misses = all(share is not None and share < record.keep for share in shares)
    more = " More parameters alone do not keep more: another training may, or another objective." if misses else ""
    return f"Next: nothing larger. {_reason(record, enough)}.{more}"


def _reason(record: SizesRecord, result: SizeResult) -> str:
    """Why a size is enough, in a sentence without its end."""
    words = capital(size_words(record, result))
    if _is_sure(record, result):
        return f"{words} keeps enough beyond doubt"
    return f"{words} is as good as the largest as far as can be told{_gap(result)}"


def _gap(result: SizeResult) -> str:
    """What the largest size is better by, in brackets."""
    return f" (the largest is better by {result.behind_low:+.4f} to {result.behind_high:+.4f}, 95% interval)"


def _smaller_values(record: SizesRecord) -> list[float]:
    """A quarter and a half of the smallest size, as far as the key has such values."""
    first = record.sizes[0].value
    if record.key == "size":
        return [float(f"{share * first:.2g}") for share in (0.25, 0.5)]
    step = _step(record)
    values = {int(share * first) // step * step for share in (0.25, 0.5)}
    return sorted(float(value) for value in values if value > 0)


def _larger_values(record: SizesRecord) -> list[float]:
    """Two sizes between the largest and the whole teacher, as far as the key has such values."""
    last = record.sizes[-1].value
    if record.key == "size":
        shares = [float(f"{last + share * (1 - last):.2g}") for share in (1 / 3, 2 / 3)]
        return [share for share in shares if last < share < 1]
    step, whole = _step(record), int(getattr(record.teacher, record.key))
    values = {int(last + share * (whole - last)) // step * step for share in (0.5, 1)}
    return sorted(float(value) for value in values if value > last)


def _step(record: SizesRecord) -> int:
    """What all widths that were tried are multiples of, as others may not go with the heads; 1 for blocks."""
    if record.key == "num_layers":
        return 1
    return math.gcd(record.teacher.hidden_size, *(int(result.value) for result in record.sizes))


def _command(record: SizesRecord, values: Sequence[float]) -> str:
    """The call that adds these sizes; students that are finished are not trained again."""
    numbers = sorted([*values, *(result.value for result in record.sizes)])
    return f"flexkd sizes RECIPE --sizes {','.join(map(number_text, numbers))}"


def _seeds_command(record: SizesRecord) -> str:
    """The call that adds two seeds."""
    more = [seed for seed in range(len(record.seeds) + 2) if seed not in record.seeds][:2]
    return f"flexkd sizes RECIPE --seeds {','.join(map(str, [*record.seeds, *more]))}"


def _training_note(record: SizesRecord, result: SizeResult) -> str:
    """Where the best checkpoints of a size came early, or last of a size that keeps too little; else empty."""
    curves = [_validation_curve(cell) for cell in record.cells if cell.method == result.name]
    if any(len(curve) < _FEWEST_EVALUATIONS for curve in curves):
        return ""
    best_steps = [max(curve, key=lambda step: curve[step]) for curve in curves]
    best, last = max(best_steps), max(map(max, curves))
    if best <= last / 2:
        return (
            f" Its best checkpoint came by step {best:,} of {last:,}: a shorter training may do as well "
            f"(training.max_steps: {best})."
        )
    keeps = result.share is not None and result.share >= record.keep
    if not keeps and min(best_steps) == last:
        return f" Its best checkpoint is that of the last step, {last:,}: a longer training may add to it."
    return ""


def _validation_curve(cell: CompareCell) -> dict[int, float]:
    """The metric that chose the checkpoint, more of which is better, by the step of each evaluation."""
    names = [name.removeprefix(VALIDATION_PREFIX) for name in cell.metrics if name.startswith(VALIDATION_PREFIX)]
    if not names:
        return {}
    sign, key = -1 if names[0] in LOWER_IS_BETTER else 1, f"eval_{names[0]}"
    return {int(entry["step"]): sign * float(entry[key]) for entry in cell.evaluations if key in entry}
