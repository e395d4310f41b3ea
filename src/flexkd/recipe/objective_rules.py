"""Rules between keys of a recipe about its objective: what is taught, and whether each term fits the problem."""

from collections.abc import Iterator

from flexkd.facts.losses import (
    FEATURE_LOSS_FACTS,
    LOGIT_LOSS_FACTS,
    LOGIT_LOSSES_OF,
    TASK_LOSS_FACTS,
    TASK_LOSS_OF,
    users_of_option,
)
from flexkd.facts.names import ALL_LAYERS, GENERATION_TASKS
from flexkd.recipe.model_sections import ScoresSection, StudentSection, TeacherSection
from flexkd.recipe.problem import RecipeProblem, problem
from flexkd.recipe.task_sections import TaskSection
from flexkd.recipe.training_sections import FeaturesSection, LogitsSection, ObjectiveSection


def objective_problems(
    task: TaskSection, student: StudentSection, scores: ScoresSection, objective: ObjectiveSection
) -> Iterator[RecipeProblem]:
    """Check that something is taught, and that each term fits the problem."""
    logits, features = objective.logits, objective.features
    teaches = (logits is not None and logits.weight > 0) or (features is not None and features.weight > 0)
    terms = ("logits", "features", "task")
    reads = (*(f"objective.{term}.weight" for term in terms), "objective.baseline")
    if objective.task.weight == 0 and not teaches:
        yield problem("objective", "all weights are 0: nothing is trained. Give a term a weight above 0.", *reads)
    elif not teaches and not objective.baseline:
        text = (
            "the teacher teaches nothing: logits and features are null or have weight 0. Give one of them a weight "
            "above 0, or set objective.baseline: true for plain fine-tuning."
        )
        yield problem("objective", text, *reads)
    if objective.baseline and teaches:
        text = "true means plain fine-tuning, but logits or features have a weight. Set both to null, or remove it."
        yield problem("objective.baseline", text, *reads)
    if objective.task.label_smoothing and not TASK_LOSS_FACTS[TASK_LOSS_OF[task.problem]].is_distribution:
        text = f"{objective.task.label_smoothing} is only for single_label, not {task.problem}. Remove it."
        yield problem("objective.task.label_smoothing", text, "task.problem")
    if logits is not None:
        yield from _logits_problems(task, logits)
    if features is not None:
        is_alone = objective.task.weight == 0 and (logits is None or logits.weight == 0)
        if features.fade is not None and features.weight > 0 and is_alone:
            text = f"{features.fade} leaves no term for the steps after it. Give another term a weight, or remove it."
            yield problem("objective.features.fade", text, *reads)
        yield from _features_problems(features)
        yield from _projector_problems(task, student, features)
        yield from _choice_problems(task, student, features)
        yield from _heads_problems(task, features)
        yield from _scored_layers_problems(student, scores, features)
    if student.chosen_by == "mixed" and not _may_be_cut_along_directions(task, student):
        text = "'mixed' adds up what directions hold, and this student is cut along units. Set student.basis: rotated."
        yield problem("student.chosen_by", text, "student.basis")
    may_mix = student.chosen_by in ("auto", "mixed") and _may_be_cut_along_directions(task, student)
    if student.function_share != StudentSection.model_fields["function_share"].default and not may_mix:
        text = f"{student.function_share:g} is used only by a mixed cut along directions. Remove it."
        yield problem("student.function_share", text, "student.chosen_by", "student.basis")


