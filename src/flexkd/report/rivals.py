"""What a buyer could take in place of the student, in sentences: each rival beside teacher and student."""

from collections.abc import Iterator

from flexkd.facts.metrics import LOWER_IS_BETTER, metric_label
from flexkd.record import ModelRecord, Number, RunRecord
from flexkd.report.wording import byte_size, factor, metric_text, model_label


def rival_lines(record: RunRecord) -> list[str]:
    """For each rival how it was made, its quality, size and speed beside teacher and student, and who wins in what."""
    teacher, student = record.model("teacher"), record.model("student")
    if teacher is None or student is None:
        return []
    return [
        " ".join(_sentences(rival, teacher, student, record.metric)) for rival in record.models if rival.role == "rival"
    ]


def _sentences(rival: ModelRecord, teacher: ModelRecord, student: ModelRecord, metric: str) -> Iterator[str]:
    yield f"{model_label(rival)}: {rival.preparation}."
    quality, of_teacher, of_student = (metric_text(model.metrics.get(metric)) for model in (rival, teacher, student))
    yield f"It has {metric_label(metric)} {quality}, where the teacher has {of_teacher} and the student {of_student};"
    size = f"{byte_size(rival.bytes_on_disk)} on disk"
    yield f"{size}, {factor(rival.bytes_on_disk / max(student.bytes_on_disk, 1))} the student's;"
    yield _pace(rival, teacher, student)
    yield _judgement(rival, student, metric)


def _pace(rival: ModelRecord, teacher: ModelRecord, student: ModelRecord) -> str:
    """Its speed in batches and one row at a time, as multiples of the teacher's and the student's."""
    parts = [
        f"{text} {factor(rates[0] / rates[1])} the teacher's speed and {factor(rates[0] / rates[2])} the student's"
        for text, speed_of in (("in batches", _batch_speed), ("one at a time", _single_speed))
        if all(rates := [speed_of(model) or 0.0 for model in (rival, teacher, student)])
    ]
    gains = [_gain(speed_of(rival), speed_of(teacher), 1) for speed_of in (_batch_speed, _single_speed)]
    slower = " On this machine it is slower than the teacher itself." if max(gains) <= 0 and min(gains) < 0 else ""
    return f"{', '.join(parts) or 'speed not measured'}.{slower}"


def _batch_speed(model: ModelRecord) -> Number | None:
    return model.examples_per_second


def _single_speed(model: ModelRecord) -> Number | None:
    return None if model.latency is None else 1000 / model.latency.median_ms


def _judgement(rival: ModelRecord, student: ModelRecord, metric: str) -> str:
    """In what the student is ahead of a rival, and in what it is not."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    gains = {
        metric_label(metric): _gain(student.metrics.get(metric), rival.metrics.get(metric), sign),
        "size on disk": _gain(student.bytes_on_disk, rival.bytes_on_disk, -1),
        "speed in batches": _gain(_batch_speed(student), _batch_speed(rival), 1),
        "speed of single rows": _gain(_single_speed(student), _single_speed(rival), 1),
    }
    ahead = [name for name, gain in gains.items() if gain > 0]
    behind = [name for name, gain in gains.items() if gain < 0]
    return f"The student is ahead in {_listed(ahead)}, and behind in {_listed(behind)}."


def _gain(first: Number | None, second: Number | None, sign: int) -> Number:
    """Above 0 where the first is better; 0 where both are equal, or one of them is not known."""
    return 0 if first is None or second is None else sign * (first - second)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names) or "nothing"
