"""Values of the next trial: the same after an interruption, inside the space, the recipe's own ones first."""

import math
from collections.abc import Mapping
from typing import Any

from flexkd.pipeline.search.sampler import Sampler
from flexkd.recipe.training_sections import SearchRange
from flexkd.tuning_record import Trial

SPACE = {
    "training.learning_rate": SearchRange(low=1e-5, high=1e-2, log=True),
    "student.num_layers": SearchRange(low=1, high=5, step=2),
    "objective.features.weight": SearchRange(low=0.1, high=0.95, step=0.2),
    "objective.features.mapping": ("index", "matched"),
}
OWN = {"training.learning_rate": 3.3333e-4, "student.num_layers": 2, "objective.features.weight": 7.0}
LISTS = {"training.learning_rate": (1e-4, 1e-3, 1e-2), "objective.features.weight": (0.5, 1.0)}


def sampler(space: Mapping[str, Any] = SPACE, **changes: Any) -> Sampler:
    settings = {"num_trials": 12, "seed": 3, "lower_is_better": False, "recipe_values": {**dict.fromkeys(space), **OWN}}
    return Sampler(space, **{**settings, **changes})


def finished(number: int, values: Mapping[str, Any], value: float | None, state: str = "complete") -> Trial:
    return Trial(number, dict(values), state, value, steps=1, seconds=1.0, values_by_step={"1": value})


def searched(draws: Sampler, count: int) -> list[Trial]:
    """Trials whose value falls with the distance of the learning rate to 1e-3."""
    trials: list[Trial] = []
    for number in range(count):
        values = draws.values(trials)
        trials.append(finished(number, values, -abs(math.log10(values["training.learning_rate"]) + 3)))
    return trials


def test_the_first_trial_has_the_values_of_the_recipe_and_all_are_in_the_space() -> None:
    trials = searched(sampler(), 12)
    first = trials[0].values
    assert first["training.learning_rate"] == 3.3333e-4, "not rounded"
    assert first["student.num_layers"] in (1, 3, 5), "2 cannot be drawn"
    for trial in trials:
        rate, layers, weight, mapping = trial.values.values()
        assert isinstance(rate, float)
        assert 1e-5 <= rate <= 1e-2
        assert layers in (1, 3, 5)
        assert isinstance(layers, int)
        assert weight in (0.1, 0.3, 0.5, 0.7, 0.9)
        assert mapping in ("index", "matched")


def test_every_draw_depends_on_the_finished_trials_and_the_seed_alone() -> None:
    trials = searched(sampler(), 9)
    for number in range(9):
        assert sampler().values(trials[:number]) == trials[number].values
    assert sampler(seed=4).values(trials) != sampler().values(trials)
    others = [finished(trial.number, trial.values, -float(trial.value or 0)) for trial in trials]
    assert sampler().values(others) != sampler().values(trials), "the sampler follows the values"


def test_a_failed_trial_and_one_without_a_value_are_read() -> None:
    trials = searched(sampler(), 6)
    odd = [finished(6, trials[1].values, None, "failed"), finished(7, trials[2].values, None)]
    assert sampler().values([*trials, *odd]).keys() == SPACE.keys()


def test_lists_are_tried_in_their_order_or_at_random_but_never_twice() -> None:
    everything = searched(sampler(LISTS, num_trials=6), 6)
    assert [tuple(trial.values.values()) for trial in everything] == [
        (rate, weight) for rate in LISTS["training.learning_rate"] for weight in LISTS["objective.features.weight"]
    ]
    some_of_them = searched(sampler(LISTS, num_trials=5), 5)
    tried = [tuple(trial.values.values()) for trial in some_of_them]
    assert len(set(tried)) == 5
    assert tried != [tuple(trial.values.values()) for trial in everything[:5]]


def test_a_trial_behind_the_median_is_stopped_once_there_are_enough() -> None:
    values = {"training.learning_rate": 1e-3}
    space = {"training.learning_rate": SPACE["training.learning_rate"]}
    for lower_is_better, worse, better in ((False, 0.3, 0.9), (True, 0.9, 0.3)):
        draws = sampler(space, lower_is_better=lower_is_better)
        trials = [finished(number, values, 0.5 + number / 100) for number in range(4)]
        for earlier, value, stops in ((trials, worse, True), (trials, better, False), (trials[:3], worse, False)):
            running = draws.running(earlier, values)
            assert running.params == values
            running.report(value, 1)
            assert bool(running.should_prune()) is stops
