"""What can be known before anything heavy is loaded: model folders, sizes, labels and rows."""

from flexkd.preflight.checking import Preflight, Resumes, preflight
from flexkd.preflight.rows import read_rows, teacher_labels

__all__ = ["Preflight", "Resumes", "preflight", "read_rows", "teacher_labels"]
