"""One recipe at several sizes under one job: one teacher, the same rows and steps, and what each size costs."""

import datetime
import logging
import statistics
from collections.abc import Mapping, Sequence
from functools import partial

from flexkd.compare_record import CompareCell
from flexkd.display.progress import Countdown
from flexkd.evaluate.cost import Cost
from flexkd.evaluate.row_contrasts import RowParts, read_row_parts
from flexkd.evaluate.sizes.curve import with_curve
from flexkd.facts.families.table import family_can_rotate
from flexkd.guards.work import in_run_folder
from flexkd.models.loading.pretrained import load_config
from flexkd.models.slicing.shape import shape_of
from flexkd.pipeline.cells import is_finished, run_cell, shared_steps, step_notes, tell_cell
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.recording import Timed, describe_baselines, describe_model, environment, model_costs
from flexkd.pipeline.sharing import share_answers
from flexkd.pipeline.start import rotation_of, student_sizes
from flexkd.preflight.comparison import cell_recipe, with_starts
from flexkd.preflight.run_folder import continued
from flexkd.preflight.sizes import check_distinct, size_cells, size_order, size_places
from flexkd.preflight.starts import alike_starts
from flexkd.processes import decided
from flexkd.recipe import Recipe
from flexkd.recipe.sizes import size_folder, sized_recipes, sizes_of, with_sizes
from flexkd.record import ModelRecord
from flexkd.run_files import PREDICTIONS_FILE, SIZES_FILE, SIZES_FOLDER, STUDENT_FOLDER
from flexkd.sizes_record import Knee, SizeResult, SizesRecord

logger = logging.getLogger(__name__)


@in_run_folder
def sizes(recipe: Recipe, *, values: Sequence[float] = (), seeds: Sequence[int] = ()) -> SizesRecord:
    """Distil a recipe at several sizes, with the same teacher, rows and steps, and measure quality and cost of each.

    Every finished cell is kept, of the first seed with its student, so that an interrupted call continues with the
    missing ones, and sizes and seeds can be added. Where a time limit decides on the steps, all students take those
    that the first one plans, which is the largest.

    Arguments and errors are those of the public `flexkd.sizes`, which draws the page of the record as well.
    """
    recipe, _ = continued(with_sizes(recipe, values, seeds))
    variants, section = with_starts(recipe, sized_recipes(recipe)), sizes_of(recipe)
    students = len(variants) * len(section.seeds)
    job = prepare(recipe, students=students, resumes="sizes", variants=size_places(variants))
    recipe = job.recipe
    notes = _start_notes(job, variants)
    finished = shared_steps(recipe, size_cells(recipe, variants))
    teacher, baselines = job.predict_teacher(), job.task.baselines()
    job.task.write(recipe.folder / SIZES_FOLDER / PREDICTIONS_FILE, {"teacher": teacher})
    cells = _cells(job, teacher, variants)
    folders = [size_folder(recipe, size, section.seeds[0]) / STUDENT_FOLDER for size in variants]
    costs = model_costs(job, [Timed.teacher_of(job)], saved=folders)
    record = SizesRecord(
        metric=recipe.task.metric,
        problem=recipe.task.problem,
        key=section.key,
        keep=section.keep,
        seeds=list(section.seeds),
        sizes=[_result(recipe, size, cells, cost) for size, cost in zip(variants, costs[1:], strict=True)],
        cells=cells,
        teacher=describe_model(job.reported, "teacher", job.reported.teacher, teacher, teacher, costs[0]),
        baselines=describe_baselines(job, baselines, teacher),
        knee=Knee(None),
        name=recipe.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        recipe=recipe.model_dump(mode="json"),
        environment=environment(job.precision),
        notes=[*job.notes, *notes, *step_notes(recipe, finished)],
    )
    record = with_curve(record, *_row_parts(record, recipe))
    record.write(recipe.folder / SIZES_FILE)
    return record


