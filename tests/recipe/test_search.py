"""What a search tries: lists and ranges that are checked before the first run, and a space for each kind of method."""

import pytest

from flexkd.facts.methods import METHODS, WITHOUT_FEATURES
from flexkd.recipe.methods import method_recipe
from flexkd.recipe.search import Space, edges, is_in, method_space, num_trials, prunes
from flexkd.recipe.training_sections import SearchRange
from tests.recipe.kinds import BASE, Loaded, Problems

RATES = "training.learning_rate"


def space_of(load: Loaded, method: str, compare: str = "{}", more: str = "") -> Space:
    recipe = load(f"{BASE}{more}compare: {compare}\n")
    return method_space(recipe, method, method_recipe(recipe, method))


def test_a_range_is_read_and_written(load: Loaded) -> None:
    recipe = load(f"{BASE}compare: {{search: {{{RATES}: {{low: 1e-5, high: 1e-2, log: true}}}}, trials: 5}}")
    assert recipe.compare is not None
    assert recipe.compare.search == {RATES: SearchRange(low=1e-5, high=1e-2, log=True)}
    assert load(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("{low: 1e-5}", "a range names no high. Write it as {low: 1e-5, high: 1e-2, log: true}."),
        ("{low: 1, high: 2, lgo: true}", "a range has an unknown key 'lgo'. Write it as {low: 1e-5, high: 1e-2"),
        ("{low: 2, high: 1}", "low 2 is not below high 1."),
        ("{low: 0, high: 1, log: true}", "low 0 has no logarithm. Give one above 0, or set log: false."),
        ("{low: 1, high: 2, log: true, step: 1}", "step 1 beside log: true. Keep one of the two."),
        ("{low: 1, high: 2, step: 3}", "step 3 leads from low 1 beyond high 2. Lower it."),
        ("{low: 0, high: 1}", "0.0 leads to training.learning_rate: 0.0 must be greater than 0."),
    ],
)
def test_a_range_that_cannot_be_drawn_from_is_refused(problems: Problems, choices: str, message: str) -> None:
    (line,) = problems(f"{BASE}compare: {{search: {{{RATES}: {choices}}}}}")
    assert f"compare.search.{RATES}: {message}" in line


def test_a_range_of_whole_numbers_stays_whole(load: Loaded, problems: Problems) -> None:
    load(f"{BASE}compare: {{search: {{student.num_layers: {{low: 1, high: 3}}}}}}")
    (line,) = problems(f"{BASE}compare: {{search: {{student.num_layers: {{low: 1.5, high: 3}}}}}}")
    assert "1.5 leads to student.num_layers: 1.5 is not a whole number" in line


def test_the_rate_of_a_projector_is_searched_for_the_methods_that_have_one(load: Loaded, problems: Problems) -> None:
    rate = "objective.features.projector.learning_rate"
    compare = f"{{search: {{{rate}: [1e-3, 1e-2], {RATES}: [1e-4]}}}}"
    assert set(space_of(load, "projector", compare)) == {rate, RATES}
    assert set(space_of(load, "flexkd", compare)) == set(space_of(load, "fine_tuning", compare)) == {RATES}
    (line,) = problems(f"{BASE}compare: {{search: {{{rate}: [0]}}}}")
    assert f"0 leads to {rate}: 0 must be greater than 0." in line


def test_ranges_of_shared_keys_are_refused_as_lists_are(problems: Problems) -> None:
    (line,) = problems(f"{BASE}compare: {{search: {{data.max_length: {{low: 8, high: 64}}}}}}")
    assert "data.max_length: every method would be tried under the same value." in line


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_default_space_holds_what_the_method_has(load: Loaded, method: str) -> None:
    text = "task: {type: summarization}\n"
    if method == "distill_lens":
        text += "objective: {features: {layer_map: {1: 2}}}\n"
    keys = {RATES}
    if method != "fine_tuning":
        keys |= {"objective.logits.temperature"}
    if method not in WITHOUT_FEATURES:
        keys |= {"objective.features.weight"}
    if method.startswith("projector"):
        keys |= {"objective.features.projector.learning_rate"}
    assert set(space_of(load, method, more=text)) == keys


