"""What came of a run or of a comparison, in a sentence or two."""

from dataclasses import dataclass

from flexkd.compare_record import CompareRecord, PairedDifference
from flexkd.evaluate.significance import changed_seeds_text
from flexkd.facts.metrics import LOWER_IS_BETTER, metric_label
from flexkd.record import Number, RunRecord, proper_interval
from flexkd.report.wording import factor, interval_text, kept, main_metric, metric_text, size_ratio


@dataclass(frozen=True)
class Verdict:
    """One result in a sentence or two: `emphasis` is the part that matters most, between `lead` and `details`."""

    lead: str
    emphasis: str = ""
    details: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.lead, self.emphasis, self.details) if part)


def verdict(record: RunRecord) -> Verdict:
    """Whether the run was worth it: quality kept, size and speed gained, and where the student began."""
    teacher, student = record.model("teacher"), record.model("student")
    if student is None or teacher is None:
        return Verdict("This record holds no student and teacher to compare.")
    name = metric_label(record.metric)
    student_value, teacher_value = main_metric(record, "student"), main_metric(record, "teacher")
    if student_value is None or teacher_value is None:
        reason = f"The {name} of teacher or student is not defined: the notes or the log say why."
        return Verdict(reason, "", f"The student comes {_cost(record)}")
    share = kept(record)
    lead, emphasis = "The student reaches", f"{name} {metric_text(student_value)}"
    numbers = f"against the teacher's {metric_text(teacher_value)}{_difference_text(record)}"
    if share is not None and share.rows_are_few:
        interval = f" (95% interval {share.interval})" if share.ends else ""
        lead = f"{share.rows:,} test rows are too few to say which share of the teacher's {name} the student keeps"
        lead = f"{lead}{interval}: it reaches"
    elif share is not None:
        interval = f"95% interval {share.interval}" if share.ends else "without an interval"
        lead, emphasis = "The student keeps", f"{share.text} of the teacher's {name}"
        numbers = f"({interval}; {metric_text(student_value)} against {metric_text(teacher_value)})"
    before = main_metric(record, "student_before")
    start = "" if before is None else f" Before training it stood at {metric_text(before)}."
    return Verdict(lead, emphasis, f"{numbers} {_cost(record)}{start}")


def _difference_text(record: RunRecord) -> str:
    """The interval of the student's difference to the teacher; empty where a share says it, or there is none."""
    if record.intervals is None or record.intervals.share:
        return ""
    return f" (difference: 95% interval {interval_text(record.intervals.difference, signed=True)})"


def _cost(record: RunRecord) -> str:
    """Size and speed of the student against the teacher's."""
    teacher, student = record.model("teacher"), record.model("student")
    assert teacher is not None
    assert student is not None
    size = f"with {size_ratio(teacher, student)}"
    if not teacher.examples_per_second or not student.examples_per_second:
        return f"{size}."
    return f"{size} and at {factor(student.examples_per_second / teacher.examples_per_second)} the speed."


def compare_verdict(record: CompareRecord) -> Verdict:
    """Which method has the best mean, and whether chance alone may explain its difference to the reference."""
    rows = [row for row in record.paired if row.mean is not None]
    name = metric_label(record.metric)
    if not rows:
        return Verdict(f"The {name} of no method is defined: the notes or the log say why.")
    sign = -1 if record.metric in LOWER_IS_BETTER else 1
    best = max(rows, key=lambda row: sign * (row.mean or 0.0))
    spread = "" if best.std is None else f" \u00b1 {metric_text(best.std)}"
    seeds = f"{len(record.seeds)} seed" + "s" * (len(record.seeds) != 1)
    details = f"has the best mean {name} of {len(rows)} methods over {seeds}: {metric_text(best.mean)}{spread}."
    return Verdict("", best.method, f"{details} {_difference(record, best)}")


def _difference(record: CompareRecord, best: PairedDifference) -> str:
    """The best method's paired difference to the reference, with its confidence interval."""
    if best.method == record.reference:
        return "It is the reference itself."
    if best.difference is None:
        return f"Its difference to {record.reference} is not defined."
    text = f"Its paired difference to {record.reference} is {best.difference:+.3f}"
    ends = proper_interval(best.low, best.high)
    if ends is None:
        test = _tested(record, best)
        return f"{text}, the same for every seed{f'; {test}' if test else ''}."
    return f"{text}, 95% interval {ends[0]:+.3f} to {ends[1]:+.3f}, {_tested(record, best) or _reading(record, ends)}."


def _tested(record: CompareRecord, best: PairedDifference) -> str:
    """What the exact test of a named contrast says of the best method's difference; empty where none was named."""
    contrast = record.contrast(best.method, record.reference)
    if contrast is None or contrast.holm_p_value is None:
        return ""
    test = f"exact p {contrast.holm_p_value:.2g} after Holm's correction"
    if record.named_after_results:
        return f"{test}: exploratory, for the contrasts were named after results were there"
    changed = changed_seeds_text(record)
    reading = "significant" if record.is_significant(contrast) else "chance alone may explain it"
    return f"{test}: {reading}{f', with {changed}' if changed else ''}"


def _reading(record: CompareRecord, ends: tuple[Number, Number]) -> str:
    """What the interval of a difference that was not tested means."""
    if ends[0] <= 0 <= ends[1]:
        return "which contains 0: chance alone may explain it"
    unnamed = ", but no contrast names it: a difference to test, not a tested one" if record.contrasts else ""
    return f"which does not contain 0{unnamed}"
