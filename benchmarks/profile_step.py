"""Profile of one training step: python -m benchmarks.profile_step [--share F] [--tiny]."""

import argparse
from collections.abc import Callable
from typing import Any, Final

from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PrinterCallback, TrainerCallback

from benchmarks.objectives import flexkd_kd
from benchmarks.setting import Setting, student_of, teacher_of
from benchmarks.sides import our_trainer
from flexkd import DistillationTrainer

_PROFILED: Final = 3
"""Number of the profiled step; those before it are warm-up."""

_INSIDE: Final = {
    "step": ("losses and gradients", "backward", "optimizer"),
    "losses and gradients": ("teacher forward", "head and logit losses", "feature loss"),
}
"""Parts of parts; what remains of the losses is the student's forward."""


def main() -> None:
    """Print the parts of a Flex-KD + KD step and its slowest operators.

    The heads of both models run where the logit losses are computed, and are counted there.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="share of supervised positions (1)")
    parser.add_argument("--rows", type=int, default=12, help="operators to list (12)")
    parser.add_argument("--tiny", action="store_true", help="tiny models: to see that it runs")
    arguments = parser.parse_args()
    setting = Setting(arguments.share).tiny() if arguments.tiny else Setting(arguments.share)
    print(f"{setting.describe()}\n")
    watch = profiled(setting)
    events = {event.key: event for event in watch.key_averages()}
    total = events["step"].cpu_time_total
    print("| part | ms | share |\n|---|---:|---:|")
    for name, microseconds in _parts(events).items():
        print(f"| {name} | {microseconds / 1e3:.1f} | {microseconds / total:.1%} |")
    print()
    print(watch.key_averages().table(sort_by="self_cpu_time_total", row_limit=arguments.rows, max_name_column_width=40))


def profiled(setting: Setting) -> profile:
    """Profile one optimizer step of flexkd's trainer, with its parts named."""
    trainer = our_trainer(setting, student_of(setting), flexkd_kd(setting), teacher_of(setting), max_steps=_PROFILED)
    trainer.remove_callback(PrinterCallback)
    watch = _Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    return watch.profile


class _Watch(TrainerCallback):
    """Profiles the last step, from its beginning to its end."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self._step = record_function("step")
        for owner, method, name in (
            (trainer, "compute_loss", "losses and gradients"),
            (trainer.teacher, "signal", "teacher forward"),
            (trainer.objective, "predictions", "head and logit losses"),
            (trainer.objective, "_feature_value", "feature loss"),
            (trainer.accelerator, "backward", "backward"),
        ):
            setattr(owner, method, _named(getattr(owner, method), name))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == _PROFILED - 1:
            self.profile.start()
            self._step.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == _PROFILED - 1:
            self._optimizer = record_function("optimizer")
            self._optimizer.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == _PROFILED - 1:
            self._optimizer.__exit__(None, None, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == _PROFILED:
            self._step.__exit__(None, None, None)
            self.profile.stop()


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return run


def _parts(events: dict[str, Any]) -> dict[str, float]:
    """Microseconds of each part, without the parts inside of it."""
    times = {name: events[name].cpu_time_total for inside in _INSIDE.values() for name in inside}
    losses = sum(times[name] for name in _INSIDE["losses and gradients"])
    times["student forward"] = times.pop("losses and gradients") - losses
    times["the rest"] = events["step"].cpu_time_total - sum(times.values())
    return dict(sorted(times.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    main()
