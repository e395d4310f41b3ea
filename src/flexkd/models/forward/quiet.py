"""Loading with transformers without progress bars and tables, and its errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Within the context transformers prints no progress bars and no table of new weights, which loaders return."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line of an error's message without its last stop, or its kind where it has none."""
    return next((line for line in str(error).splitlines() if line), type(error).__name__).rstrip(".: ")
