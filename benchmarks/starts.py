"""Starts of a language model student side by side: nats a token before training and after equally many steps.

python benchmarks/starts.py RECIPE [KEY=VALUE ...] --steps 50 --starts "rotated 288x20 tied; coordinates 288x20"

A start is BASIS WIDTHxLAYERS with ffN (feed-forward units), hN (heads), tied (the head stays the embeddings), by-loss
(blocks chosen by the loss that skipping them costs) or spaced (evenly), mixG (second moment plus G times the share N of
its trace). All students learn from the same rows with the recipe's task and logit terms; the teacher answers each row
once and is remembered, so that the seconds a step are the student's own, evaluations among them.
"""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import torch

from flexkd.core.objective import Objective
from flexkd.core.terms import LogitTerm, TaskTerm
from flexkd.evaluate.likelihood import likelihood_metrics, likelihoods
from flexkd.models.depth import layers_by_loss
from flexkd.models.hidden import model_inputs
from flexkd.models.importance import spaced_blocks
from flexkd.models.rotation import rotate_teacher, stream_moment
from flexkd.models.shape import shape_of
from flexkd.models.student import slice_student
from flexkd.recipe import load_recipe
from flexkd.terminal import set_up_logging
from flexkd.train.arguments import prefer_short_rows_attention
from flexkd.train.geometry import functional_geometry
from flexkd.train.job import Job, prepare
from flexkd.train.pipeline import train_student
from flexkd.train.starting import Start

CALIBRATION_ROWS = 128
LOSS_ROWS = 16


def nats(job: Job, model: Any, rows: int) -> float:
    """Mean nats a token of the validation answers."""
    found = likelihoods(model, job.batches("validation", rows=rows, batch_size=32), precision=job.precision)
    return float(likelihood_metrics(found)["nll"] or float("nan"))


def build(job: Job, words: list[str], rotated: dict[str, Any]) -> Any:
    """The student that the words of one start describe."""
    width, layers = map(int, words[1].split("x"))
    sizes: dict[str, Any] = {"num_layers": layers}
    for word in words[2:]:
        if word.startswith("ff"):
            sizes["intermediate_size"] = int(word[2:])
        elif word.startswith("h") and word[1:].isdigit():
            sizes["num_heads"] = int(word[1:])
    calibration = [
        {**model_inputs(job.teacher, batch), "labels": batch["labels"]}
        for batch in job.batches("train", rows=CALIBRATION_ROWS)
    ]
    teacher, units = job.teacher, None
    if words[0] == "rotated":
        mix = next((float(word[3:]) for word in words if word.startswith("mix")), 0.0)
        key = f"{'tied' in words} {mix}"
        if key not in rotated:
            moment = stream_moment(job.teacher, calibration)
            if mix:
                # Of the state behind the last norm; the moment is of the one before its weight.
                weight = job.teacher.get_submodule(f"{job.teacher.base_model_prefix}.norm").weight.detach().double()
                geometry = functional_geometry(job.teacher, job.batches("train", rows=CALIBRATION_ROWS))
                geometry = weight[:, None] * geometry * weight
                moment = moment + mix * moment.trace() / geometry.trace() * geometry
            rotated[key] = rotate_teacher(job.teacher, calibration, moment=moment, tied_head="tied" in words).model
        teacher, units = rotated[key], range(width)
    total = shape_of(job.teacher.config).num_layers
    kept = None
    if "spaced" in words:
        kept = [block + 1 for block in spaced_blocks(total, layers)]
    elif "by-loss" in words and layers < total:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kept = layers_by_loss(
                job.teacher, list(job.batches("train", rows=LOSS_ROWS)), layers, at_once=(total - layers + 2) // 3
            )
    options: dict[str, Any] = {"hidden_size": width} if units is None else {"units": units}
    return slice_student(teacher, batches=calibration, layers=kept, **options, **sizes).float()


def main() -> None:
    """One line a start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--starts", required=True)
    given = parser.parse_intermixed_args()
    set_up_logging()
    logging.getLogger("flexkd").setLevel(logging.WARNING)
    length = ["training.max_minutes=null", f"training.max_steps={given.steps}"]
    recipe = load_recipe(given.recipe, [*given.overrides, *length])
    job = prepare(recipe, students=100)
    print(
        f"teacher: {nats(job, job.teacher, given.rows):.3f} nats, {job.teacher.num_parameters() / 1e6:.1f} M parameters"
    )
    objective = Objective(TaskTerm(weight=0.5), LogitTerm(weight=0.5))
    rotated: dict[str, Any] = {}
    print("| start | parameters, M | nats before | nats after | s a step |\n|---|---|---|---|---|", flush=True)
    for number, text in enumerate(filter(str.strip, given.starts.split(";"))):
        student = build(job, text.split(), rotated)
        prefer_short_rows_attention([student], recipe.data.max_length)
        before, millions = nats(job, student, given.rows), student.num_parameters() / 1e6
        folder = Path(recipe.output, "starts", f"{int(time.time())}-{number}")
        student, log = train_student(job, recipe, Start(student, ()), objective, folder)
        pace = next(entry["train_runtime"] for entry in log if "train_runtime" in entry) / given.steps
        after = nats(job, student, given.rows)
        print(f"| {text.strip()} | {millions:.1f} | {before:.2f} | {after:.3f} | {pace:.2f} |", flush=True)


if __name__ == "__main__":
    main()
