"""The search for each method's values, with as many trials for each, on the validation rows alone."""

import datetime
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flexkd.display.progress import Countdown
from flexkd.errors import ArtifactError, TrainingError
from flexkd.facts.metrics import LOWER_IS_BETTER
from flexkd.guards.work import in_run_folder
from flexkd.pipeline.comparison import Comparison, compared_variants, prepare_comparison
from flexkd.pipeline.job import Job
from flexkd.pipeline.recording import environment
from flexkd.pipeline.search.sampler import Sampler
from flexkd.pipeline.search.trials import drop_checkpoints, run_trial, stored_values, with_values
from flexkd.pipeline.sharing import share_answers
from flexkd.preflight.comparison import cell_recipe, check_cell
from flexkd.preflight.machine import check_packages, search_error
from flexkd.processes import join, num_processes
from flexkd.recipe import Recipe
from flexkd.recipe.search import (
    DEFAULT_TRIALS,
    Space,
    combinations,
    edges,
    has_ranges,
    is_in,
    lists_of,
    method_space,
    num_trials,
    prunes,
    value_at,
    with_search,
)
from flexkd.recipe.training_sections import CompareSection, SearchRange
from flexkd.run_files import SEARCH_FOLDER, TUNING_FILE
from flexkd.tuning_record import COMPLETE, PRUNED, MethodTuning, Trial, TuningRecord

logger = logging.getLogger(__name__)


@in_run_folder
def tune(
    recipe: Recipe,
    *,
    methods: Sequence[str] = (),
    search: Mapping[str, Any] | None = None,
    trials: int | None = None,
) -> TuningRecord:
    """Search the values of every method with the first seed, and keep them in the run folder for a comparison.

    Every method has the same number of trials of the same length. They learn from the training rows and are judged by
    the validation rows; no test row is read. Finished trials are kept: an interrupted search continues with the others,
    and draws for them what it would have drawn without the interruption.

    Args:
        recipe: Its `compare` section says what is tried; where it names no key, `recipe.search.DEFAULT_SPACE` is.
        methods: Names of methods; empty: the recipe's, or the default ones.
        search: Recipe key to the values to try, or to a range as {"low": 1e-5, "high": 1e-2, "log": True}; None: the
            recipe's.
        trials: Students that are trained for each method; None: the recipe's number.

    Raises:
        MissingDependencyError: Values are drawn from a range, and Optuna is not installed.
        TrainingError: No trial of a method came to its end.
        ProcessError: Several processes were started together.
        FlexKDError: As `pipeline.compare`.
    """
    join()
    if num_processes() > 1:
        raise search_error("tune")
    recipe = with_search(recipe, search, trials=trials)
    section = recipe.compare or CompareSection()
    if not section.search:
        check_packages(recipe, draws_values=True)
    # Nothing is contrasted here, and a search may be for some of the methods.
    recipe = recipe.model_copy(update={"compare": section.model_copy(update={"contrasts": ()})})
    variants, seeds = compared_variants(recipe, methods, ())
    comparison = prepare_comparison(recipe, variants, seeds, students=section.trials or DEFAULT_TRIALS)
    spaces = search_spaces(recipe, variants)
    possible = [
        cell_recipe(candidate, seeds[0], recipe.folder)[0]
        for method, variant in variants.items()
        for candidate in candidates(variant, spaces[method])
    ]
    # Before any student trains, so that the teacher runs once for all of them.
    share_answers(comparison.job, possible)
    return search_values(comparison, spaces)


def search_spaces(recipe: Recipe, variants: Mapping[str, Recipe]) -> dict[str, Space]:
    """What is tried for each method; nothing for one that has none of the keys."""
    return {method: method_space(recipe, method, variant) for method, variant in variants.items()}


def candidates(variant: Recipe, space: Space) -> list[Recipe]:
    """Recipes of a method that read of the teacher what any trial may read.

    Of a space with ranges, each listed value by itself: numbers of a range rarely decide what is read.
    """
    if not has_ranges(space):
        return [with_values(variant, values) for values in combinations(space)]
    changes = [{key: value} for key, values in lists_of(space).items() for value in values]
    return [with_values(variant, values) for values in changes or [{}]]


def search_values(comparison: Comparison, spaces: Mapping[str, Space]) -> TuningRecord:
    """The trials of all methods; the record in the run folder grows with each method that is done."""
    job, seed = comparison.job, comparison.seeds[0]
    file = job.recipe.folder / TUNING_FILE
    record = TuningRecord(
        metric=job.task.validation_metrics().metric,
        seed=seed,
        methods=[],
        name=job.recipe.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        recipe=job.recipe.model_dump(mode="json"),
        environment=environment(job.precision),
    )
    others = _other_methods(file, record, comparison.variants)
    trials = [method for method in comparison.variants for _ in range(num_trials(job.recipe, spaces[method]))]
    countdown = Countdown("trial", trials)
    for method, variant in comparison.variants.items():
        record.methods.append(_search_method(job, variant, method, seed, spaces[method], countdown))
        stored = TuningRecord(**{**vars(record), "methods": [*record.methods, *others]})
        stored.write(file)
    return record


