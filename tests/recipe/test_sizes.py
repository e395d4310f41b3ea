"""Sizes of a recipe: one key of the student differs, what follows from it is left out, and other lists are refused."""

from pathlib import Path
from typing import Any

import pytest

from flexkd.errors import RecipeError
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.sizes import size_folder, sized_recipes, sizes_of, with_sizes
from tests.job_files import job


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return job(tmp_path_factory.mktemp("sizes"))


def shape(student: Any) -> dict[str, Any]:
    names = ("size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
    return {name: getattr(student, name) for name in names if getattr(student, name) is not None}


def test_the_sizes_of_a_recipe_without_a_section_are_four_shares_of_the_teacher(recipe: Recipe) -> None:
    sized = with_sizes(recipe)
    assert sizes_of(sized).values == (0.1, 0.2, 0.35, 0.5)
    assert sizes_of(sized).seeds == (recipe.training.seed,)
    assert list(sized_recipes(sized)) == ["0.1", "0.2", "0.35", "0.5"]


def test_each_size_differs_in_its_key_and_leaves_out_what_follows_from_it(recipe: Recipe) -> None:
    recipes = sized_recipes(with_sizes(recipe, [0.5, 0.25], [3, 4]))
    assert {size: shape(sized.student) for size, sized in recipes.items()} == {
        "0.25": {"size": 0.25},
        "0.5": {"size": 0.5},
    }
    heads = override_recipe(recipe, ["student.num_heads=4", "sizes={key: hidden_size, values: [16, 32]}"])
    recipes = sized_recipes(heads)
    assert {size: shape(sized.student) for size, sized in recipes.items()} == {
        "16": {"hidden_size": 16, "num_layers": 2},
        "32": {"hidden_size": 32, "num_layers": 2},
    }
    plain = recipe.model_copy(update={"student": None, "sizes": None})
    assert all(sized.model_copy(update={"student": None, "sizes": None}) == plain for sized in recipes.values())


def test_values_and_seeds_of_a_call_replace_those_of_the_section(recipe: Recipe) -> None:
    layers = override_recipe(recipe, ["sizes={key: num_layers, values: [1, 2], seeds: [5], keep: 0.9}"])
    section = sizes_of(with_sizes(layers, [4, 1], [7]))
    assert (section.key, section.values, section.seeds, section.keep) == ("num_layers", (1.0, 4.0), (7,), 0.9)
    assert size_folder(layers, "2", 5) == Path(recipe.output) / "sizes" / "num_layers_2-5"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{values: [0.2, 0.2]}", "sizes.values: [0.2, 0.2] names one twice. Name each once."),
        ("{seeds: [1, 1]}", "sizes.seeds: [1, 1] names one twice. Name each once."),
        ("{values: [0.5]}", "sizes.values: [0.5] makes no curve. Give two values of student.size or more."),
        ("{key: num_layers}", "sizes.values: [] makes no curve. Give two values of student.num_layers or more."),
        ("{values: [0.5, 1.5]}", "sizes.values: 1.5 is more than the whole teacher. Give shares of its"),
        ("{values: [0, 0.5]}", "sizes.values.0: 0 must be greater than 0."),
        ("{key: num_layers, values: [1, 2.5]}", "sizes.values: 2.5 is no num_layers. Give whole numbers."),
        ("{keep: 2}", "sizes.keep: 2"),
        ("{key: width}", "sizes.key: unknown key 'width'. Known: hidden_size, num_layers, size."),
    ],
)  # fmt: skip
def test_lists_that_make_no_curve_are_refused(recipe: Recipe, section: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        override_recipe(recipe, [f"sizes={section}"])
    assert f"command line: {message}" in str(error.value)


def test_a_student_that_is_not_cut_has_no_sizes(recipe: Recipe) -> None:
    pretrained = ["student={start: pretrained, model: teacher}"]
    with pytest.raises(RecipeError, match=r"sizes: start: pretrained takes the shape of student\.model"):
        with_sizes(override_recipe(recipe, pretrained))
