"""Methods that a recipe defines for `flexkd compare`: read, checked with the recipe, and named on the command line."""

import re

import pytest

from flexkd.errors import RecipeError
from flexkd.facts.methods import METHODS
from flexkd.recipe.methods import check_comparison, compared_methods, definition_notes, method_recipe
from tests.recipe.kinds import BASE, Loaded, Problems
from tests.source_tree import ROOT

MINE = "mine: [objective.features.weight=0.1, student.num_layers=2]"


def with_methods(methods: str, more: str = "") -> str:
    return f"{BASE}{more}compare:\n  methods:\n    flexkd:\n    {methods}\n"


def test_a_method_of_the_recipe_changes_what_it_says_and_nothing_else(load: Loaded) -> None:
    recipe = load(with_methods(MINE))
    assert compared_methods(recipe, (), can_rotate=False) == ["flexkd", "mine"]
    changed, plain = method_recipe(recipe, "mine"), method_recipe(recipe, "flexkd")
    assert plain == recipe.model_copy(update={"compare": None})
    assert changed.student.num_layers == 2
    assert changed.objective.features is not None
    assert changed.objective.features.weight == 0.1
    assert changed.model_copy(update={"student": plain.student, "objective": plain.objective}) == plain
    check_comparison(recipe, ["flexkd", "mine"], [0, 1], can_rotate=False)
    assert definition_notes(recipe, ["flexkd", "mine"]) == [
        "mine: a method of this recipe, with objective.features.weight=0.1, student.num_layers=2."
    ]


@pytest.mark.parametrize(
    "methods", [MINE, "same: []", "deep: ['objective.features.layer_map={1: 2}', 'scores.layer=2']"]
)
def test_definitions_are_written_out_and_read_back(load: Loaded, methods: str) -> None:
    recipe = load(with_methods(methods))
    assert load(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("methods", "line"),
    [
        (
            "mine: [student.num_layers=2, objective.features.wieght=0.1]",
            "recipe.yaml:8: compare.methods.mine.1: 'objective.features.wieght=0.1' leads to "
            "objective.features.wieght: unknown key. Did you mean 'objective.features.weight'?",
        ),
        (
            "mine:\n    - student.num_layers=2\n    - training.learning_rate=fast",
            "recipe.yaml:10: compare.methods.mine.1: 'training.learning_rate=fast' leads to training.learning_rate: "
            "'fast' is not a finite number. Write a number, as 0.1.",
        ),
        (
            "mine: [objective.features=null, objective.logits=null]",
            "recipe.yaml:8: compare.methods.mine.1: 'objective.logits=null' leads to objective: the teacher teaches "
            "nothing",
        ),
        (
            "mine: [student.num_layers]",
            "recipe.yaml:8: compare.methods.mine.0: 'student.num_layers' is no KEY=VALUE. Write it as "
            "training.learning_rate=1e-4.",
        ),
        (
            "mine: [student.num_layers=1, student.num_layers=2]",
            "recipe.yaml:8: compare.methods.mine.1: student.num_layers: given twice. Keep one.",
        ),
        (
            "mine: [name.first=a]",
            "recipe.yaml:8: compare.methods.mine.0: name.first: the recipe holds 'job', which has no key 'first'. Give "
            "its whole value.",
        ),
        (
            "mine: [student.num_layers=1, data.max_length=64]",
            "recipe.yaml:8: compare.methods.mine.1: 'data.max_length=64' changes data. All students of a comparison "
            "share it. Change it in the recipe itself, or leave it out.",
        ),
        (
            "mine: ['training={seed: 3}']",
            "recipe.yaml:8: compare.methods.mine.0: 'training={seed: 3}' changes training.seed. All students",
        ),
        (
            "mine: ['student={start: pretrained, model: other}']",
            "recipe.yaml:8: compare.methods.mine.0: 'student={start: pretrained, model: other}' changes student.start",
        ),
        (
            "mine: student.num_layers=2",
            "recipe.yaml:8: compare.methods.mine: 'student.num_layers=2' is no list of KEY=VALUE. Write a list, as [",
        ),
        ("mine: [3]", "recipe.yaml:8: compare.methods.mine.0: 3 is not text. Put it in quotes: '3'."),
        ("../up: []", "recipe.yaml:8: compare.methods.../up: '../up' cannot name a method, which is a folder as well."),
        ("a b: []", "recipe.yaml:8: compare.methods.a b: 'a b' cannot name a method, which is a folder as well."),
    ],
)
def test_a_wrong_definition_is_one_error_with_its_place(problems: Problems, methods: str, line: str) -> None:
    (message,) = problems(with_methods(methods))
    assert message.startswith(line)


def test_all_definitions_are_reported_together_and_with_other_problems(problems: Problems) -> None:
    lines = problems(
        with_methods("a: [student.num_layer=2, training.epoch=1]\n    b: [scores.row=2]\n  search: {name: []}")
    )
    assert [line.partition(": '")[0] for line in lines] == [
        "recipe.yaml:8: compare.methods.a.0",
        "recipe.yaml:8: compare.methods.a.1",
        "recipe.yaml:9: compare.methods.b.0",
        "recipe.yaml:10: compare.search.name: [] gives nothing to try. Give values, as [1e-4, 5e-4].",
    ]


