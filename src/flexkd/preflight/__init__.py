"""What can be known before anything heavy is loaded: model folders, sizes, labels and rows."""

from flexkd.preflight.checking import Preflight, preflight

__all__ = ["Preflight", "preflight"]
