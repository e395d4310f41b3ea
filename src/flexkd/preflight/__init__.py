"""Checks of a recipe before anything heavy is loaded: model folders, sizes, labels and rows."""

from flexkd.preflight.checking import Preflight, Resumes, check, preflight
from flexkd.preflight.rows import check_own_metric, read_rows, teacher_labels
from flexkd.preflight.student_shape import check_family

__all__ = [
    "Preflight",
    "Resumes",
    "check",
    "check_family",
    "check_own_metric",
    "preflight",
    "read_rows",
    "teacher_labels",
]
