"""What no single key can know: settings that contradict each other or lead to nothing."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flexkd.errors import unknown_name
from flexkd.recipe.document import KeyPath
from flexkd.recipe.sections import (
    LOGIT_LOSSES_OF,
    METRIC_NAMES,
    DataSection,
    FeaturesSection,
    LogitsSection,
    ObjectiveSection,
    ScoresSection,
    StudentSection,
    TaskSection,
    TrainingSection,
)

_SHAPE_KEYS = ("hidden_size", "num_layers", "num_heads", "num_key_value_heads", "intermediate_size")


@dataclass(frozen=True)
class RecipeProblem:
    """One thing to mend in a recipe.

    Attributes:
        path: The key that should change.
        text: What is wrong with its value, and what to do.
        reads: All keys that led to this; when one of them has a problem of its own, this one is left out.
    """

    path: KeyPath
    text: str
    reads: tuple[KeyPath, ...] = ()


class BrokenRulesError(ValueError):
    """Carries the problems through pydantic, which would shorten them to one text."""

    def __init__(self, problems: Iterable[RecipeProblem]):
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{dotted(problem.path)}: {problem.text}" for problem in self.problems))


def dotted(path: KeyPath) -> str:
    """The path as it is written on the command line, like training.report_to.0."""
    return ".".join(str(step) for step in path)


def unknown(kind: str, value: str, known: Iterable[str]) -> str:
    """`unknown_name` without its place, which is put in front later."""
    return unknown_name("", kind, value, known).removeprefix(": ")


def task_problems(task: TaskSection, data: DataSection) -> Iterator[RecipeProblem]:
    """The metric belongs to the problem, label names to classes, and columns differ."""
    known = METRIC_NAMES[task.problem]
    if task.metric not in known:
        text = unknown(f"metric of {task.problem}", task.metric, known)
        yield _problem("task.metric", text, "task.problem")
    if data.label_names is not None:
        if task.problem == "regression":
            yield _problem("data.label_names", "regression has no classes to name. Remove it.", "task.problem")
        elif len(data.label_names) < 2:
            yield _problem("data.label_names", f"{len(data.label_names)} class leaves no choice. Name at least two.")
        repeated = sorted({name for name in data.label_names if data.label_names.count(name) > 1})
        if repeated:
            yield _problem("data.label_names", f"{', '.join(map(repr, repeated))} stands twice. Name each class once.")
    if data.text == data.label:
        yield _problem("data.label", f"{data.label!r} holds the text. Name the label's column.", "data.text")
    if data.text_pair in (data.text, data.label):
        text = f"{data.text_pair!r} is a column in use. Name the column of the second text, or null."
        yield _problem("data.text_pair", text, "data.text", "data.label")
    if isinstance(data.validation, float) and isinstance(data.test, float) and data.validation + data.test >= 1:
        text = f"{data.test} and validation {data.validation} leave no training rows. Make their sum smaller than 1."
        yield _problem("data.test", text, "data.validation")


def student_problems(student: StudentSection) -> Iterator[RecipeProblem]:
    """A student has one start and one source of its shape."""
    shape = [key for key in _SHAPE_KEYS if getattr(student, key) is not None]
    derived = [key for key in ("size", "max_parameters") if getattr(student, key) is not None]
    if student.start == "slice":
        if student.model is not None:
            text = f"{student.model!r} is not used by start: slice. Set start: pretrained or config, or remove it."
            yield _problem("student.model", text, "student.start")
        if student.tokenizer is not None:
            text = f"{student.tokenizer!r} does not fit start: slice, which keeps the teacher's tokens. Remove it."
            yield _problem("student.tokenizer", text, "student.start")
    else:
        if student.model is None:
            text = f"missing, and start: {student.start} needs one. Give a folder or a hub id."
            yield _problem("student.model", text, "student.start")
        # A config is a shape that may still change; weights have the one they have.
        for key in (shape if student.start == "pretrained" else []) + derived:
            value = getattr(student, key)
            text = f"{value} is not used: start: {student.start} takes the shape of student.model. Remove it."
            yield _problem(f"student.{key}", text, "student.start")
        return
    if len(derived) == 2:
        text = f"{student.max_parameters} beside size {student.size}: each derives the whole shape. Keep one."
        yield _problem("student.max_parameters", text, "student.size")
    for key in shape if derived else ():
        value = getattr(student, key)
        text = f"{value} beside {derived[0]}, which derives the whole shape. Keep one of the two."
        yield _problem(f"student.{key}", text, f"student.{derived[0]}")
    if student.num_heads and student.num_key_value_heads and student.num_heads % student.num_key_value_heads:
        text = f"{student.num_key_value_heads} does not divide num_heads = {student.num_heads}. Take a divisor of it."
        yield _problem("student.num_key_value_heads", text, "student.num_heads")


def objective_problems(
    task: TaskSection, scores: ScoresSection, objective: ObjectiveSection
) -> Iterator[RecipeProblem]:
    """A teacher teaches, and each term fits the problem."""
    logits, features = objective.logits, objective.features
    teaches = (logits is not None and logits.weight > 0) or (features is not None and features.weight > 0)
    terms = ("logits", "features", "task")
    reads = (*(f"objective.{term}.weight" for term in terms), "objective.baseline")
    if objective.task.weight == 0 and not teaches:
        yield _problem("objective", "all weights are 0: nothing is trained. Give a term a weight above 0.", *reads)
    elif not teaches and not objective.baseline:
        text = (
            "the teacher teaches nothing: logits and features are null or have weight 0. Give one of them a weight "
            "above 0, or set objective.baseline: true for plain fine-tuning."
        )
        yield _problem("objective", text, *reads)
    if objective.baseline and teaches:
        text = "true means plain fine-tuning, but logits or features have a weight. Set both to null, or remove it."
        yield _problem("objective.baseline", text, *reads)
    if objective.task.label_smoothing and task.problem != "single_label":
        text = f"{objective.task.label_smoothing} is only for single_label, not {task.problem}. Remove it."
        yield _problem("objective.task.label_smoothing", text, "task.problem")
    if logits is not None:
        yield from _logits_problems(task, logits)
    if features is not None:
        yield from _features_problems(features, scores)


def _logits_problems(task: TaskSection, logits: LogitsSection) -> Iterator[RecipeProblem]:
    loss = "objective.logits.loss"
    fitting = LOGIT_LOSSES_OF[task.problem]
    if logits.loss not in fitting:
        text = f"{logits.loss!r} does not fit {task.problem}. Use {' or '.join(fitting)}."
        yield _problem(loss, text, "task.problem")
    if logits.loss == "mse" and logits.temperature != 1:
        text = f"{logits.temperature} is not used by mse. Remove it."
        yield _problem("objective.logits.temperature", text, loss)
    if logits.beta is not None and logits.loss != "jensen_shannon":
        text = f"{logits.beta} belongs to jensen_shannon, not {logits.loss}. Remove it."
        yield _problem("objective.logits.beta", text, loss)
    if logits.alpha is not None and logits.loss not in ("skew_kl", "skew_reverse_kl"):
        text = f"{logits.alpha} belongs to skew_kl and skew_reverse_kl, not {logits.loss}. Remove it."
        yield _problem("objective.logits.alpha", text, loss)


def _features_problems(features: FeaturesSection, scores: ScoresSection) -> Iterator[RecipeProblem]:
    at = "objective.features"
    if features.units is not None and features.coverage is not None:
        text = f"{features.coverage} beside units {features.units}: each says how many units are taught. Keep one."
        yield _problem(f"{at}.coverage", text, f"{at}.units")
    if features.basis == "tangent" and features.mapping != "matched":
        text = f"{features.mapping!r} does not fit basis: tangent, whose directions have no number. Use matched."
        yield _problem(f"{at}.mapping", text, f"{at}.basis")
    if not features.layer_map:
        yield _problem(f"{at}.layer_map", "{} pairs no layers. Give student layer: teacher layer, as {-1: -1}.")
    if features.loss == "functional_cka":
        for key in ("units", "coverage"):
            if getattr(features, key) is not None:
                text = f"{getattr(features, key)} is not used by functional_cka, which selects nothing. Remove it."
                yield _problem(f"{at}.{key}", text, f"{at}.loss")
        if features.basis == "tangent":
            text = "'tangent' is not used by functional_cka, which weighs all directions. Remove it."
            yield _problem(f"{at}.basis", text, f"{at}.loss")
    elif features.basis == "units":
        scored = scores.layer if isinstance(scores.layer, tuple) else (scores.layer,)
        missing = sorted(set(features.layer_map.values()) - set(scored))
        if missing:
            wanted = sorted({*scored, *missing})
            text = f"{list(scored)} lacks teacher layers {missing} of objective.features.layer_map. Use {wanted}."
            yield _problem("scores.layer", text, f"{at}.layer_map", f"{at}.loss", f"{at}.basis")


def training_problems(training: TrainingSection) -> Iterator[RecipeProblem]:
    """The global batch is made of whole passes."""
    rows = training.per_device_batch_size
    if rows is not None and training.batch_size % rows:
        divisors = [size for size in range(1, training.batch_size + 1) if training.batch_size % size == 0]
        near = sorted(sorted(divisors, key=lambda size: abs(size - rows))[:2])
        text = f"{rows} does not divide batch_size = {training.batch_size}. Nearest: {' or '.join(map(str, near))}."
        yield _problem("training.per_device_batch_size", text, "training.batch_size")


def _problem(path: str, text: str, *reads: str) -> RecipeProblem:
    return RecipeProblem(_split(path), text, (_split(path), *(_split(read) for read in reads)))


def _split(path: str) -> KeyPath:
    return tuple(path.split("."))
