"""What can be known before anything heavy is loaded: model folders, sizes, labels and rows."""

from flexkd.preflight.checking import Preflight, preflight
from flexkd.preflight.rows import read_rows, teacher_labels

__all__ = ["Preflight", "preflight", "read_rows", "teacher_labels"]
