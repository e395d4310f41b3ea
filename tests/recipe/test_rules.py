"""Settings that contradict each other or lead to nothing."""

import pytest

from flexkd.errors import RecipeError
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.recipe.messages import key_fields
from tests.recipe.kinds import BASE, Loaded, Problems

PRETRAINED = ("student={start: pretrained, model: small}",)


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


@pytest.mark.parametrize(
    ("rivals", "words"),
    [
        ("{}", "rivals: names none. Set int8_teacher: true, list models, or remove it."),
        ("{models: [a, a]}", "rivals.models: ['a', 'a'] names one twice. Name each once."),
        (
            "{int8_teacher: true, learning_rate: 0.001}",
            "rivals.learning_rate: 0.001 is used by models alone, and none is named. Remove it.",
        ),
    ],
)
def test_rivals_are_named_once_and_use_their_settings(problems: Problems, rivals: str, words: str) -> None:
    assert problems(f"{BASE}rivals: {rivals}") == [f"recipe.yaml:5: {words}"]


def test_a_quantized_teacher_is_not_put_in_int8_again(problems: Problems) -> None:
    quantized = BASE.replace("teacher: {", "teacher: {quantization: 4bit, ").replace(
        "student: {hidden_size: 192, num_layers: 3}", "student: {start: pretrained, model: small}"
    )
    (line,) = problems(f"{quantized}rivals: {{int8_teacher: true}}")
    assert "rivals.int8_teacher: a teacher in 4bit is not put in int8 again. Set it to false." in line


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


def test_a_fade_that_would_leave_no_term_is_refused(problems: Problems) -> None:
    alone = "{task: {weight: 0}, logits: null, features: {fade: 0.5}}"
    assert problems(f"{BASE}objective: {alone}") == [
        "recipe.yaml:5: objective.features.fade: 0.5 leaves no term for the steps after it. Give another term a "
        "weight, or remove it."
    ]


def test_L04_plain_fine_tuning_has_to_be_asked_for(load: Loaded, problems: Problems) -> None:
    plain = "{logits: null, features: null, baseline: true}"
    assert load(f"{BASE}objective: {plain}").objective.baseline
    assert problems(f"{BASE}objective: {{baseline: true}}")[0].startswith("recipe.yaml:5: objective.baseline: true")


@pytest.mark.parametrize("temperature", ["0", "-1", "0.0"])
def test_M08_a_temperature_of_0_or_less_is_refused(problems: Problems, temperature: str) -> None:
    lines = problems(f"{BASE}objective: {{logits: {{temperature: {temperature}}}}}")
    assert lines[0].startswith(f"recipe.yaml:5: objective.logits.temperature: {temperature} must be greater than 0.")


