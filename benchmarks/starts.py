"""Comparison of starts of a language model student: nats a token before and after training.

python benchmarks/starts.py RECIPE [KEY=VALUE ...] --steps 50 --starts "rotated 288x20 tied; coordinates 288x20"

A start is BASIS WIDTHxLAYERS with ffN (feed-forward units), hN (heads), tied (the head stays the embeddings), by-loss
(blocks chosen by the loss that skipping them costs) or spaced (evenly), mixG (second moment plus G times the share N of
its trace) and seedN (of the rows' order). A cut in stages: "rotated 384x30 share0.4 > rotated 192x30 share0.6" trains
the first student for that share of the whole, and cuts the second from it. All learn from the same rows with the
recipe's task and logit terms; the teacher answers each row once and is remembered, so that the seconds are the
students' own. With --cpu-seconds each start takes as many steps as fit, by its own pace in a trial that is thrown away;
CPU seconds count all cores and depend little on what else runs.
"""

import argparse
import copy
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from flexkd.core.objective import Objective
from flexkd.core.terms import LogitTerm, TaskTerm
from flexkd.display.log import set_up_logging
from flexkd.evaluate.likelihood import likelihood_metrics, likelihoods
from flexkd.models.forward.attention import prefer_short_rows_attention
from flexkd.models.forward.hidden import model_inputs
from flexkd.models.slicing.calibration import calibrate
from flexkd.models.slicing.depth import layers_by_loss
from flexkd.models.slicing.importance import spaced_blocks
from flexkd.models.slicing.rotation import mixed_moment, rotate_teacher
from flexkd.models.slicing.shape import shape_of
from flexkd.models.slicing.student import slice_student
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.run import Run
from flexkd.pipeline.start import Start
from flexkd.recipe import load_recipe, override_recipe
from flexkd.scoring.geometry import functional_geometry

CALIBRATION_ROWS = 128
LOSS_ROWS = 16


def nats(job: Job, model: Any, rows: int) -> float:
    """Mean nats a token of the validation answers."""
    batches = job.batches("validation", num_rows=rows, batch_size=32)
    metrics = likelihood_metrics(likelihoods(model, batches, precision=job.precision))
    return float(metrics["nll"] or float("nan"))


def number(words: list[str], name: str, default: float) -> float:
    """The number after a name in one of the words, as 96 in ff96."""
    numbers = [word[len(name) :] for word in words if word.startswith(name) and word[len(name) :][:1].isdigit()]
    return float(numbers[0]) if numbers else default


def rotated_model(job: Job, source: Any, calibration: list[dict[str, Any]], *, tied: bool, mix: float) -> Any:
    """A model in the eigenbasis of the second moment of its residual stream, to which `mix` times G is added."""
    moment = None
    if mix:
        geometry = functional_geometry(source, job.batches("train", num_rows=CALIBRATION_ROWS))
        moment = mixed_moment(source, calibrate(source, calibration).stream_moment, geometry, function_share=mix)
    return rotate_teacher(source, calibration, moment=moment, tied_head=tied).model


def build(job: Job, words: list[str], source: Any, rotated: dict[str, Any]) -> Any:
    """The student that one stage cuts from a model."""
    width, layers = map(int, words[1].split("x"))
    sizes: dict[str, Any] = {"num_layers": layers}
    for name, word in (("intermediate_size", "ff"), ("num_heads", "h")):
        if number(words, word, 0):
            sizes[name] = int(number(words, word, 0))
    batches = list(job.batches("train", num_rows=CALIBRATION_ROWS))
    calibration = [{**model_inputs(source, batch), "labels": batch["labels"]} for batch in batches]
    base = source
    options: dict[str, Any] = {"hidden_size": width}
    if words[0] == "rotated":
        mix, tied = number(words, "mix", 0), "tied" in words
        key = f"{id(source)} {tied} {mix}"
        if key not in rotated:
            rotated[key] = rotated_model(job, source, calibration, tied=tied, mix=mix)
        base, options = rotated[key], {"units": range(width)}
    total = shape_of(source.config).num_layers
    blocks = None
    if "spaced" in words:
        blocks = [block + 1 for block in spaced_blocks(total, layers)]
    elif "by-loss" in words and layers < total:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            blocks = layers_by_loss(
                source, list(job.batches("train", num_rows=LOSS_ROWS)), layers, at_once=(total - layers + 2) // 3
            )
    return slice_student(base, batches=calibration, layers=blocks, **options, **sizes).float()


def steps_in(job: Job, student: Any, seconds: float, folder: Path) -> int:
    """Optimizer steps that fit into some CPU seconds, by the time of steps 3 to 8 of a copy."""
    times = []
    # The first of these is not counted, as the teacher may answer the rows during it.
    for steps in (8, 2, 8):
        start = time.process_time()
        learn(job, copy.deepcopy(student), steps, 0, folder)
        times.append(time.process_time() - start)
    return max(int(seconds / ((times[2] - times[1]) / 6)), 1)


def learn(job: Job, student: Any, steps: int, seed: int, folder: Path) -> Any:
    """The student after that many steps."""
    recipe = override_recipe(job.recipe, [f"training.max_steps={steps}", f"training.seed={seed}"])
    objective = Objective(TaskTerm(weight=0.5), LogitTerm(weight=0.5))
    trained, _ = Run(job, recipe, folder).train(Start(student, ()), objective)
    shutil.rmtree(folder)
    return trained


def run_start(job: Job, arguments: argparse.Namespace, text: str, folder: Path, rotated: dict[str, Any]) -> str:
    """Build and train one start, stage by stage, and give its line of the table."""
    source, before, seconds, cpu_seconds, steps_by_stage = job.teacher, None, 0.0, 0.0, []
    for words in (part.split() for part in text.split(">")):
        student = build(job, words, source, rotated)
        prefer_short_rows_attention([student], job.recipe.data.max_length)
        before = nats(job, student, arguments.rows) if before is None else before
        share = number(words, "share", 1)
        steps = max(int(share * arguments.steps), 1)
        if arguments.cpu_seconds:
            steps = steps_in(job, student, share * arguments.cpu_seconds, folder)
        steps_by_stage.append(steps)
        start, cpu_start = time.perf_counter(), time.process_time()
        source = learn(job, student, steps, int(number(words, "seed", 0)), folder)
        seconds += time.perf_counter() - start
        cpu_seconds += time.process_time() - cpu_start
    after, millions = nats(job, source, arguments.rows), source.num_parameters() / 1e6
    figures = f"{before:.2f} | {after:.3f} | {' + '.join(map(str, steps_by_stage))} | {seconds:.0f} | {cpu_seconds:.0f}"
    return f"| {text.strip()} | {millions:.1f} | {figures} |"


def main() -> None:
    """Print a table with one line for each start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cpu-seconds", type=float)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--starts", required=True)
    arguments = parser.parse_intermixed_args()
    set_up_logging()
    logging.getLogger("flexkd").setLevel(logging.WARNING)
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, "training.max_minutes=null"])
    job = prepare(recipe, students=100)
    millions = job.teacher.num_parameters() / 1e6
    print(f"teacher: {nats(job, job.teacher, arguments.rows):.3f} nats, {millions:.1f} M parameters")
    rotated: dict[str, Any] = {}
    print(
        "| start | parameters, M | nats before | nats after | steps | s | CPU s |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    for index, text in enumerate(filter(str.strip, arguments.starts.split(";"))):
        folder = Path(recipe.output, "starts", f"{int(time.time())}-{index}")
        print(run_start(job, arguments, text, folder, rotated), flush=True)


if __name__ == "__main__":
    main()
