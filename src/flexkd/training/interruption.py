"""The end that a user or a system asks for, after the step that runs and with a checkpoint of it."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flexkd.processes import num_processes

logger = logging.getLogger(__name__)


class Interruption(TrainerCallback):
    """Ends a training with a checkpoint of the step in which Ctrl-C or SIGTERM came; the second one ends it at once.

    SIGTERM is taken only where a program already handles it, as the `flexkd` command does. Several processes get their
    signals in different steps: there the first one ends the run, which goes on from its last checkpoint.
    """

    def __init__(self) -> None:
        self._is_asked = False

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Take signals within the context.

        Raises:
            KeyboardInterrupt: At its end, where one came.
        """
        is_main = threading.current_thread() is threading.main_thread()
        numbers = [signal.SIGINT, signal.SIGTERM] if is_main and num_processes() == 1 else []
        handlers = {number: signal.getsignal(number) for number in numbers}
        handled = {number: handler for number, handler in handlers.items() if callable(handler)}
        for number in handled:
            signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in handled.items():
                signal.signal(number, handler)
        if self._is_asked:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._is_asked:
            raise KeyboardInterrupt
        self._is_asked = True
        logger.warning("interrupted: ends after this step, with a checkpoint (once more: at once)")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for the checkpoint and the end."""
        if self._is_asked:
            control.should_save = control.should_log = control.should_training_stop = True
        return control