def test_names_on_the_command_line_keep_what_the_recipe_says_of_them(load: Loaded, problems: Problems) -> None:
    text = with_methods(f"{MINE}\n    other: [student.num_layers=1]")
    recipe = load(text, "compare.methods=[logit_kd, mine]")
    assert compared_methods(recipe, (), can_rotate=False) == ["logit_kd", "mine"]
    assert method_recipe(recipe, "mine") == method_recipe(load(text), "mine")
    with pytest.raises(RecipeError, match=r"unknown built-in method 'min'\. Known: .*mine.*\. Did you mean 'mine'\?"):
        check_comparison(load(text, "compare.methods=[min, mine]"), ["min", "mine"], [0, 1], can_rotate=False)
    twice = load(text, "compare.methods=[mine, mine]")
    with pytest.raises(RecipeError, match=re.escape("compare.methods: ['mine', 'mine'] names one twice.")):
        check_comparison(twice, compared_methods(twice, (), can_rotate=False), [0, 1], can_rotate=False)
    broken = text.replace("weight=0.1", "weight=-1")
    (line,) = problems(broken, "compare.methods=[mine, flexkd]")
    assert line.startswith("recipe.yaml:8: compare.methods.mine.0: 'objective.features.weight=-1' leads to")
    (line,) = problems(text, "compare.methods={mine: [student.num_layer=1]}")
    assert line.startswith("command line: compare.methods.mine.0: 'student.num_layer=1' leads to")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            "logit_kd: [objective.features.weight=0.1]",
            "compare.methods: 'logit_kd' is a built-in method, which changes objective.features=null, and not "
            "objective.features.weight=0.1. Give these changes another name.",
        ),
        ("cka: []", "compare.methods: 'cka' is a built-in method, which changes objective.features.loss=cka,"),
        ("Flexkd: [scores.rows=7]", "compare.methods: 'flexkd' and 'Flexkd' differ in capital letters alone"),
        ("mine:", "compare.methods: unknown built-in method 'mine'."),
        ("mine: [student.hidden_size=192]", "compare.methods: 'mine' is the same run as 'flexkd' under this recipe."),
    ],
)
def test_a_definition_that_lies_or_repeats_is_refused(load: Loaded, methods: str, message: str) -> None:
    recipe = load(with_methods(methods))
    names = compared_methods(recipe, (), can_rotate=False)
    with pytest.raises(RecipeError, match=re.escape(message)):
        check_comparison(recipe, names, [0, 1], can_rotate=False)


def test_a_built_in_name_may_be_written_out(load: Loaded) -> None:
    recipe = load(with_methods("logit_kd: [objective.features=null]"))
    check_comparison(recipe, ["flexkd", "logit_kd"], [0, 1], can_rotate=False)


def test_definitions_and_searches_need_not_fit_each_other(load: Loaded) -> None:
    """What is added to plain fine-tuning would be a mistake there, and is not added."""
    more = "\n  search: {objective.features.weight: [0.5, 2]}"
    recipe = load(with_methods("fine_tuning:\n    low: [objective.features.loss=cka]" + more))
    check_comparison(recipe, ["flexkd", "fine_tuning", "low"], [0, 1], can_rotate=False)
    assert method_recipe(recipe, "fine_tuning").objective.features is None


@pytest.mark.parametrize(
    ("training", "search", "message"),
    [
        (
            "{}",
            "data.max_length: [32, 64]",
            "compare.search.data.max_length: every method would be tried under",
        ),
        (
            "{}",
            "training.max_minutes: [1, 2]",
            "compare.search.training.max_minutes: every method would be tried",
        ),
        ("{max_minutes: 2}", "training.epochs: [1, 2]", "compare.search.training.epochs: every method would be tried"),
        (
            "{}",
            "student.num_layers: [1, 2]",
            "compare.search.student.num_layers: 'mine' of compare.methods sets",
        ),
    ],
)
def test_a_search_that_would_change_nothing_or_undo_a_method_is_refused(
    problems: Problems, training: str, search: str, message: str
) -> None:
    (line,) = problems(with_methods(f"{MINE}\n  search: {{{search}}}", f"training: {training}\n"))
    assert line.partition(": ")[2].startswith(message)


@pytest.mark.parametrize("key", ["epochs=2", "max_steps=9", "batch_size=8"])
def test_under_a_time_limit_no_method_has_steps_of_its_own(load: Loaded, problems: Problems, key: str) -> None:
    (line,) = problems(with_methods(f"mine: [training.{key}]", "training: {max_minutes: 2}\n"))
    assert line.endswith(
        f"'training.{key}' changes training.{key.partition('=')[0]}. All students take the steps that "
        "training.max_minutes gives the first. Set it to null, with max_steps."
    )
    load(with_methods(f"mine: [training.{key}]"))


def test_no_method_and_no_search_stops_early(load: Loaded, problems: Problems) -> None:
    early = "training.early_stopping.patience"
    for lines in (
        problems(with_methods(f"mine: [{early}=1]")),
        problems(f"{BASE}compare: {{search: {{{early}: [1, 2]}}}}\n"),
    ):
        assert [line.endswith("Change it in the recipe itself, or leave it out.") for line in lines] == [True]
    recipe = load(f"{BASE}training: {{early_stopping: {{}}}}\n")
    with pytest.raises(
        RecipeError, match=re.escape("training.early_stopping: the students of a comparison would take")
    ):
        check_comparison(recipe, ["fine_tuning", "flexkd"], [0, 1], can_rotate=False)


def test_a_method_of_another_loss_leaves_the_projector_of_the_recipe_behind(load: Loaded) -> None:
    features = "{loss: projector, projector: {learning_rate: 0.01, start: cut}}"
    recipe = load(f"{BASE}objective: {{features: {features}}}")
    for method in ("cka", "gram", "cosine", "mse"):
        changed = method_recipe(recipe, method).objective.features
        assert changed is not None
        assert (changed.loss, changed.projector) == (method, None)
    plain = method_recipe(recipe, "projector").objective.features
    assert plain is not None
    assert plain.projector == recipe.objective.features.projector  # type: ignore[union-attr]


def test_every_method_has_its_line_in_the_docs() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, flags=re.M)) == sorted(METHODS)