def test_M09_decoding_and_the_loss_have_a_temperature_each(load: Loaded) -> None:
    result = [path for path in key_fields() if path[-1] == "temperature"]
    assert result == [("generation", "temperature"), ("objective", "logits", "temperature")]
    recipe = load(f"{BASE}task: {{type: instruction}}\ngeneration: {{do_sample: true, temperature: 0.7}}")
    assert recipe.objective.logits is not None
    assert recipe.objective.logits.temperature == 1.0


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
            "objective: {features: {basis: directions}}",
            "objective.features.basis: 'directions' is not what the student is cut by, so that mapping: index cannot "
            "pair them. Use mapping: matched, or basis: units.",
        ),
        (
            "objective: {features: {chosen_by: random}}",
            "objective.features.chosen_by: 'random' is not what the student is cut by, student.chosen_by: auto. Use "
            "mapping: matched, or remove it.",
        ),
        (
            "objective: {features: {basis: directions, chosen_by: activation, mapping: matched}}",
            "objective.features.chosen_by: 'activation' ranks units, and basis is directions. Use variance, or basis: "
            "units.",
        ),
        (
            "objective: {features: {loss: cka, chosen_by: lowest}}",
            "objective.features.chosen_by: 'lowest' is not used by cka, which compares whole states. Remove it.",
        ),
        (
            "objective: {features: {units: 8, coverage: 0.9}}",
            "objective.features.coverage: 0.9 beside units 8: each says how many units are taught. Keep one.",
        ),
        (
            "objective: {features: {layer_map: {1: 2}, mapping: matched}}",
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
        ("output: ''", "output: '' is empty. Run folder. Default: runs/NAME."),
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
        ("{train: a.csv, test: [0.1]}", "test"),
        ("{train: []}", "train"),
        ("{train: [a.csv, b + c.csv]}", "train"),
        ("{train: a.csv, encoding: cp9999}", "encoding"),
        ("{train: a.csv, encoding: rot13}", "encoding"),
        ("{train: a.csv, separator: colon}", "separator"),
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


def test_the_batch_of_a_fine_tuned_teacher_is_made_of_whole_passes(load: Loaded, problems: Problems) -> None:
    assert problems(BASE, "teacher.fine_tune={batch_size: 12, per_device_batch_size: 8}") == [
        "command line: teacher.fine_tune.per_device_batch_size: 8 does not divide batch_size = 12. Nearest: 4 or 6."
    ]
    recipe = load(BASE, "teacher.fine_tune={batch_size: 12, per_device_batch_size: 6}")
    assert recipe.teacher.fine_tune is not None
    assert recipe.teacher.fine_tune.per_device_batch_size == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "objective: {logits: {top_k: 8}}",
            "objective.logits.top_k: 8 is only for models that write, not single_label.",
        ),
        (
            "task: {problem: multi_label}\nobjective: {logits: {entropy_share: 0.2}}",
            "objective.logits.entropy_share: 0.2 is for outputs that are one distribution, not multi_label.",
        ),
        ("objective: {features: {loss: mse}}", "teacher.cache_storage: 'int8' is too coarse for mse"),
        ("objective: {features: {loss: projector}}", "teacher.cache_storage: 'int8' is too coarse for projector"),
        ("objective: {features: {loss: cosine}}", "teacher.cache_storage: 'int8' is too coarse for cosine"),
    ],
)
def test_what_a_cache_cannot_hold_is_refused(problems: Problems, text: str, message: str) -> None:
    base = BASE if "logits" in text else BASE.replace("teacher: {", "teacher: {cache_storage: int8, ")
    assert [line.partition(": ")[2] for line in problems(f"{base}{text}") if message in line]


def test_a_cache_is_a_word_or_a_folder_and_int8_suits_losses_without_scale(load: Loaded, problems: Problems) -> None:
    for loss in ("correlation", "cka", "cross_correlation"):
        base = BASE.replace("teacher: {", "teacher: {cache_storage: int8, cache: ./answers, ")
        assert load(f"{base}objective: {{features: {{loss: {loss}}}}}").teacher.cache == "./answers"
    assert load(BASE).teacher.cache == "auto"
    never = BASE.replace("teacher: {", "teacher: {cache_storage: int8, cache: never, ")
    assert "'int8' is not used with teacher.cache: never" in problems(never)[0]
    text = f"{BASE}task: {{type: instruction}}\nobjective: {{logits: {{top_k: 8}}}}"
    assert load(text).objective.logits.top_k == 8  # type: ignore[union-attr]


@pytest.mark.parametrize("value", ["auto", "off", 1, 64])
def test_the_size_of_chunks_is_a_word_or_a_number(load: Loaded, value: object) -> None:
    recipe = load(f"{BASE}task: {{type: summarization}}\ntraining: {{logit_chunk: {value}}}")
    assert recipe.training.logit_chunk == value


@pytest.mark.parametrize("value", ["0", "-3", "2.5", "true", "all"])
def test_another_size_of_chunks_is_refused(problems: Problems, value: str) -> None:
    lines = problems(f"{BASE}task: {{type: summarization}}\ntraining: {{logit_chunk: {value}}}")
    assert len(lines) == 1
    assert "training.logit_chunk: " in lines[0]
    assert "is no size of chunks. Give auto, off, or a number of predictions above 0." in lines[0]