def test_the_default_space_leaves_alone_what_has_no_effect_or_is_set_by_the_method(load: Loaded) -> None:
    mine = "{methods: {flexkd: null, mine: [objective.features.weight=0.1]}}"
    assert "objective.features.weight" in space_of(load, "flexkd", mine)
    assert "objective.features.weight" not in space_of(load, "mine", mine)
    assert set(space_of(load, "flexkd", more="task: {problem: regression}\n")) == {RATES, "objective.features.weight"}


@pytest.mark.parametrize(
    ("compare", "method", "count", "stops"),
    [
        ("{}", "flexkd", 12, True),
        ("{trials: 20}", "fine_tuning", 20, True),
        (f"{{search: {{{RATES}: [1e-4, 5e-4]}}}}", "flexkd", 2, False),
        (f"{{search: {{{RATES}: [1e-4, 5e-4]}}, pruning: true}}", "flexkd", 2, True),
        (f"{{search: {{{RATES}: [1e-4, 5e-4]}}, trials: 9}}", "flexkd", 2, True),
        (f"{{search: {{{RATES}: [1e-4, 1e-3], objective.features.weight: [1, 2]}}, trials: 3}}", "flexkd", 3, True),
        ("{search: {objective.features.weight: [1, 2]}}", "fine_tuning", 0, False),
        ("{search: {objective.features.weight: {low: 1, high: 2}}, pruning: false}", "flexkd", 12, False),
    ],
)  # fmt: skip
def test_every_method_has_the_trials_that_the_recipe_gives(
    load: Loaded, compare: str, method: str, count: int, stops: bool
) -> None:
    recipe = load(f"{BASE}compare: {compare}")
    assert num_trials(recipe, space_of(load, method, compare)) == count
    assert prunes(recipe) is stops


LOG = SearchRange(low=1e-4, high=1e-2, log=True)
EVEN = SearchRange(low=0, high=10)


@pytest.mark.parametrize(
    ("choices", "value", "edge"),
    [
        ((1e-4, 5e-4, 1e-3), 1e-3, "the highest tried: add values beyond it"),
        ((1e-4, 5e-4, 1e-3), 1e-4, "the lowest tried: add values"),
        ((1e-4, 5e-4, 1e-3), 5e-4, ""),
        ((1e-4,), 1e-4, ""),
        ((None, 1e-4), None, ""),
        ((True, False), True, ""),
        (("correlation", "cka"), "cka", ""),
        (LOG, 0.0067, "at the upper end of its range: widen it in compare.search and raise compare.trials."),
        (LOG, 0.00014, "at the lower end of its range"),
        (LOG, 0.001, ""),
        (LOG, 0.005, ""),
        (EVEN, 0.5, "at the lower end of its range"),
        (EVEN, 5.0, ""),
        (EVEN, 9.5, "at the upper end of its range"),
    ],
)
def test_a_value_at_an_edge_is_reported(choices: object, value: object, edge: str) -> None:
    sentences = edges({RATES: choices}, {RATES: value})  # type: ignore[dict-item]
    assert bool(sentences) is bool(edge)
    assert all(sentence.startswith(f"{RATES} = {value} is {edge}") for sentence in sentences)


@pytest.mark.parametrize(
    ("choices", "value", "inside"),
    [
        ((1, None), None, True),
        ((1, None), 2, False),
        (LOG, 1e-2, True),
        (LOG, 1.1e-2, False),
        (LOG, None, False),
        (SearchRange(low=0.1, high=1, step=0.1), 0.3, True),
        (SearchRange(low=0.1, high=1, step=0.1), 0.35, False),
    ],
)
def test_trials_of_a_wider_space_are_trials_of_this_one_where_it_holds_them(
    choices: object, value: object, inside: bool
) -> None:
    assert is_in({RATES: choices}, {RATES: value}) is inside  # type: ignore[dict-item]
    assert not is_in({RATES: choices}, {})  # type: ignore[dict-item]