def _start_notes(job: Job, variants: Mapping[str, Recipe]) -> list[str]:
    """What the starts of several seeds share; logs it. Refuses sizes that come to the same student of a cut vocabulary.

    Raises:
        RecipeError: As `check_distinct`.
    """
    shapes = {}
    for size, variant in variants.items():
        rotated = rotation_of(job, variant) is not None
        shape = student_sizes(variant, job.teacher, job.reported.teacher, rotated=rotated)
        shapes[size] = (shape.get("num_layers"), shape.get("hidden_size"))
    check_distinct(shapes)
    if len(sizes_of(job.recipe).seeds) == 1:
        return []
    can_rotate = family_can_rotate(job.teacher.config.model_type)
    notes = list(alike_starts(job.recipe, variants, len(job.splits["train"]), can_rotate=can_rotate))
    for note in notes:
        logger.warning(note)
    return notes


def _cells(job: Job, teacher: object, variants: Mapping[str, Recipe]) -> list[CompareCell]:
    """All students, in the order in which they are trained; those of the first seed are kept."""
    recipe, section = job.recipe, sizes_of(job.recipe)
    order, first_seed = size_order(recipe, variants), section.seeds[0]
    unfinished = [
        cell_recipe(variants[size], seed, size_folder(recipe, size, seed))[0]
        for size, seed in order
        if not decided(partial(is_finished, size_folder(recipe, size, seed), saves=seed == first_seed))
    ]
    share_answers(job, unfinished)
    countdown, cells = Countdown("cell", [size for size, _ in order]), []
    for size, seed in order:
        folder, saves = size_folder(recipe, size, seed), seed == first_seed
        name = f"{section.key} {size}, seed {seed}"
        with countdown.next(name, is_finished=is_finished(folder, saves=saves)):
            cell = run_cell(job, teacher, variants[size], size, seed, folder, saves=saves)
        countdown.finished(cell.seconds)
        tell_cell(cell, name, recipe.task.metric)
        cells.append(cell)
    return cells


def _result(recipe: Recipe, size: str, cells: Sequence[CompareCell], cost: Cost) -> SizeResult:
    """What one size costs, and its metrics as means over the seeds."""
    folder = size_folder(recipe, size, sizes_of(recipe).seeds[0]) / STUDENT_FOLDER
    shape = shape_of(load_config(str(folder), where="sizes"))
    metrics = [cell.metrics for cell in cells if cell.method == size]
    names = dict.fromkeys(name for of_seed in metrics for name in of_seed)
    values = {name: [of_seed.get(name) for of_seed in metrics] for name in names}
    model = ModelRecord(
        role="student",
        name=f"{sizes_of(recipe).key} {size}",
        parameters=cost.parameters,
        bytes_on_disk=cost.bytes_on_disk,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        examples_per_second=cost.examples_per_second,
        peak_memory_bytes=cost.peak_memory_bytes,
        metrics={name: _mean(of_seeds) for name, of_seeds in values.items()},
        dtype=cost.dtype,
        latency=cost.latency,
    )
    return SizeResult(size, float(size), model, folder=folder.relative_to(recipe.folder).as_posix())


def _mean(values: Sequence[float | int | None]) -> float | None:
    """The mean over seeds; None where a seed has no value."""
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if len(defined) == len(values) else None


def _row_parts(record: SizesRecord, recipe: Recipe) -> tuple[dict[str, RowParts], RowParts | None]:
    """Of one seed, what each test row adds to the main metric of each size, and of the teacher; none of several."""
    if len(record.seeds) > 1:
        return {}, None
    problem, metric = record.problem, record.metric
    teacher = read_row_parts(recipe.folder / SIZES_FOLDER / PREDICTIONS_FILE, problem, metric, "teacher")
    files = {
        result.name: size_folder(recipe, result.name, record.seeds[0]) / PREDICTIONS_FILE for result in record.sizes
    }
    parts = {name: read_row_parts(file, problem, metric, "student") for name, file in files.items()}
    return {name: of_size for name, of_size in parts.items() if of_size is not None}, teacher