def test_what_belongs_to_language_models_is_refused_for_classifiers(problems: Problems) -> None:
    lines = problems(f"{BASE}training: {{packing: true, logit_chunk: 64}}")
    assert lines == [
        "recipe.yaml:5: training.packing: classification reads each row by itself. Set it to false.",
        "recipe.yaml:5: training.logit_chunk: 64 is used where text is written, not by classification. Remove it.",
    ]


@pytest.mark.parametrize("name", FEATURE_LOSS_FACTS)
@pytest.mark.parametrize(
    ("changes", "chooses"),
    [
        # What a slice is taught is what it was cut along, at every layer, unless its units are matched anew.
        ((), False),
        (("objective.features.mapping=matched",), True),
        (("objective.features.mapping=matched", "objective.features.weight=0"), False),
        (("objective.features.mapping=matched", "objective.features.basis=tangent"), False),
        (PRETRAINED, True),
        ((*PRETRAINED, "objective.features.mapping=score"), True),
    ],
)
def test_R13_a_layer_has_to_be_scored_where_its_scores_choose_what_is_taught(
    load: Loaded, name: str, changes: tuple[str, ...], chooses: bool
) -> None:
    """It was demanded of losses and slices that read no scores of that layer."""
    refused = ""
    try:
        load(BASE, f"objective.features.loss={name}", "objective.features.layer_map={1: 2}", *changes)
    except RecipeError as error:
        refused = str(error)
    is_demanded = "scores.layer: [-1] lacks teacher layers [2] of objective.features.layer_map" in refused
    assert is_demanded is (chooses and FEATURE_LOSS_FACTS[name].pairs_units)


@pytest.mark.parametrize(
    ("settings", "begin"),
    [
        (
            "{evaluations: 1, early_stopping: {patience: 1}}",
            "training.early_stopping.patience: 1 evaluation without an improvement cannot end a run of 1 evaluation "
            "before its last one. Set training.evaluations to 3 or more.",
        ),
        ("{evaluations: 4, early_stopping: {patience: 3}}", "training.early_stopping.patience: 3 evaluations without"),
        (
            "{evaluations: 10, max_steps: 3, early_stopping: {patience: 2}}",
            "training.early_stopping.patience: 2 evaluations without an improvement cannot end a run of 3 evaluations",
        ),
        ("{early_stopping: {patience: 0}}", "training.early_stopping.patience: 0 must be at least 1."),
        ("{early_stopping: {min_delta: -0.1}}", "training.early_stopping.min_delta: -0.1 must be at least 0."),
        (
            "{early_stopping: {metric: acuracy}}",
            "training.early_stopping.metric: unknown figure of the validation rows",
        ),
        (
            "{early_stopping: {metric: mse}}",
            "training.early_stopping.metric: unknown figure of the validation rows 'mse'",
        ),
        ("{early_stopping: 3}", "training.early_stopping: 3 is no section. Write its keys below it: patience, metric,"),
    ],
)
def test_early_stopping_that_cannot_stop_or_watches_nothing_is_refused(
    problems: Problems, settings: str, begin: str
) -> None:
    (line,) = problems(f"{BASE}training: {settings}")
    assert line.startswith(f"recipe.yaml:5: {begin}")


def test_early_stopping_watches_what_is_computed_on_the_validation_rows(load: Loaded, problems: Problems) -> None:
    for metric in ("loss", "accuracy", "nll"):
        load(f"{BASE}training: {{early_stopping: {{metric: {metric}}}}}")
    text = BASE + "task: {type: summarization}\ntraining: {early_stopping: {metric: METRIC}}\n"
    load(text.replace("METRIC", "nll"))
    load(text.replace("METRIC", "rougeL") + "generation: {validation_rows: 8}\n")
    (line,) = problems(text.replace("METRIC", "rougeL"))
    assert line.endswith(
        "'rougeL' is not computed on the validation rows. Watch loss or nll. Answers are scored there with "
        "generation.validation_rows."
    )
    faded = f"{BASE}objective: {{features: {{fade: 0.5}}}}\ntraining: {{early_stopping: {{metric: METRIC}}}}\n"
    load(faded.replace("METRIC", "nll"))
    (line,) = problems(faded.replace("METRIC", "loss"))
    assert "'loss' changes its meaning while objective.features.fade lowers a weight in it." in line
