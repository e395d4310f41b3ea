"""Trainings that stand still after every optimizer step, so that two of them can run in turn in one process."""

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Semaphore, Thread
from typing import Any, Final, TypeVar

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.pairs import Work

Arguments = TypeVar("Arguments", bound=TrainingArguments)

# Without this a second thread would allocate in an arena of its own, which hands memory back to the kernel sooner: a
# training would not run as fast as in the main thread. Not every C library knows the call.
_ONE_ARENA: Final = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(-8, 1)


def arguments(kind: Callable[..., Arguments], rows: int, **more: Any) -> Arguments:
    """The same settings for every trainer: bf16, nothing saved or logged."""
    settings = {
        "output_dir": tempfile.gettempdir(),
        "max_steps": 1_000_000,
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "bf16": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }
    return kind(**{**settings, **more})


@contextmanager
def stepwise(trainer: Trainer) -> Iterator[Work]:
    """`trainer.train()` as its users call it, one optimizer step at a time.

    A step is all that lies between two ends of a step: loading, forward, backward, clipping, optimizer, bookkeeping.
    """
    halt = _Halt()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(halt)
    thread = Thread(target=halt.run, args=(trainer.train,), daemon=True)
    thread.start()
    try:
        yield halt.step
    finally:
        halt.end()
        thread.join()


class _Halt(TrainerCallback):
    """Lets the loop of a trainer go on for one step at a time."""

    def __init__(self) -> None:
        self._go, self._done = Semaphore(0), Semaphore(0)
        self._ending = False
        self._error: BaseException | None = None

    def run(self, train: Callable[[], object]) -> None:
        """The thread of the training."""
        self._go.acquire()
        try:
            if not self._ending:
                train()
        except BaseException as error:  # raised again where the step was asked for
            self._error = error
        self._done.release()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._done.release()
        self._go.acquire()
        control.should_training_stop = control.should_training_stop or self._ending
        return control

    def step(self) -> None:
        """One step."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """The training stops where it stands."""
        self._ending = True
        self._go.release()
