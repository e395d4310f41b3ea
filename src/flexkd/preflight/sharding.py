"""Whether a recipe can train with weights that are divided among processes (FSDP2), as the launcher asks."""

import os
from collections.abc import Iterator
from typing import Final

from flexkd.errors import FlexKDError, ProcessError
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.preflight.inputs import RecipeInputs
from flexkd.processes import num_processes, shards_weights
from flexkd.recipe import Recipe

_FALSE: Final = ("", "false", "0", "none")
_VERSION: Final = "2"
_POLICY: Final = "TRANSFORMER_BASED_WRAP"
_NOT_RUN: Final = {
    "FSDP_OFFLOAD_PARAMS": "weights on the CPU",
    "FSDP_ACTIVATION_CHECKPOINTING": "checkpointing by accelerate (use training.gradient_checkpointing)",
    "FSDP_IGNORED_MODULES": "modules that stay whole",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "classes of blocks by name, as teacher and student may differ",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a mesh of several kinds of parallelism",
}
"""Settings of accelerate under which no recipe was ever trained, and what each asks for."""


def sharding_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """Weights are divided by FSDP2 among several processes, or not at all, and nothing needs them whole meanwhile."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        yield ProcessError(
            "ACCELERATE_USE_DEEPSPEED: DeepSpeed was asked for, and recipes were never run under it. Take FSDP2 "
            "(accelerate launch --use_fsdp --fsdp_version 2), or neither."
        )
    if not shards_weights():
        return
    yield from _launch_errors()
    yield from (ProcessError(f"{text} under FSDP. {advice}") for text, advice in _unfit(inputs.recipe))


def _launch_errors() -> Iterator[ProcessError]:
    """Several processes, version 2, a policy that divides by blocks, and nothing besides."""
    if num_processes() == 1:
        yield ProcessError(
            "ACCELERATE_USE_FSDP: FSDP was asked for and one process started, which has nothing to divide. Start "
            "several (torchrun --nproc_per_node N, accelerate launch --num_processes N), or leave FSDP out."
        )
    if os.environ.get("FSDP_VERSION", "1") != _VERSION:
        yield ProcessError(
            f"FSDP_VERSION: is {os.environ.get('FSDP_VERSION', '1 (not set)')}, and recipes train by FSDP2 alone. Set "
            "it to 2 (accelerate launch --fsdp_version 2)."
        )
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", _POLICY)
    if policy != _POLICY:
        yield ProcessError(
            f"FSDP_AUTO_WRAP_POLICY: is {policy}, and models are divided block by block. Set it to {_POLICY}, or leave "
            "it out."
        )
    for name, what in _NOT_RUN.items():
        if os.environ.get(name, "").lower() not in _FALSE:
            yield ProcessError(f"{name}: asks for {what}, which recipes were never run with. Leave it out.")


def _unfit(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that ask for what needs whole weights in each process, and what can be done."""
    features, training = recipe.objective.features, recipe.training
    facts = None if features is None else FEATURE_LOSS_FACTS.get(features.loss)
    if features is not None and facts is not None and (facts.needs_projector or facts.needs_heads):
        what = "trains projectors, which are not divided" if facts.needs_projector else "reads whole heads"
        yield (
            f"objective.features.loss: '{features.loss}' {what}, which does not work",
            "Take 'correlation', or no FSDP.",
        )
    if recipe.student.lora is not None:
        yield (
            "student.lora: adapters are not trained",
            "Set it to null, or leave FSDP out, as adapters need little memory.",
        )
    if training.compile:
        yield "training.compile: true, and blocks are not compiled", "Set it to false."
    if recipe.generation is not None and recipe.generation.validation_rows is not None:
        yield (
            "generation.validation_rows: answers are not written by a model that is divided, as in an evaluation",
            "Set it to null: nll chooses the checkpoint.",
        )
    for where, section in (("training", training), ("teacher.fine_tune", recipe.teacher.fine_tune)):
        if section is not None and section.max_minutes is not None:
            yield f"{where}.max_minutes: steps are not timed", "Give max_steps or epochs."
    for where, precision in (("training", training.precision), ("teacher", recipe.teacher.precision)):
        if precision == "float16" and (where == "training" or recipe.teacher.fine_tune is not None):
            yield f"{where}.precision: models do not train in float16", "Take bfloat16 or float32."
