"""The plan of a recipe: model sizes, memory, operations, time, and settings that would save memory."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from transformers import PreTrainedModel

from flexkd.costs.answers import Answers
from flexkd.costs.devices import HERE, RESERVE, check_device, device_named
from flexkd.costs.flops import attention_sizes
from flexkd.costs.result import ModelSize, Plan, SizePlan
from flexkd.costs.rows import read_lengths
from flexkd.costs.skeletons import learner, skeletons
from flexkd.costs.stages import HostWork, Memory
from flexkd.costs.steps import planned_objective, student_step
from flexkd.costs.work import Worker
from flexkd.errors import RecipeError
from flexkd.facts.families.table import FAMILIES
from flexkd.facts.names import AUTO, NEVER
from flexkd.models.forward.attention import prefer_short_rows_attention
from flexkd.models.loading.pretrained import load_config
from flexkd.models.slicing.shape import shape_of
from flexkd.pipeline.caching import AUTOMATIC_BYTES
from flexkd.preflight import preflight
from flexkd.recipe import Recipe
from flexkd.recipe.sizes import sized_recipes, sizes_of

PROCESS_BYTES: Final = 850_000_000
"""Resident memory of a process on a CPU with its libraries, tokenizers and some thousand rows, before any model."""

_WHOLE: Final = "hold whole models (DDP)"
_DIVIDED: Final = "hold parts of a model that trains (FSDP2), whole models elsewhere,"


def plan(recipe: Recipe, device: str = HERE, *, processes: int = 1, is_divided: bool = False) -> Plan:
    """What a run of a recipe will cost on a device, and whether it fits.

    Nothing is trained and no weights are loaded: the models' own code runs on tensors without storage.

    Args:
        device: A name in `costs.devices.DEVICES`; here: this machine, timed for a second.
        processes: Processes that divide all rows, each with such a device of its own; those of a CPU share it.
        is_divided: Whether they divide the weights of a model that trains, too (FSDP2); the teacher is whole in each.

    Raises:
        FlexKDError: Whatever is wrong with recipe, rows or models; a device that is not known; rows of a step that do
            not divide.
    """
    if processes < 1:
        raise RecipeError(f"processes: must be 1 or more, was {processes}.")
    worker, answers = draft(recipe, device, processes=processes)
    models = worker.models
    sizes = tuple(
        _size(role, model) for role, model in (("teacher", models.whole_teacher), ("student", models.student))
    )
    sizes += tuple(_size(f"rival {name}", model) for name, model in models.rivals.items())
    units, work = worker.units(), worker.run()
    memory = replace(memory_of(worker), is_divided=is_divided and processes > 1)
    return Plan(
        name=recipe.name,
        device=worker.device,
        models=sizes,
        memory=memory.stages(),
        knobs=tuple(memory.knobs()),
        cache=answers.forms(),
        units=units,
        work=work,
        steps=worker.steps(),
        assumptions=tuple(_all_assumptions(worker, memory, is_limited=any(stage.is_limited for stage in work))),
        sizes=tuple(_size_plans(worker)),
        seeds=0 if recipe.sizes is None else len(sizes_of(recipe).seeds),
        processes=processes,
        network=memory.network,
    )


def _size_plans(worker: Worker) -> Iterator[SizePlan]:
    """The students of the recipe's sizes, ascending."""
    recipe, lengths = worker.recipe, worker.lengths
    for size, variant in sized_recipes(recipe).items() if recipe.sizes is not None else ():
        models = skeletons(variant, labels=lengths.labels, vocabulary=lengths.vocabulary, num_tokens=lengths.num_tokens)
        student = replace(worker, recipe=variant, models=models)
        peak = memory_of(student).training().peak
        parameters = models.student.num_parameters()
        yield SizePlan(size, _layers(models.student), parameters, peak, student.student_seconds())


def draft(recipe: Recipe, device: str = HERE, *, processes: int = 1) -> tuple[Worker, Answers]:
    """The inputs of a plan: models without weights, row lengths, device, when the teacher runs, and its answers.

    Raises:
        FlexKDError: As `plan`.
    """
    check_device(device)
    preflight_result = preflight(recipe, resumes="nothing")
    preflight_result.raise_errors()
    sources = {"teacher": recipe.teacher.model, "student": recipe.student.model}
    configs = {name: load_config(source, where=f"{name}.model") for name, source in sources.items() if source}
    lengths = read_lengths(recipe, preflight_result.data, configs)
    lengths = replace(lengths, notes=(*preflight_result.notes, *lengths.notes))
    models = skeletons(recipe, labels=lengths.labels, vocabulary=lengths.vocabulary, num_tokens=lengths.num_tokens)
    # In float32 the teacher is calibrated, and scored where it teaches in float16.
    precisions = tuple(dict.fromkeys((recipe.training.precision, recipe.teacher.precision, "float32")))
    target = device_named(device, precisions)
    if target.is_cpu:
        prefer_short_rows_attention([models.teacher, models.student], recipe.data.max_length)
    objective = planned_objective(recipe, models)
    worker = Worker(recipe, models, lengths, target, processes=processes)
    answers = Answers.of(objective, models, lengths)
    if not objective.needs_teacher:
        return replace(worker, teacher_runs="never"), answers
    return replace(worker, teacher_runs="once" if _is_cached(worker, answers) else "always"), answers


