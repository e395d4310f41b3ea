"""A plan against measured steps: memory and time of a student's training in a fresh process.

python -m benchmarks.plan RECIPE [KEY=VALUE ...]

Both models are made anew from their configs, with random weights, and read rows as long as the longest of the recipe,
so that nothing has to be fine-tuned first; the teacher runs in every step. Memory is the highest resident memory less
what was resident before the models were made; on CUDA, the most that was allocated.
"""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel, TrainerCallback

from flexkd.costs.memory import PlannedStep
from flexkd.costs.planning import draft, memory_of
from flexkd.costs.rows import Load, RowLength
from flexkd.costs.skeletons import Skeletons
from flexkd.costs.steps import planned_objective
from flexkd.costs.work import Worker, settings_of
from flexkd.data.encoding.collation import Collator
from flexkd.evaluate.cost import resident_bytes
from flexkd.recipe import Recipe, load_recipe
from flexkd.teacher.live import LiveTeacher
from flexkd.training.arguments import training_arguments
from flexkd.training.trainer import DistillationTrainer

STEPS: Final = 4
"""The first of them warms up."""


class Ends(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


def real(skeleton: PreTrainedModel) -> PreTrainedModel:
    """A model of the same config with weights."""
    make: Any = type(skeleton)._from_config
    model: PreTrainedModel = make(skeleton.config, dtype=skeleton.dtype)
    model.set_attn_implementation(skeleton.config._attn_implementation)
    return model.eval()


def rows_of(step: PlannedStep) -> list[dict[str, Any]]:
    """The rows of all steps, each as long as the longest of the step's batch."""
    batch, head = step.batch, step.student.get_output_embeddings()
    answer = -(-batch.predictions // batch.num_rows)
    labels: Any = 0
    if head is not None:
        labels = [5] * answer if batch.target else [-100] * (batch.source - answer) + [5] * answer
    row = {"input_ids": [5] * batch.source, "attention_mask": [1] * batch.source, "labels": labels}
    return [{"id": str(number), **row} for number in range(STEPS * batch.num_rows)]


def measure(recipe: Recipe) -> dict[str, float]:
    """Bytes and seconds of a step, measured here."""
    worker, step = drafted(recipe)
    before, _ = resident_bytes()
    models = Skeletons(nullcontext(), real(worker.models.teacher), real(worker.models.student))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings_of(recipe.training), max_steps=STEPS, precision=worker.learnt_in)
        settings = replace(settings, batch_size=step.batch.num_rows, report_to=())
        arguments = training_arguments(Path(folder), settings, num_rows=STEPS * step.batch.num_rows)
        arguments.eval_strategy = arguments.save_strategy = arguments.logging_strategy = "no"
        arguments.load_best_model_at_end = False
        arguments.disable_tqdm = True
        ends = Ends()
        trainer = DistillationTrainer(
            model=models.student,
            teacher=LiveTeacher(models.teacher.to(arguments.device), precision=step.teacher_autocast),
            objective=planned_objective(recipe, models),
            args=arguments,
            train_dataset=rows_of(step),
            data_collator=Collator(0, seq2seq=bool(step.batch.target)),
            callbacks=[ends],
        )
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_bytes()[1] - before
    return {"bytes": peak, "seconds": (ends.times[-1] - ends.times[0]) / (STEPS - 1)}


def drafted(recipe: Recipe) -> tuple[Worker, PlannedStep]:
    """The plan's side, the teacher running and each step one batch."""
    worker = replace(draft(recipe)[0], teacher_runs="always")
    return worker, replace(memory_of(worker).step, accumulates=False)


def main() -> None:
    """Print both sides and their ratio."""
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(load_recipe(Path(sys.argv[2]), sys.argv[3:]))))
        return
    recipe = load_recipe(Path(sys.argv[1]), sys.argv[2:])
    worker, step = drafted(recipe)
    planned = replace(memory_of(worker), step=step, besides={}).training()
    for name, size in planned.parts.items():
        print(f"{name:>20} {size / 1e6:10.1f} MB")
    command = [sys.executable, "-m", "benchmarks.plan", "--measure", *sys.argv[1:]]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    batch = step.batch
    row = RowLength(batch.source, batch.target, -(-batch.predictions // batch.num_rows))
    seconds = worker.training_of(Load.of([row] * batch.num_rows)).seconds
    print(f"memory: planned {planned.peak / 1e6:.1f} MB, measured {found['bytes'] / 1e6:.1f} MB, "
          f"ratio {planned.peak / found['bytes']:.3f}")  # fmt: skip
    print(f"a step: planned {seconds:.3f} s, measured {found['seconds']:.3f} s, ratio {seconds / found['seconds']:.3f}")


if __name__ == "__main__":
    main()
