"""Recipes: what is read, what is refused, and that one run of the check tells everything."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flexkd.core.losses import FEATURE_LOSSES
from flexkd.core.scores import ATTRIBUTIONS, CONTROLS, TARGETS
from flexkd.core.terms import LOGIT_LOSSES_OF as CORE_LOGIT_LOSSES_OF
from flexkd.errors import RecipeError
from flexkd.evaluate.classification import METRICS
from flexkd.recipe import Recipe, load_recipe, override_recipe
from flexkd.recipe.document import read_document, write_yaml
from flexkd.recipe.problems import key_fields
from flexkd.recipe.sections import LOGIT_LOSSES_OF, METRIC_NAMES

BASE = """\
name: job
data: {train: rows.csv}
teacher: {model: teachers/big}
student: {hidden_size: 192, num_layers: 3}
"""
Loaded = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """Load a recipe from text; its path in messages is recipe.yaml."""
    monkeypatch.chdir(tmp_path)

    def loaded(text: str, *overrides: str) -> Recipe:
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        return load_recipe("recipe.yaml", overrides)

    return loaded


@pytest.fixture
def problems(load: Loaded) -> Callable[..., list[str]]:
    """The lines of the error that a recipe raises."""

    def lines(text: str, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        return str(caught.value).splitlines()

    return lines


Problems = Callable[..., list[str]]


def test_defaults_are_those_of_a_plain_job(load: Loaded) -> None:
    recipe = load(BASE)
    assert recipe.output == "runs/job"
    assert (recipe.task.problem, recipe.task.metric) == ("single_label", "accuracy")
    assert (recipe.data.validation, recipe.data.test, recipe.data.max_length) == (0.1, 0.1, 128)
    assert recipe.teacher.fine_tune is None
    assert (recipe.scores.target, recipe.scores.attribution, recipe.scores.layer) == ("log_prob", "gradient", -1)
    objective = recipe.objective
    assert objective.logits is not None
    assert objective.features is not None
    assert (objective.logits.loss, objective.logits.temperature) == ("forward_kl", 2.0)
    assert (objective.features.loss, objective.features.positions) == ("correlation", "tokens")
    assert objective.features.layer_map == {-1: -1}
    assert (recipe.training.batch_size, recipe.training.learning_rate) == (32, 5e-4)
    assert recipe.compare is None


def test_a_recipe_cannot_be_changed(load: Loaded) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(BASE).training.epochs = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("text", ["1e-5", "3e4", "5e-05", "1.0e-5", '"1e-5"'])
def test_L01_numbers_are_read_as_they_look(load: Loaded, text: str) -> None:
    recipe = load(f"{BASE}training: {{learning_rate: {text}}}")
    assert recipe.training.learning_rate == float(text.strip('"'))


@pytest.mark.parametrize(
    ("text", "shown", "cure"),
    [
        ("010", "'010'", "Write 10, with no quotes, '_' or 0 in front."),
        ("12:30:00", "'12:30:00'", "Write a number, as 0.1."),
        ("1_000", "'1_000'", "Write 1000, with no quotes, '_' or 0 in front."),
        ("yes", "'yes'", "Write a number, as 0.1."),
        ("true", "true", "Write a number, as 0.1."),
        (".inf", "inf", "Write a number, as 0.1."),
        (".nan", "nan", "Write a number, as 0.1."),
        ("1e999", "inf", "Write a number, as 0.1."),
    ],
)
def test_L01_what_is_no_number_is_an_error_with_line_and_field(
    problems: Problems, text: str, shown: str, cure: str
) -> None:
    lines = problems(f"{BASE}training:\n  epochs: 1\n  learning_rate: {text}\n")
    assert lines == [f"recipe.yaml:7: training.learning_rate: {shown} is not a finite number. {cure}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("010", "'010' is not a whole number. Write 10, with no quotes, '_' or 0 in front."),
        ("12:30:00", "'12:30:00' is not a whole number. Write a number, as 32."),
        ("1_000", "'1_000' is not a whole number. Write 1000, with no quotes, '_' or 0 in front."),
        ('"32"', "'32' is not a whole number. Write 32, with no quotes, '_' or 0 in front."),
        ("3e4", "30000.0 is not a whole number. Write 30000."),
        ("1.5", "1.5 is not a whole number. Write a number, as 32."),
        ("true", "true is not a whole number. Write a number, as 32."),
        ("null", "null is not a whole number. Write a number, as 32."),
    ],
)
def test_L01_whole_numbers_are_never_guessed(problems: Problems, text: str, message: str) -> None:
    assert problems(f"{BASE}training: {{batch_size: {text}}}") == [f"recipe.yaml:5: training.batch_size: {message}"]


def test_L01_text_that_YAML_1_1_reads_as_something_else_stays_text(load: Loaded) -> None:
    recipe = load(f"{BASE}".replace("rows.csv", "rows.csv, label_names: [no, yes, 2024-01-01, 12:30:00]"))
    assert recipe.data.label_names == ("no", "yes", "2024-01-01", "12:30:00")


def test_L02_every_problem_is_told_at_once_in_order_of_place(problems: Problems) -> None:
    text = f"""\
{BASE}distil: {{temprature: 4}}
nmae: 3
objective:
  task: null
  logits:
    loss: forwrd_kl
    weight: -1
    temperature: 0
  features:
    basis: tangent
    layer_map: {{a: 1, -1: b}}