def _logits_problems(task: TaskSection, logits: LogitsSection) -> Iterator[RecipeProblem]:
    loss = "objective.logits.loss"
    fitting = LOGIT_LOSSES_OF[task.problem]
    if logits.loss not in fitting:
        text = f"{logits.loss!r} does not fit {task.problem}. Use {' or '.join(fitting)}."
        yield problem(loss, text, "task.problem")
    facts = LOGIT_LOSS_FACTS[logits.loss]
    if facts.temperature_exponent == 0 and logits.temperature != 1:
        text = f"{logits.temperature} is not used by {logits.loss}. Remove it."
        yield problem("objective.logits.temperature", text, loss)
    if logits.top_k is not None and task.problem != "generation":
        text = f"{logits.top_k} is only for models that write, not {task.problem}. Remove it."
        yield problem("objective.logits.top_k", text, "task.problem")
    if logits.entropy_share is not None and not TASK_LOSS_FACTS[TASK_LOSS_OF[task.problem]].is_distribution:
        text = f"{logits.entropy_share} is for outputs that are one distribution, not {task.problem}. Remove it."
        yield problem("objective.logits.entropy_share", text, "task.problem")
    for option in ("beta", "alpha"):
        value = getattr(logits, option)
        if value is not None and option not in facts.options:
            text = f"{value} belongs to {' and '.join(users_of_option(option))}, not {logits.loss}. Remove it."
            yield problem(f"objective.logits.{option}", text, loss)


def _features_problems(features: FeaturesSection) -> Iterator[RecipeProblem]:
    at = "objective.features"
    if features.units is not None and features.coverage is not None:
        text = f"{features.coverage} beside units {features.units}: each says how many units are taught. Keep one."
        yield problem(f"{at}.coverage", text, f"{at}.units")
    if not features.layer_map:
        yield problem(f"{at}.layer_map", "{} pairs no layers. Give student layer: teacher layer, as {-1: -1}.")
    if FEATURE_LOSS_FACTS[features.loss].needs_geometry:
        for key in ("units", "coverage"):
            if getattr(features, key) is not None:
                text = f"{getattr(features, key)} is not used by {features.loss}, which selects nothing. Remove it."
                yield problem(f"{at}.{key}", text, f"{at}.loss")


def _may_be_cut_along_directions(task: TaskSection, student: StudentSection) -> bool:
    """Whether the student is cut along directions if its teacher can be rotated."""
    by_default = student.basis == "auto" and task.type in GENERATION_TASKS
    return student.start == "slice" and (student.basis == "rotated" or by_default)


def _choice_problems(task: TaskSection, student: StudentSection, features: FeaturesSection) -> Iterator[RecipeProblem]:
    """Check that what is taught can be paired with the student: it is what the student was cut by, or is matched."""
    at = "objective.features"
    if not FEATURE_LOSS_FACTS[features.loss].pairs_units:
        unread = {"basis": features.basis == "directions", "chosen_by": features.chosen_by is not None}
        for key in (key for key, is_set in unread.items() if is_set):
            text = f"'{getattr(features, key)}' is not used by {features.loss}, which compares whole states. Remove it."
            yield problem(f"{at}.{key}", text, f"{at}.loss")
        return
    is_cut = student.start == "slice"
    reads = (f"{at}.mapping", "student.start", "student.chosen_by", "student.basis", "task.type")
    if features.mapping == "matched":
        if features.basis == "directions" and features.chosen_by == "activation":
            text = "'activation' ranks units, and basis is directions. Use variance, or basis: units."
            yield problem(f"{at}.chosen_by", text, f"{at}.basis")
        return
    chosen_by = student.chosen_by
    if chosen_by == "auto" and not _may_be_cut_along_directions(task, student):
        chosen_by = "scores"
    if is_cut and features.chosen_by not in (None, chosen_by):
        text = (
            f"'{features.chosen_by}' is not what the student is cut by, student.chosen_by: {student.chosen_by}. Use "
            "mapping: matched, or remove it."
        )
        yield problem(f"{at}.chosen_by", text, *reads)
    if features.basis == "directions" and not _may_be_cut_along_directions(task, student):
        text = f"'directions' is not what the student is cut by, so that mapping: {features.mapping} cannot pair them. "
        yield problem(f"{at}.basis", f"{text}Use mapping: matched, or basis: units.", *reads)