def _is_cached(worker: Worker, answers: Answers) -> bool:
    """Whether the run would cache the teacher's answers, given room on the disk and no cache yet."""
    section = worker.recipe.teacher
    if section.cache != AUTO:
        return section.cache != NEVER
    passes = worker.passes()
    return passes is not None and passes > 1 and answers.bytes(section.cache_storage) <= AUTOMATIC_BYTES


def memory_of(worker: Worker) -> Memory:
    """The memory of a run, from its stages."""
    recipe, models, is_cpu = worker.recipe, worker.models, worker.device.is_cpu
    besides = {"libraries and rows": PROCESS_BYTES} if is_cpu else {}
    if models.whole is not None:
        # All other weights are those of the whole teacher.
        besides["embeddings of the kept tokens"] = _embedding_bytes(models.teacher)
    step = student_step(
        recipe,
        replace(models, student=learner(models, recipe)),
        worker.lengths,
        precision=worker.learnt_in,
        teacher_precision=worker.taught_in,
        runs_teacher=worker.teacher_runs == "always",
        processes=worker.processes,
    )
    teacher, lengths = models.whole_teacher, worker.lengths
    host = HostWork.of(recipe, teacher, lengths, is_rotated=models.is_rotated) if is_cpu else None
    return Memory(
        recipe,
        step,
        teacher,
        lengths,
        besides,
        teacher_goes=not is_cpu,
        rivals=models.rivals,
        host=host,
        processes=worker.processes,
    )


def _embedding_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that have a row for each token, one that is both embeddings and head once."""
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(module.weight): module.weight for module in modules if module is not None}
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def _size(role: str, model: PreTrainedModel) -> ModelSize:
    config: Any = model.config
    shape = f"{config.model_type}, {_layers(model)}"
    if config.model_type in FAMILIES:
        sizes = shape_of(config)
        shape += f", {sizes.num_heads} heads, {sizes.intermediate_size} feed-forward units"
    return ModelSize(role, shape, model.num_parameters())


def _layers(model: PreTrainedModel) -> str:
    """Number of layers and width of a model."""
    config: Any = model.config
    width: int = config.get_text_config(decoder=True).hidden_size
    _, layers, encoder_layers = attention_sizes(config)
    depth = f"{encoder_layers} + {layers}" if encoder_layers else f"{layers}"
    return f"{depth} layers x {width}"


def _assumptions(worker: Worker, *, is_limited: bool) -> Iterator[str]:
    """The assumptions behind the figures."""
    recipe, device = worker.recipe, worker.device
    yield from worker.lengths.notes
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in device.flops.items())
    yield f"device: {rates} ({device.source}), of which a step reaches {device.utilisation:.0%}"
    yield "time: without padding, loading, and the latency of generating answers token by token"
    yield "time: batches too small to fill a GPU take longer"
    yield "operations: matrix multiplications alone, 2 for each multiply-add; a backward pass costs two forward passes"
    if worker.processes > 1:
        yield from _assumptions_on_processes(worker)
    whose = "one" if worker.processes == 1 else "each"
    attention = _attention(worker)
    yield f"memory: {whose} process, batches of the longest rows, AdamW in float32, {attention} attention"
    if not device.is_cpu:
        yield "memory: without scoring units, cutting the student and generating answers"
    if recipe.teacher.fine_tune is not None:
        yield "memory: a teacher that an earlier run has stored is not fine-tuned again"
    yield f"memory: {RESERVE:.0%} of the device are left to the driver, other processes and fragmentation"
    if recipe.teacher.precision == "auto" or recipe.training.precision == "auto":
        yield f"precision: auto is {worker.learnt_in} for the student, {worker.taught_in} for the teacher"
    if worker.teacher_runs == "once":
        yield "teacher: reads each row once; its answers then come from a cache on disk (teacher.cache)"
    if recipe.rivals is not None:
        yield "rivals: their rows as long as the student's; int8 as slow as float32"
        if recipe.rivals.int8_teacher and not device.is_cpu:
            yield "rivals: int8_teacher is measured on CPUs alone, and a run on this device refuses it"
    if recipe.objective.features is not None and recipe.objective.features.coverage is not None:
        yield "features: all units of the student are taught; objective.features.coverage may choose fewer"
    if recipe.training.early_stopping is not None:
        yield "time: all steps of the training, the most that training.early_stopping allows"
    if is_limited:
        yield "time: max_minutes ends a stage before its steps are done"


def _all_assumptions(worker: Worker, memory: Memory, *, is_limited: bool) -> Iterator[str]:
    """Those of a plan whose processes hold whole models, and what is otherwise where they divide them."""
    for line in _assumptions(worker, is_limited=is_limited):
        yield line.replace(_WHOLE, _DIVIDED) if memory.is_divided else line
    if memory.is_divided:
        yield "memory: under FSDP2 worked out, not measured; the most of each part, as if all came at once"


def _assumptions_on_processes(worker: Worker) -> Iterator[str]:
    shares = "share the cores of one CPU" if worker.device.is_cpu else "have a device each"
    yield f"processes: {worker.processes}, which {shares}, {_WHOLE} and divide the rows"
    if not worker.device.is_cpu:
        yield "time: sending gradients hides behind the backward pass; on a slow network it does not"


def _attention(worker: Worker) -> str:
    models = (worker.models.teacher, worker.models.student)
    implementations = dict.fromkeys(str(model.config._attn_implementation) for model in models)
    return " and ".join(implementations)