def _search_method(
    job: Job, variant: Recipe, method: str, seed: int, space: Space, countdown: Countdown
) -> MethodTuning:
    """All trials of one method, and the best of them."""
    folder, metric = job.recipe.folder, job.task.validation_metrics().metric
    count = num_trials(job.recipe, space)
    settings = variant.model_dump(mode="json")
    recipe_values = {key: value_at(settings, key) for key in space}
    sampler = Sampler(space, count, seed, metric in LOWER_IS_BETTER, recipe_values)
    trials: list[Trial] = []
    for number in range(count):
        place = trial_folder(folder, method, number)
        finished = stored_values(place, space)
        if finished is not None and not is_in(space, finished):
            raise ArtifactError(
                f"{place}: tried {_shown(finished)}, which compare.search does not hold now. Widen it so that it does, "
                "or choose another output folder."
            )
        values = sampler.values(trials) if finished is None else finished
        running = partial(sampler.running, list(trials), values) if prunes(job.recipe) else None
        with countdown.next(f"{method}, {_shown(values)}", is_finished=finished is not None):
            trial = run_trial(job, variant, seed, place, number, values, running)
        countdown.finished(trial.seconds)
        trials.append(trial)
        best = _best(trials, metric)
        for earlier in trials:
            if best is not None and earlier.number != best.number:
                drop_checkpoints(trial_folder(folder, method, earlier.number))
        logger.info("%s: trial %d of %d: %s: %s", method, number + 1, count, _shown(values), _outcome(trial, metric))
    best = _best(trials, metric)
    if trials and best is None:
        messages = [trial.message for trial in trials if trial.message]
        raise TrainingError(f"{method}: none of {count} trials came to its end. The first: {messages[0]}")
    return MethodTuning(
        method=method,
        space={key: _plain(choices) for key, choices in space.items()},
        trials=trials,
        best=None if best is None else best.number,
        chosen={} if best is None else best.values,
        edges=[] if best is None else edges(space, best.values),
        made_of=_made_of(job, variant, seed),
    )


def _best(trials: Sequence[Trial], metric: str) -> Trial | None:
    """The first of the best among the trials that came to their end; None where none did."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    complete = [trial for trial in trials if trial.state == COMPLETE]
    return max(complete, key=lambda trial: -math.inf if trial.value is None else sign * trial.value, default=None)


def trial_folder(folder: Path, method: str, number: int) -> Path:
    """Where a search keeps one student of a method."""
    return folder / SEARCH_FOLDER / method / str(number)


def read_tuning(recipe: Recipe, variants: Mapping[str, Recipe], fingerprints: Mapping[str, str]) -> TuningRecord:
    """The values that `flexkd tune` chose for these methods.

    Args:
        variants: Recipe of each method.
        fingerprints: Of teacher and rows; empty while they are not known.

    Raises:
        ArtifactError: There are none, for one of the methods there are none, or they belong to something else.
    """
    file = recipe.folder / TUNING_FILE
    if not file.is_file():
        raise ArtifactError(f"--tuned: there is no {file}. Run flexkd tune with this recipe first.")
    record = TuningRecord.read(file)
    by_method = {tuning.method: tuning for tuning in record.methods}
    missing = [method for method in variants if method not in by_method]
    if missing:
        raise ArtifactError(
            f"--tuned: {file} holds no values for {', '.join(missing)}. Run flexkd tune with --methods "
            f"{','.join(missing)} first."
        )
    for method, variant in variants.items():
        stored: dict[str, Any] = by_method[method].made_of
        settings = cell_recipe(variant, record.seed, recipe.folder)[1]
        names = ("recipe", *fingerprints)
        check_cell(file, {name: stored.get(name) for name in names}, {"recipe": settings, **fingerprints})
    return TuningRecord(**{**vars(record), "methods": [by_method[method] for method in variants]})


def _made_of(job: Job, variant: Recipe, seed: int) -> dict[str, object]:
    """The settings of a method before the search, and fingerprints of teacher and rows."""
    return {"recipe": cell_recipe(variant, seed, job.recipe.folder)[1], **job.fingerprints}


def _other_methods(file: Path, record: TuningRecord, variants: Mapping[str, Recipe]) -> list[MethodTuning]:
    """What an earlier search with this seed chose for methods that are not searched now."""
    if not file.is_file():
        return []
    earlier = TuningRecord.read(file)
    if (earlier.metric, earlier.seed) != (record.metric, record.seed):
        return []
    return [tuning for tuning in earlier.methods if tuning.method not in variants]


def _plain(choices: tuple[Any, ...] | SearchRange) -> object:
    """The values of a key as JSON has them."""
    return list(choices) if isinstance(choices, tuple) else choices.model_dump(mode="json")


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in values.items())


def _outcome(trial: Trial, metric: str) -> str:
    """How a trial ended, in words."""
    value = "undefined" if trial.value is None else f"{trial.value:.4f}"
    ends = {COMPLETE: "", PRUNED: f", stopped behind the others after {trial.steps} steps"}
    return f"{metric} {value}{ends[trial.state]}" if trial.state in ends else f"failed: {trial.message}"
