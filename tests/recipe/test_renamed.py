"""Names of earlier versions in recipes, overrides and methods are read as those of today, and the new name is told."""

from pathlib import Path

import pytest

from flexkd import __version__
from flexkd.fingerprints import earlier_selection
from flexkd.recipe import Recipe, load_recipe
from flexkd.recipe.methods import method_recipe
from flexkd.recipe.renamed import LAST_VERSION

BASE = "name: job\ndata: {train: rows.csv}\nteacher: {model: teachers/big}\n"
CUT = f"{BASE}student: {{hidden_size: 192}}\n"
TEXT = f"{CUT}task: {{type: summarization}}\n"
PRETRAINED = f"{BASE}student: {{start: pretrained, model: small}}\n"


def loaded(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def choices(recipe: Recipe) -> tuple[str, str, str | None, str]:
    features = recipe.objective.features
    assert features is not None
    assert recipe.scores.attribution == "gradient"
    return recipe.student.chosen_by, features.basis, features.chosen_by, features.mapping


@pytest.mark.parametrize(
    ("text", "key", "choice", "told"),
    [
        (CUT, "scores.attribution=random", ("random", "units", None, "index"), "read as student.chosen_by: random."),
        (TEXT, "scores.attribution=variance", ("variance", "auto", None, "index"), "student.chosen_by: variance."),
        (
            PRETRAINED,
            "scores.attribution=activation",
            ("auto", "units", "activation", "index"),
            "read as objective.features.chosen_by: activation.",
        ),
        (
            CUT,
            "objective.features.basis=tangent",
            ("auto", "directions", "scores", "matched"),
            "read as basis: directions with chosen_by: scores and mapping: matched.",
        ),
        (TEXT, "objective.features.basis=units", ("auto", "auto", None, "index"), "is read as 'auto'"),
        (CUT, "objective.features.basis=units", ("auto", "units", None, "index"), ""),
        (
            TEXT,
            "objective.features={basis: units, mapping: matched}",
            ("auto", "units", None, "matched"),
            "",
        ),
    ],
)
def test_earlier_names_are_read_and_told(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    text: str,
    key: str,
    choice: tuple[str, str, str | None, str],
    told: str,
) -> None:
    assert choices(loaded(tmp_path, text, key)) == choice
    assert told in caplog.text
    assert bool(caplog.text) is bool(told)
    # The same in the file, and the recipe with all its values needs no translation.
    path, _, value = key.partition("=")
    *above, name = path.split(".")
    lines = "".join(f"{'  ' * depth}{step}:\n" for depth, step in enumerate(above))
    recipe = loaded(tmp_path, f"{text}{lines}{'  ' * len(above)}{name}: {value}\n")
    assert choices(recipe) == choice
    caplog.clear()
    assert choices(loaded(tmp_path, recipe.to_yaml())) == choice
    assert caplog.text == ""


def test_a_method_of_a_recipe_may_use_earlier_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = loaded(tmp_path, f"{CUT}compare: {{methods: {{logit_kd: null, mine: [scores.attribution=random]}}}}\n")
    assert "compare.methods.mine: scores.attribution: 'random' is an earlier name" in caplog.text
    assert f"Write that instead. {LAST_VERSION} is the last version that reads the earlier one." in caplog.text
    assert choices(method_recipe(recipe, "mine"))[0] == "random"


def test_no_earlier_name_outlives_the_last_version_that_reads_it() -> None:
    version, last = (tuple(map(int, text.split(".")[:2])) for text in (__version__, LAST_VERSION))
    assert version <= last, "flexkd.recipe.renamed reads names whose time is over: drop them"


def test_selections_of_earlier_versions_are_those_of_the_same_choice() -> None:
    earlier = {"student.start": '"slice"', "scores.attribution": '"random"'}
    now = {"student.start": '"slice"', "scores.attribution": '"gradient"', "student.chosen_by": '"random"'}
    assert earlier_selection(earlier, is_cut_along_directions=False) == now
    assert earlier_selection(now, is_cut_along_directions=False) == now
    # Whatever the attribution was, directions were those with the most variance.
    assert earlier_selection(earlier, is_cut_along_directions=True)["student.chosen_by"] == '"variance"'
    taught = earlier_selection({**earlier, "student.start": '"pretrained"'}, is_cut_along_directions=False)
    assert (taught["student.chosen_by"], taught["features.chosen_by"]) == ('"scores"', '"random"')