training:
  lerning_rate: 1
  temperature: 3
  hidden_size: 5
"""
    lines = problems(text)
    assert [re.sub(r": [^:]*\Z", "", line.partition(". ")[0]) for line in lines] == [
        "recipe.yaml:5: distil",
        "recipe.yaml:5: distil.temprature",
        "recipe.yaml:6: nmae",
        "recipe.yaml:8: objective.task",
        "recipe.yaml:10: objective.logits.loss",
        "recipe.yaml:11: objective.logits.weight",
        "recipe.yaml:12: objective.logits.temperature",
        "recipe.yaml:14: objective.features.mapping: 'index' does not fit basis",
        "recipe.yaml:15: objective.features.layer_map.a",
        "recipe.yaml:15: objective.features.layer_map.-1",
        "recipe.yaml:17: training.lerning_rate",
        "recipe.yaml:18: training.temperature",
        "recipe.yaml:19: training.hidden_size",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nmae: 3", "nmae: unknown key. Did you mean 'name'?"),
        ("training: {lerning_rate: 1}", "training.lerning_rate: unknown key. Did you mean 'training.learning_rate'?"),
        ("training: {hidden_size: 1}", "training.hidden_size: unknown key here. It belongs to student.hidden_size."),
        (
            "learning_rate: 1",
            "learning_rate: unknown key here. It belongs to teacher.fine_tune.learning_rate or training.learning_rate.",
        ),
        (
            "distil: {temprature: 4}",
            "distil: unknown key. Known here: name, output, task, data, teacher, student, scores, objective, "
            "training, compare.\nrecipe.yaml:5: distil.temprature: unknown key. Nearest elsewhere: "
            "'objective.logits.temperature'.",
        ),
        ("compare: {xyzzy: 1}", "compare.xyzzy: unknown key. Known here: methods, seeds, search."),
        ("3: x", "3: unknown key. Known here: name, output, task, data, teacher, student, scores, objective, "),
    ],
)
def test_L02_unknown_keys_lead_to_the_nearest_valid_one(problems: Problems, line: str, message: str) -> None:
    assert "\n".join(problems(f"{BASE}{line}\n")).startswith(f"recipe.yaml:5: {message}")


def test_L02_duplicate_keys_are_errors_at_every_depth(problems: Problems) -> None:
    lines = problems(f"{BASE}training:\n  epochs: 1\n  seed: 2\n  epochs: 3\nname: other\n")
    assert lines == [
        "recipe.yaml:8: training.epochs: stands twice, first in line 6. Keep one.",
        "recipe.yaml:9: name: stands twice, first in line 1. Keep one.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: job\ntraining:\n\tepochs: 1\n", "recipe.yaml:3: a tab in the indentation. Indent with spaces."),
        ("", "recipe.yaml:1: the file is empty. Write keys and values, as name: my-student."),
        ("# nothing\n", "recipe.yaml:1: the file is empty. Write keys and values, as name: my-student."),
        ("- name: job\n", "recipe.yaml:1: a list stands at the top. Write keys and values, as name: my-student."),
        ("job\n", "recipe.yaml:1: a single value stands at the top. Write keys and values, as name: my-student."),
        ("name: job\n---\nname: b\n", "recipe.yaml:2: a second document starts here. Keep one recipe in a file."),
        ("name: job\nb: [1\n", "recipe.yaml:3: not YAML: expected ',' or ']', but got '<stream end>'."),
        ("name: a: b\n", "recipe.yaml:1: not YAML: mapping values are not allowed here in 'name: a: b'."),
        ("name: !!python/object:os.system x\n", "recipe.yaml:1: not YAML: could not determine a constructor for"),
        ("name: &a {b: *a}\n", "recipe.yaml:1: not YAML: found unconstructable recursive node"),
        ("name: \x07\n", r"recipe.yaml:1: character '\x07' is not allowed in YAML. Remove it."),
    ],
)
def test_L02_files_that_are_no_recipe(problems: Problems, text: str, message: str) -> None:
    assert problems(text)[0].startswith(message)


def test_L02_anchors_and_merges_work_and_a_merged_key_may_be_given_again(load: Loaded) -> None:
    text = BASE.replace("{model: teachers/big}", "{model: teachers/big, fine_tune: &steps {epochs: 2, seed: 7}}")
    recipe = load(f"{text}training: {{<<: *steps, seed: 8}}", "training.epochs=5")
    assert recipe.teacher.fine_tune is not None
    assert (recipe.teacher.fine_tune.epochs, recipe.teacher.fine_tune.seed) == (2.0, 7)
    assert (recipe.training.epochs, recipe.training.seed) == (5.0, 8)


def test_a_message_stays_short_however_much_its_value_holds(problems: Problems) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 12):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    text = "\n".join([BASE.replace("train: rows.csv", "train: rows.csv, where: {q: *a11}")])
    found = problems("\n".join([*lines, text, f"output: {'x' * 999}\ntraining: {'y' * 999}"]))
    assert all(len(line) < 400 for line in found)
    assert any(line.startswith("recipe.yaml:14: data.where.q: [[[[...], [...], ") for line in found)


def test_D19_a_recipe_may_begin_with_a_byte_order_mark_and_must_be_UTF_8(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + BASE.replace("job", "caf\u00e9").encode())
    assert load_recipe(file).name == "caf\u00e9"
    file.write_bytes(BASE.encode() + "name: caf\u00e9".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml:5: byte 0xe9 is not UTF-8"):
        load_recipe(file)


def test_a_missing_file_names_the_recipes_beside_it(tmp_path: Path) -> None:
    (tmp_path / "right.yaml").touch()
    with pytest.raises(RecipeError, match=r"wrong\.yaml: no such file\. In .*: right\.yaml\."):
        load_recipe(tmp_path / "wrong.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


def test_missing_sections_and_keys_are_named_with_their_meaning(problems: Problems) -> None:
    assert problems("data: {text: body}\n") == [
        "recipe.yaml:1: name: missing. Add it: Name of the job, in the run folder, the report and the model card.",
        "recipe.yaml:1: data.train: missing. Add it: Training rows: a .jsonl, .json, .csv, .tsv or .parquet file, a "
        "folder, a hub id (owner/name or owner/name:config), or package:IMPORT_NAME/SUB/PATH.",
        "recipe.yaml:1: teacher: missing. Add it: The model that teaches.",
        "recipe.yaml:1: student: missing. Add it: The model that learns.",
    ]


@pytest.mark.parametrize(
    "terms",
    [
        "{logits: {weight: 0}, features: {weight: 0}}",
        "{logits: null, features: null}",
        "{logits: null, features: {weight: 0.0}}",
    ],
)
def test_L04_a_teacher_that_teaches_nothing_is_refused(problems: Problems, terms: str) -> None:
    lines = problems(f"{BASE}objective: {terms}")
    assert len(lines) == 1
    assert lines[0].startswith("recipe.yaml:5: objective: the teacher teaches nothing: logits and features are null or")


def test_L04_all_weights_zero_and_negative_weights_are_refused(problems: Problems) -> None:
    zero = "{task: {weight: 0}, logits: {weight: 0}, features: null, baseline: true}"
    assert problems(f"{BASE}objective: {zero}") == [
        "recipe.yaml:5: objective: all weights are 0: nothing is trained. Give a term a weight above 0."
    ]
    negative = problems(f"{BASE}objective: {{task: {{weight: -1}}, features: {{weight: -0.5}}}}")
    assert [line.partition(". ")[0] for line in negative] == [
        "recipe.yaml:5: objective.task.weight: -1 must be at least 0",
        "recipe.yaml:5: objective.features.weight: -0.5 must be at least 0",
    ]


def test_L04_plain_fine_tuning_has_to_be_asked_for(load: Loaded, problems: Problems) -> None:
    plain = "{logits: null, features: null, baseline: true}"
    assert load(f"{BASE}objective: {plain}").objective.baseline
    assert problems(f"{BASE}objective: {{baseline: true}}")[0].startswith("recipe.yaml:5: objective.baseline: true")


@pytest.mark.parametrize("temperature", ["0", "-1", "0.0"])
def test_M08_a_temperature_of_0_or_less_is_refused(problems: Problems, temperature: str) -> None:
    lines = problems(f"{BASE}objective: {{logits: {{temperature: {temperature}}}}}")
    assert lines[0].startswith(f"recipe.yaml:5: objective.logits.temperature: {temperature} must be greater than 0.")


def test_M09_the_loss_has_the_only_temperature() -> None:
    assert [path for path in key_fields() if path[-1] == "temperature"] == [("objective", "logits", "temperature")]


@pytest.mark.parametrize(
    ("problem", "metric", "message"),
    [
        ("single_label", "acuracy", "unknown metric of single_label 'acuracy'. Known: accuracy, calibration_error"),
        ("multi_label", "accuracy", "unknown metric of multi_label 'accuracy'. Known: calibration_error, macro_f1"),
        ("regression", "rougel", "unknown metric of regression 'rougel'. Known: mse, pearson, spearman."),
    ],
)
def test_A09_the_metric_is_one_that_the_problem_has(
    problems: Problems, problem: str, metric: str, message: str
) -> None:
    lines = problems(f"{BASE}task:\n  problem: {problem}\n  metric: {metric}\n")
    assert len(lines) == 1
    assert lines[0].startswith(f"recipe.yaml:7: task.metric: {message}")


@pytest.mark.parametrize("kind", ["instruction", "summarization"])
def test_tasks_of_later_versions_are_named_as_such(problems: Problems, kind: str) -> None:
    assert problems(f"{BASE}task: {{type: {kind}}}") == [
        f"recipe.yaml:5: task.type: '{kind}' is not in this version yet. Use type: classification."
    ]
    assert "unknown type 'clasification'" in problems(f"{BASE}task: {{type: clasification}}")[0]


@pytest.mark.parametrize(
    ("student", "keys"),
    [
        ("{size: 0.25, hidden_size: 8, num_heads: 2}", ["hidden_size", "num_heads"]),
        ("{size: 0.25, max_parameters: 30M}", ["max_parameters"]),
        ("{max_parameters: 30M, num_layers: 3}", ["num_layers"]),
        ("{start: pretrained}", ["model"]),
        ("{start: config}", ["model"]),
        ("{start: pretrained, model: small, hidden_size: 8}", ["hidden_size"]),
        ("{start: config, model: small, size: 0.5}", ["size"]),
        ("{model: small}", ["model"]),
        ("{tokenizer: other}", ["tokenizer"]),
        ("{num_heads: 6, num_key_value_heads: 4}", ["num_key_value_heads"]),
        ("{size: 1.5}", ["size"]),
        ("{size: 0}", ["size"]),
        ("{max_parameters: 30 million}", ["max_parameters"]),
        ("{max_parameters: 0}", ["max_parameters"]),
    ],
)
def test_a_student_has_one_start_and_one_shape(problems: Problems, student: str, keys: list[str]) -> None:
    lines = problems(BASE.replace("{hidden_size: 192, num_layers: 3}", student))
    assert [line.split(": ")[1] for line in lines] == [f"student.{key}" for key in keys]


@pytest.mark.parametrize(
    ("text", "count"), [("30M", 30_000_000), ("1.5b", 1_500_000_000), ("400 K", 400_000), ("12", 12)]
)
def test_a_number_of_parameters_may_be_short(load: Loaded, text: str, count: int) -> None:
    recipe = load(BASE.replace("{hidden_size: 192, num_layers: 3}", f"{{max_parameters: {text}}}"))
    assert recipe.student.max_parameters == count


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "training: {batch_size: 32, per_device_batch_size: 7}",
            "training.per_device_batch_size: 7 does not divide batch_size = 32. Nearest: 4 or 8.",
        ),
        (
            "objective: {features: {basis: tangent}}",
            "objective.features.mapping: 'index' does not fit basis: tangent, whose directions have no number. "
            "Use matched.",
        ),
        (
            "objective: {features: {units: 8, coverage: 0.9}}",
            "objective.features.coverage: 0.9 beside units 8: each says how many units are taught. Keep one.",
        ),
        (
            "objective: {features: {layer_map: {1: 2}}}",
            "scores.layer: [-1] lacks teacher layers [2] of objective.features.layer_map. Use [-1, 2].",
        ),
        (
            "objective: {features: {layer_map: {}}}",
            "objective.features.layer_map: {} pairs no layers. Give student layer: teacher layer, as {-1: -1}.",
        ),
        (
            "objective: {features: {loss: functional_cka, units: 4}}",
            "objective.features.units: 4 is not used by functional_cka, which selects nothing. Remove it.",
        ),
        (
            "objective: {logits: {beta: 0.5}}",
            "objective.logits.beta: 0.5 belongs to jensen_shannon, not forward_kl. Remove it.",
        ),
        (
            "objective: {logits: {alpha: 0.1}}",
            "objective.logits.alpha: 0.1 belongs to skew_kl and skew_reverse_kl, not forward_kl. Remove it.",
        ),
        ("objective: {logits: {loss: mse}}", "objective.logits.loss: 'mse' does not fit single_label. Use forward_kl"),
        ("scores: {layer: [1, 1]}", "scores.layer: [1, 1] names a layer twice. Name each layer once."),
        ("scores: {layer: -2}", "scores.layer: -2 is no layer. Give -1 (what the head reads), 1..N"),
        ("training: fast", "training: 'fast' is no section. Write its keys below it: epochs, max_steps"),
        ("training: null", "training: null is no section. Remove it to get the defaults, or write its keys below it"),
        ("training: {report_to: wandb}", "training.report_to: 'wandb' is no list. Write ['wandb']."),
        ("training: {resume: yes}", "training.resume: 'yes' is not true or false. Write one of the two."),
        ("training: {schedule: 3}", "training.schedule: 3 is not one of linear, cosine, constant. Write one of them."),
        ("output: ''", "output: '' is empty. Run folder; runs/NAME unless given."),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_or_have_no_meaning(problems: Problems, line: str, message: str) -> None:
    lines = problems(f"{BASE}{line}\n")
    assert lines[0].startswith(f"recipe.yaml:5: {message}")


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ("{train: a.csv, validation: 1.5}", "validation"),
        ("{train: a.csv, validation: 0.6, test: 0.4}", "test"),
        ("{train: a.csv, test: [b.csv]}", "test"),
        ("{train: a.csv, text: label}", "label"),
        ("{train: a.csv, text_pair: text}", "text_pair"),
        ("{train: a.csv, label_names: [good]}", "label_names"),
        ("{train: a.csv, label_names: [good, good]}", "label_names"),
        ("{train: a.csv, label_names: [0, 1]}", "label_names.0"),
        ("{train: a.csv, where: {source: {a: 1}}}", "where.source"),
        ("{train: 3}", "train"),
        ("{train: a.csv, max_rows: 0}", "max_rows"),
    ],
)
def test_data_settings_that_cannot_be(problems: Problems, data: str, key: str) -> None:
    lines = problems(BASE.replace("{train: rows.csv}", data))
    assert lines[0].split(": ")[1] == f"data.{key}"


def test_a_share_may_be_a_source_and_rows_may_be_chosen_by_any_value(load: Loaded) -> None:
    data = '{train: a.csv, validation: "0.2", test: b.csv, where: {year: [2020, 2021], good: true, kind: x}}'
    recipe = load(BASE.replace("{train: rows.csv}", data))
    assert (recipe.data.validation, recipe.data.test) == (0.2, "b.csv")
    assert recipe.data.where == {"year": [2020, 2021], "good": True, "kind": "x"}


def test_regression_gets_a_logit_loss_that_fits(load: Loaded, problems: Problems) -> None:
    recipe = load(f"{BASE}task: {{problem: regression}}")
    assert recipe.task.metric == "pearson"
    assert recipe.objective.logits is not None
    assert (recipe.objective.logits.loss, recipe.objective.logits.temperature) == ("mse", 1.0)
    lines = problems(
        f"{BASE}task: {{problem: regression}}\nobjective:\n  task: {{label_smoothing: 0.1}}\n"
        "  logits: {loss: reverse_kl}\n"
    )
    assert lines == [
        "recipe.yaml:7: objective.task.label_smoothing: 0.1 is only for single_label, not regression. Remove it.",
        "recipe.yaml:8: objective.logits.loss: 'reverse_kl' does not fit regression. Use mse.",
    ]


def test_overrides_are_yaml_values_at_dotted_keys(load: Loaded) -> None:
    recipe = load(
        f"{BASE}objective: {{logits: null}}",
        "training.learning_rate=1e-5",
        "objective.logits.weight=0.5",
        "objective.features=null",
        "teacher.fine_tune={}",
        "data.where.source=imdb",
        "scores.layer=[-1, 2]",
        "student={size: 0.5}",
    )
    assert recipe.training.learning_rate == 1e-5
    assert recipe.objective.logits is not None
    assert recipe.objective.logits.weight == 0.5
    assert recipe.objective.features is None
    assert recipe.teacher.fine_tune is not None
    assert recipe.data.where == {"source": "imdb"}
    assert recipe.scores.layer == (-1, 2)
    assert (recipe.student.size, recipe.student.hidden_size) == (0.5, None)


def test_a_layer_is_a_number_in_a_dotted_key(load: Loaded) -> None:
    recipe = load(BASE, "objective.features.layer_map.2=4", "scores.layer=4")
    assert recipe.objective.features is not None
    assert recipe.objective.features.layer_map == {2: 4}


def test_overrides_are_reported_like_the_recipe_after_it(problems: Problems) -> None:
    lines = problems(
        f"{BASE}nmae: 1",
        "training.lerning_rate=1",
        "x",
        "y=",
        "training.epochs=[",
        "training.seed=1",
        "training.seed=2",
        "name.first=3",
        "training.per_device_batch_size=7",
    )
    assert lines[0] == "recipe.yaml:5: nmae: unknown key. Did you mean 'name'?"
    assert sorted(lines[1:]) == [
        "command line: 'x' is no KEY=VALUE. Write it as training.learning_rate=1e-4.",
        "command line: name.first: the recipe holds 'job', which has no key 'first'. Give its whole value.",
        "command line: training.epochs:1: not YAML: expected the node content, but found '<stream end>' in '['. "
        "Check quotes, colons and indentation there.",
        "command line: training.lerning_rate: unknown key. Did you mean 'training.learning_rate'?",
        "command line: training.per_device_batch_size: 7 does not divide batch_size = 32. Nearest: 4 or 8.",
        "command line: training.seed: given twice. Keep one.",
        "command line: y: no value. Write y=null to leave it out.",
    ]


def test_a_rule_that_an_override_breaks_is_the_command_lines(problems: Problems) -> None:
    lines = problems(BASE, "objective.logits=null", "objective.features=null")
    assert lines[0].startswith("command line: objective: the teacher teaches nothing")


def test_values_of_a_search_are_checked_before_the_first_run(load: Loaded, problems: Problems) -> None:
    good = load(f"{BASE}compare: {{search: {{training.learning_rate: [1e-4, 5e-4]}}}}")
    assert good.compare is not None
    assert good.compare.search == {"training.learning_rate": (1e-4, 5e-4)}
    lines = problems(f"{BASE}compare:\n  search:\n    training.lr: [1]\n    training.epochs: [1, fast]\n    name: []\n")
    assert [line.partition(". ")[0] for line in lines] == [
        "recipe.yaml:7: compare.search.training.lr: unknown key",
        "recipe.yaml:8: compare.search.training.epochs: 'fast' leads to training.epochs: 'fast' is not a finite number",
        "recipe.yaml:9: compare.search.name: [] gives nothing to try",
    ]


@pytest.mark.parametrize(
    "more",
    [
        "",
        "training: {learning_rate: 1e-5, report_to: [tensorboard], max_steps: 3}",
        "scores: {layer: [-1, 2]}\nobjective: {features: {layer_map: {1: 2, -1: -1}}}",
        "task: {problem: regression}\ncompare: {search: {training.learning_rate: [1e-5]}}",
        "objective: {logits: null, features: null, baseline: true}",
    ],
)
def test_a_recipe_written_out_is_read_back_as_the_same(load: Loaded, more: str) -> None:
    recipe = load(BASE + more)
    assert load(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    "text", ["1e-5", "010", "no", "12:30:00", "null", "1_000", "2024-01-01", "true", "<<", "~", "="]
)
def test_text_that_looks_like_something_else_survives_being_written(load: Loaded, text: str) -> None:
    recipe = load(BASE.replace("rows.csv", f"rows.csv, text: '{text}'"))
    assert recipe.data.text == text
    assert load(recipe.to_yaml()).data.text == text
    assert read_document(write_yaml({text: text}), "x").value == {text: text}


def test_a_recipe_is_changed_by_overrides_and_checked_again(load: Loaded) -> None:
    recipe = load(BASE)
    changed = override_recipe(recipe, ["training.seed=3"])
    assert changed == recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": 3})})
    with pytest.raises(RecipeError, match=re.escape("command line: training.sed: unknown key.")):
        override_recipe(recipe, ["training.sed=3"])


def test_every_key_says_what_it_means() -> None:
    silent = [".".join(path) for path, field in key_fields().items() if not (field.description or "").endswith(".")]
    assert silent == []


def test_L04_rules_hold_for_recipes_made_in_python() -> None:
    values: dict[str, Any] = {"name": "job", "data": {"train": "a"}, "teacher": {"model": "b"}, "student": {}}
    assert Recipe.model_validate(values).output == "runs/job"
    with pytest.raises(ValidationError, match="objective: the teacher teaches nothing"):
        Recipe.model_validate({**values, "objective": {"logits": None, "features": None}})


def literals(path: str) -> Iterator[str]:
    from flexkd.recipe.problems import _literals

    return iter(_literals(tuple(path.split("."))))


def test_names_in_recipes_are_those_of_the_registries() -> None:
    by_problem = {
        "single_label": CORE_LOGIT_LOSSES_OF["cross_entropy"],
        "multi_label": CORE_LOGIT_LOSSES_OF["binary_cross_entropy"],
        "regression": CORE_LOGIT_LOSSES_OF["mse"],
    }
    assert {problem: set(names) for problem, names in LOGIT_LOSSES_OF.items()} == {
        problem: set(losses) for problem, losses in by_problem.items()
    }
    assert set(literals("objective.logits.loss")) == {name for names in LOGIT_LOSSES_OF.values() for name in names}
    assert set(literals("objective.features.loss")) == set(FEATURE_LOSSES)
    assert set(literals("scores.attribution")) == {*ATTRIBUTIONS, *CONTROLS}
    assert set(literals("scores.target")) == set(TARGETS)
    assert METRIC_NAMES == METRICS
