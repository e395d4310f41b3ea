"""The end that a user or a system asks for, after the step that runs and with a checkpoint of it."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flexkd.processes import num_processes

logger = logging.getLogger(__name__)


class Interruption(TrainerCallback):
    """Ends a training with a checkpoint of the step in which Ctrl-C or SIGTERM came; the second one ends it at once.

    SIGTERM is taken only where a program already handles it, as the `flexkd` command does. Several processes get their
    signals in different steps: there the first one ends the run, which goes on from its last checkpoint.
    """

    def __init__(self) -> None:
        self._asked: tuple[int, FrameType | None] | None = None
        self._handlers: dict[int, Any] = {}
        self._process = os.getpid()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Take signals within the context.

        Raises:
            KeyboardInterrupt: Where one came; or what the program's own handler raises.
        """
        is_main = threading.current_thread() is threading.main_thread()
        numbers = [signal.SIGINT, signal.SIGTERM] if is_main and num_processes() == 1 else []
        handlers = {number: signal.getsignal(number) for number in numbers}
        self._handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
        for number in self._handlers:
            signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            if self._asked is not None:
                self._end()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a process that loads batches got the signal of the terminal too
        is_first, self._asked = self._asked is None, (number, frame)
        if not is_first:
            self._end()
        logger.warning(
            "Interrupted: the training ends after this step, with a checkpoint. Interrupt again to end it at once."
        )

    def _end(self) -> NoReturn:
        """End as the program would have ended without this class."""
        assert self._asked is not None, "a signal came"
        self._handlers[self._asked[0]](*self._asked)
        raise KeyboardInterrupt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for the checkpoint."""
        if self._asked is not None:
            control.should_save = control.should_log = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End behind the checkpoint: the Trainer's own end would remove it where it keeps the best one alone."""
        if self._asked is not None:
            self._end()


def unsignalled(start: Callable[[int], None] | None) -> Callable[[int], None]:
    """The `worker_init_fn` of a DataLoader whose workers do not get the signals that a terminal or a system sends.

    Both go to a whole group of processes. A worker that ends of one takes with it the step that runs, and with that the
    checkpoint of an interruption.

    Args:
        start: What a worker calls besides; None: nothing.
    """
    return partial(_start_unsignalled, start)


def _start_unsignalled(start: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        # Not by ignoring SIGTERM, with which the process that started the worker ends it.
        os.setpgid(0, 0)
    if start is not None:
        start(worker)
