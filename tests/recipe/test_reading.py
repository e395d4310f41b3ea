"""What is read out of YAML, what is refused, and that one run of the check tells everything."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from flexkd.errors import RecipeError
from flexkd.recipe import load_recipe
from tests.recipe.kinds import BASE, Loaded, Problems


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
    basis: directions
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
        "recipe.yaml:14: objective.features.basis: 'directions' is not what the student is cut by, so that mapping",
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
            "learning_rate: unknown key here. It belongs to teacher.fine_tune.learning_rate or "
            "objective.features.projector.learning_rate or training.learning_rate or rivals.learning_rate.",
        ),
        (
            "distil: {temprature: 4}",
            "distil: unknown key. Known here: name, output, task, data, generation, teacher, student, scores, "
            "objective, training, rivals, compare, sizes, push_to_hub.\n"
            "recipe.yaml:5: distil.temprature: unknown key. Nearest elsewhere: 'generation.temperature' or "
            "'objective.logits.temperature'.",
        ),
        (
            "compare: {xyzzy: 1}",
            "compare.xyzzy: unknown key. Known here: methods, seeds, starts, contrasts, search, trials, pruning.",
        ),
        (
            "compare: {contrasts: [[flexkd]]}",
            "compare.contrasts.0: ['flexkd'] is no pair. Write a method and its reference, as [flexkd, logit_kd].",
        ),
        ("compare: {contrasts: [[flexkd, 3]]}", "compare.contrasts.0.1: 3 is not text. Put it in quotes: '3'."),
        (
            "3: x",
            "3: unknown key. Known here: name, output, task, data, generation, teacher, student, scores, objective, ",
        ),
    ],
)
def test_L02_unknown_keys_lead_to_the_nearest_valid_one(problems: Problems, line: str, message: str) -> None:
    assert "\n".join(problems(f"{BASE}{line}\n")).startswith(f"recipe.yaml:5: {message}")


def test_L02_duplicate_keys_are_errors_at_every_depth(problems: Problems) -> None:
    lines = problems(f"{BASE}training:\n  epochs: 1\n  seed: 2\n  epochs: 3\nname: other\n")
    assert lines == [
        "recipe.yaml:8: training.epochs: appears twice, first in line 6. Keep one.",
        "recipe.yaml:9: name: appears twice, first in line 1. Keep one.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: job\ntraining:\n\tepochs: 1\n", "recipe.yaml:3: a tab in the indentation. Indent with spaces."),
        ("", "recipe.yaml:1: the file is empty. Write keys and values, as name: my-student."),
        ("# nothing\n", "recipe.yaml:1: the file is empty. Write keys and values, as name: my-student."),
        ("- name: job\n", "recipe.yaml:1: a list is at the top. Write keys and values, as name: my-student."),
        ("job\n", "recipe.yaml:1: a single value is at the top. Write keys and values, as name: my-student."),
        ("name: job\n---\nname: b\n", "recipe.yaml:2: a second document starts here. Keep one recipe in a file."),
        ("name: job\nb: [1\n", "recipe.yaml:3: not YAML: expected ',' or ']', but got '<stream end>'."),
        ("name: a: b\n", "recipe.yaml:1: not YAML: mapping values are not allowed here in 'name: a: b'."),
        ("name: !!python/object:os.system x\n", "recipe.yaml:1: not YAML: could not determine a constructor for"),
        ("name: &a {b: *a}\n", "recipe.yaml:1: not YAML: found unconstructable recursive node"),
        ("name: *.csv\n", "recipe.yaml:1: a value begins with '*', which YAML reads as a name. Put it in quotes."),
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
    result = problems("\n".join([*lines, text, f"output: {'x' * 999}\ntraining: {'y' * 999}"]))
    assert all(len(line) < 500 for line in result)
    assert any(line.startswith("recipe.yaml:14: data.where.q: [[[[...], [...], ") for line in result)


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
        "recipe.yaml:1: data.train: missing. Add it: Training rows: a .jsonl, .json, .csv, .tsv, .txt or .parquet "
        "file, also packed (.gz, .bz2, .xz), a folder, a pattern (rows/*.csv), a hub id (owner/name or "
        "owner/name:config), package:IMPORT_NAME/SUB/PATH, own:NAME of flexkd.register_rows, or a list of these.",
        "recipe.yaml:1: teacher: missing. Add it: The model that teaches.",
        "recipe.yaml:1: student: missing. Add it: The model that learns.",
    ]
