"""Which values a search tries next, and whether a trial has fallen behind: Optuna, asked afresh for every trial.

No state of Optuna is stored. A study is filled with the finished trials and seeded by the number of the next one, so
that an interrupted search goes on exactly as it would have without the interruption.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flexkd.recipe.messages import takes_whole_numbers
from flexkd.recipe.search import Space, combinations, drawn_number, has_ranges, holds
from flexkd.recipe.training_sections import SearchRange
from flexkd.tuning_record import COMPLETE, PRUNED, Trial

# An optional package: imported where a value is drawn or a trial is judged.
if TYPE_CHECKING:
    import optuna

_RANDOM_TRIALS: Final = 5
"""Trials of a method before the sampler follows their values, and before any trial is stopped."""


@dataclass(frozen=True)
class Sampler:
    """Chooses the values of trials of one method.

    Attributes:
        space: What may be tried.
        num_trials: Number of trials in all; lists alone are tried in their order where it allows all combinations, else
            at random, none twice.
        seed: Decides all random choices, together with the number of a trial.
        lower_is_better: Which way the validation metric is better.
        recipe_values: The values of the recipe itself, which the first trial takes where they are in a range.

    Source:
        Akiba et al., 2019, arXiv:1907.10902; the sampler is Bergstra et al., 2011, sec. 4, and the rule that stops
        trials Golovin et al., 2017, sec. 3.2.2.
    """

    space: Space
    num_trials: int
    seed: int
    lower_is_better: bool
    recipe_values: Mapping[str, Any]

    def values(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """The values to try after these trials."""
        if not has_ranges(self.space):
            return self._untried(trials)
        study = self._study(trials)
        distributions = _distributions(self.space)
        if not trials:
            study.enqueue_trial(
                {key: value for key, value in self.recipe_values.items() if holds(self.space[key], value)}
            )
        drawn = study.ask(distributions).params
        # A value of the recipe itself is not rounded.
        return {
            key: drawn_number(key, drawn[key], choices)
            if isinstance(choices, SearchRange) and (trials or drawn[key] != self.recipe_values.get(key))
            else drawn[key]
            for key, choices in self.space.items()
        }

    def _untried(self, trials: Sequence[Trial]) -> dict[str, Any]:
        tried = [trial.values for trial in trials]
        everything = combinations(self.space)
        if self.num_trials < len(everything):
            random.Random(self.seed).shuffle(everything)
        return next(values for values in everything if values not in tried)

    def running(self, trials: Sequence[Trial], values: Mapping[str, Any]) -> "optuna.trial.Trial":
        """A trial of Optuna with these values, which can be told values of the metric and asked whether to stop."""
        study = self._study(trials)
        study.enqueue_trial(dict(values))
        return study.ask(_distributions(self.space))

    def _study(self, trials: Sequence[Trial]) -> "optuna.study.Study":
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = (self.seed + 7919 * len(trials)) % 2**32
        study = optuna.create_study(
            direction="minimize" if self.lower_is_better else "maximize",
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_RANDOM_TRIALS - 1),
        )
        distributions, states = _distributions(self.space), optuna.trial.TrialState
        for trial in trials:
            is_complete = trial.state == COMPLETE and trial.value is not None
            reported = trial.values_by_step.items() if trial.state in (COMPLETE, PRUNED) else ()
            study.add_trial(
                optuna.trial.create_trial(
                    # Of no value: to the sampler, a trial that failed is one that was stopped before its first value.
                    state=states.COMPLETE if is_complete else states.PRUNED,
                    params=dict(trial.values),
                    distributions=distributions,
                    value=trial.value if is_complete else None,
                    intermediate_values={int(step): value for step, value in reported if value is not None},
                )
            )
        return study


def _distributions(space: Space) -> "dict[str, optuna.distributions.BaseDistribution]":
    """The space in the terms of Optuna."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    distributions: dict[str, optuna.distributions.BaseDistribution] = {}
    for key, choices in space.items():
        if isinstance(choices, tuple):
            distributions[key] = CategoricalDistribution(choices)
        elif takes_whole_numbers(tuple(key.split("."))):
            low, high = round(choices.low), round(choices.last)
            distributions[key] = IntDistribution(low, high, log=choices.log, step=round(choices.step or 1))
        else:
            distributions[key] = FloatDistribution(choices.low, choices.last, log=choices.log, step=choices.step)
    return distributions
