"""Trainings that pause after every optimizer step, so that single steps can be measured."""

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Semaphore, Thread
from typing import Any, Final, TypeVar

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.pairs import Work

Arguments = TypeVar("Arguments", bound=TrainingArguments)

# Otherwise a second thread allocates in an arena of its own, which returns memory to the kernel sooner, so that
# training is slower than in the main thread. Not every C library has the call.
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
    """Run `trainer.train()` one optimizer step at a time.

    A step is everything between the ends of two steps: loading, forward, backward, clipping, optimizer, bookkeeping.
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
    """Blocks the training loop in its own thread until the next step is requested."""

    def __init__(self) -> None:
        self._go, self._done = Semaphore(0), Semaphore(0)
        self._ending = False
        self._error: BaseException | None = None

    def run(self, train: Callable[[], object]) -> None:
        """Main function of the training thread."""
        self._go.acquire()
        try:
            if not self._ending:
                train()
        except BaseException as error:  # raised again in `step`
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
        """Let the training take one step, and wait for its end."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Stop the training."""
        self._ending = True
        self._go.release()