def _projector_problems(
    task: TaskSection, student: StudentSection, features: FeaturesSection
) -> Iterator[RecipeProblem]:
    """Check that there is a projector to set up, and that what it begins with exists."""
    at, projector = "objective.features.projector", features.projector
    if projector is None:
        return
    if not FEATURE_LOSS_FACTS[features.loss].needs_projector:
        yield problem(at, f"{features.loss} has no projector. Set it to null.", "objective.features.loss")
    if projector.start == "cut" and student.start != "slice":
        text = f"'cut' needs a student that is cut from its teacher, not start: {student.start}. Use random."
        yield problem(f"{at}.start", text, "student.start")
    if projector.start == "heads" and task.type not in GENERATION_TASKS:
        text = f"'heads' needs heads with an output for each token, not those of {task.type}. Use cut or random."
        yield problem(f"{at}.start", text, "task.type")
    if projector.start == "heads" and set(features.layer_map.items()) - {(-1, -1)}:
        text = "'heads' maps the states that the heads read, {-1: -1}, and layer_map names others. Use cut or random."
        yield problem(f"{at}.start", text, "objective.features.layer_map")


def _heads_problems(task: TaskSection, features: FeaturesSection) -> Iterator[RecipeProblem]:
    """Check that a loss which reads states with the models' heads has such heads, and states that they do not read."""
    if not FEATURE_LOSS_FACTS[features.loss].needs_heads:
        return
    at = "objective.features"
    if task.type not in GENERATION_TASKS:
        text = f"{features.loss!r} reads states with a head over tokens, and {task.type} has none. Use another loss."
        yield problem(f"{at}.loss", text, "task.type")
    elif set(features.layer_map.items()) <= {(-1, -1)}:
        text = (
            f"{dict(features.layer_map)} names the states that the heads read, whose predictions the logit term "
            f"compares. Name blocks for {features.loss}, as {{1: 2, 2: 4}}."
        )
        yield problem(f"{at}.layer_map", text, f"{at}.loss")


def _scored_layers_problems(
    student: StudentSection, scores: ScoresSection, features: FeaturesSection
) -> Iterator[RecipeProblem]:
    """Check that a layer is scored where its scores choose the units that are taught.

    A slice without matching is taught what it was cut along, at every layer; other losses and directions read no scores
    of units. Which of the two `basis: auto` is, the teacher decides: its check is `preflight.objective`'s.
    """
    chooses_units = FEATURE_LOSS_FACTS[features.loss].pairs_units and features.basis == "units"
    is_taught_its_cut = student.start == "slice" and features.mapping != "matched"
    if features.weight == 0 or not chooses_units or is_taught_its_cut:
        return
    text = unscored_layers_text(scores, features)
    if text:
        keys = ("layer_map", "loss", "basis", "mapping", "weight")
        yield problem("scores.layer", text, *(f"objective.features.{key}" for key in keys), "student.start")


def unscored_layers_text(scores: ScoresSection, features: FeaturesSection) -> str:
    """What `scores.layer` lacks of the teacher layers whose units are taught by their scores; empty where nothing."""
    if scores.layer == ALL_LAYERS:
        return ""
    scored = scores.layers
    missing = sorted(set(features.layer_map.values()) - set(scored))
    if not missing:
        return ""
    layers = sorted({*scored, *missing})
    return f"{list(scored)} lacks teacher layers {missing} of objective.features.layer_map. Use {layers}."


def cache_problems(teacher: TeacherSection, objective: ObjectiveSection) -> Iterator[RecipeProblem]:
    """Check that int8, which rounds each unit to 255 steps of its range, is used with losses that allow it."""
    at, features = "teacher.cache_storage", objective.features
    if teacher.cache_storage != "int8":
        return
    if teacher.cache == "never":
        yield problem(at, "'int8' is not used with teacher.cache: never. Remove one of the two.", "teacher.cache")
    if features is not None and features.weight > 0 and not FEATURE_LOSS_FACTS[features.loss].fits_int8:
        text = f"'int8' is too coarse for {features.loss}, which small units move little. Use float16."
        yield problem(at, text, "objective.features.loss", "objective.features.weight")
