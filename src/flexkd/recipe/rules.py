"""Rules between keys of a recipe: settings that do not fit together, contradict each other or have no effect."""

from collections.abc import Iterator

from flexkd.facts.losses import (
    FEATURE_LOSS_FACTS,
    LOGIT_LOSS_FACTS,
    LOGIT_LOSSES_OF,
    TASK_LOSS_FACTS,
    TASK_LOSS_OF,
    users_of_option,
)
from flexkd.facts.metrics import METRIC_NAMES, ROUGE
from flexkd.facts.names import GENERATION_TASKS, SIZE_NAMES
from flexkd.recipe.model_sections import FineTune, ScoresSection, StudentSection, TeacherSection
from flexkd.recipe.problem import RecipeProblem, problem, unknown_text
from flexkd.recipe.task_sections import DataSection, GenerationSection, TaskSection
from flexkd.recipe.training_sections import FeaturesSection, LogitsSection, ObjectiveSection, TrainingSection

_PROMPT_KEYS = ("group", "chat", "date", "chat_variables", "markup", "template", "teacher_answers")
_COLUMNS_OF = {
    "classification": ("text", "text_pair", "label", "label_names", "unlabelled"),
    "instruction": ("prompt", "context", "response", "messages", *_PROMPT_KEYS),
    "summarization": ("document", "summary", *_PROMPT_KEYS),
}


def task_problems(task: TaskSection, data: DataSection) -> Iterator[RecipeProblem]:
    """Check that problem, metric and columns fit the task, and that shares leave training rows."""
    if (task.type in GENERATION_TASKS) != (task.problem == "generation"):
        use = "generation" if task.type in GENERATION_TASKS else "single_label, multi_label or regression"
        yield problem("task.problem", f"{task.problem!r} does not fit {task.type}. Use {use}.", "task.type")
        return
    metrics = METRIC_NAMES[task.problem]
    if task.metric not in metrics:
        text = unknown_text(f"metric of {task.problem}", task.metric, metrics)
        yield problem("task.metric", text, "task.problem")
    yield from _foreign_keys(task, data)
    if isinstance(data.validation, float) and isinstance(data.test, float) and data.validation + data.test >= 1:
        text = f"{data.test} and validation {data.validation} leave no training rows. Make their sum smaller than 1."
        yield problem("data.test", text, "data.validation")
    if task.type == "classification":
        yield from _class_columns(task, data)
    else:
        yield from _answer_columns(task, data)


def _foreign_keys(task: TaskSection, data: DataSection) -> Iterator[RecipeProblem]:
    """Refuse keys of other tasks, which would be silently ignored."""
    task_keys = _COLUMNS_OF[task.type]
    for key in dict.fromkeys(key for keys in _COLUMNS_OF.values() for key in keys):
        value = getattr(data, key)
        if key not in task_keys and value != DataSection.model_fields[key].default:
            owners = " or ".join(name for name, keys in _COLUMNS_OF.items() if key in keys)
            shown = list(value) if isinstance(value, tuple) else value
            yield problem(f"data.{key}", f"{shown!r} is used by {owners}, not by {task.type}. Remove it.", "task.type")


def _answer_columns(task: TaskSection, data: DataSection) -> Iterator[RecipeProblem]:
    is_summary = task.type == "summarization"
    names, slot = (
        (("document", "summary"), "{document}") if is_summary else (("prompt", "context", "response"), "{prompt}")
    )
    columns = {name: getattr(data, name) for name in names}
    used_names = [name for name in columns if columns[name] is not None]
    for index, name in enumerate(used_names):
        twin = next((earlier for earlier in used_names[:index] if columns[earlier] == columns[name]), None)
        if twin is not None:
            text = f"{columns[name]!r} is the column of {twin} too. Name another column."
            yield problem(f"data.{name}", text, f"data.{twin}")
    if data.template is not None:
        if slot not in data.template:
            yield problem("data.template", f"{data.template!r} has no place for {slot}. Add it.")
        if data.chat == "always":
            yield problem(
                "data.template", "given beside chat: always, which takes the tokenizer's. Keep one.", "data.chat"
            )
    if data.messages is not None and data.chat == "never":
        text = "'never' cannot write messages, whose turns only a chat template knows. Use auto, or another column."
        yield problem("data.chat", text, "data.messages")
    if data.max_answer_length >= data.max_length:
        text = f"{data.max_answer_length} leaves no room for a prompt in max_length = {data.max_length}. Lower it."
        yield problem("data.max_answer_length", text, "data.max_length")


def generation_problems(
    task: TaskSection, data: DataSection, generation: GenerationSection | None
) -> Iterator[RecipeProblem]:
    """Refuse settings of decoding that would not be used, or that make no difference."""
    if generation is None:
        return
    if task.type not in GENERATION_TASKS:
        yield problem("generation", f"{task.type} writes no text. Remove it.", "task.type")
        return
    at = "generation"
    if not generation.seeds:
        yield problem(f"{at}.seeds", "[] answers nothing. Give one seed or more.")
    if len(set(generation.seeds)) < len(generation.seeds):
        yield problem(f"{at}.seeds", f"{list(generation.seeds)} names one twice. Name each once.")
    if generation.do_sample and generation.num_beams > 1:
        text = f"{generation.num_beams} beams are searched, not sampled. Set do_sample: false, or num_beams: 1."
        yield problem(f"{at}.num_beams", text, f"{at}.do_sample")
    if not generation.do_sample:
        if len(generation.seeds) > 1:
            text = f"{list(generation.seeds)} give equal answers without sampling. Set do_sample, or keep one seed."
            yield problem(f"{at}.seeds", text, f"{at}.do_sample")
        for key, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
            value = getattr(generation, key)
            if value != neutral:
                text = f"{value:g} is used only where tokens are sampled. Set do_sample: true, or remove it."
                yield problem(f"{at}.{key}", text, f"{at}.do_sample")
    if generation.num_beams == 1 and generation.length_penalty != 1:
        text = f"{generation.length_penalty:g} is used only with beams. Set num_beams above 1, or remove it."
        yield problem(f"{at}.length_penalty", text, f"{at}.num_beams")
    if generation.validation_rows is not None and task.metric not in ROUGE:
        text = f"{generation.validation_rows} rows are answered for a metric without answers, {task.metric}. Remove it."
        yield problem(f"{at}.validation_rows", text, "task.metric")


def _class_columns(task: TaskSection, data: DataSection) -> Iterator[RecipeProblem]:
    if data.label_names is not None:
        label_names = data.label_names
        # Several stored values may be one class; a list names each class once.
        names = tuple(dict.fromkeys(label_names.values())) if isinstance(label_names, dict) else label_names
        if task.problem == "regression":
            yield problem("data.label_names", "regression has no classes to name. Remove it.", "task.problem")
        elif len(names) < 2:
            yield problem("data.label_names", f"{len(names)} class leaves no choice. Name at least two.")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            yield problem("data.label_names", f"{', '.join(map(repr, repeated))} appears twice. Name each class once.")
    if data.text == data.label:
        yield problem("data.label", f"{data.label!r} holds the text. Name the label's column.", "data.text")
    if data.text_pair in (data.text, data.label):
        text = f"{data.text_pair!r} is a column in use. Name the column of the second text, or null."
        yield problem("data.text_pair", text, "data.text", "data.label")


def models_problems(teacher: TeacherSection, student: StudentSection) -> Iterator[RecipeProblem]:
    """Check that quantized weights are only used as they are, and that basis and LoRA fit the start of the student."""
    if teacher.quantization is not None:
        if teacher.fine_tune is not None:
            text = (
                f"{teacher.quantization} weights cannot be fine-tuned. Remove teacher.fine_tune, or the quantization."
            )
            yield problem("teacher.quantization", text, "teacher.fine_tune")
        if student.start == "slice":
            text = f"{teacher.quantization} weights cannot be cut. Use student.start: pretrained or config."
            yield problem("teacher.quantization", text, "student.start")
    if student.start != "slice" and student.basis != "auto":
        text = f"{student.basis!r} is only for start: slice, not {student.start}. Remove it."
        yield problem("student.basis", text, "student.start")
    if student.start != "slice" and student.chosen_by != "scores":
        text = (
            f"'{student.chosen_by}' is only for start: slice, not {student.start}. Remove it, or choose what is taught "
            "with objective.features.chosen_by."
        )
        yield problem("student.chosen_by", text, "student.start")
    if student.chosen_by != "mixed" and student.function_share != StudentSection.model_fields["function_share"].default:
        text = f"{student.function_share:g} is used only by chosen_by: mixed, not {student.chosen_by}. Remove it."
        yield problem("student.function_share", text, "student.chosen_by")
    if student.start == "config" and student.lora is not None:
        text = "low-rank updates of random weights learn little: start: config trains all of them. Set it to null."
        yield problem("student.lora", text, "student.start")


def student_problems(student: StudentSection) -> Iterator[RecipeProblem]:
    """Check that a student has one start and one source for its shape."""
    shape = [key for key in SIZE_NAMES if getattr(student, key) is not None]
    derived = [key for key in ("size", "max_parameters") if getattr(student, key) is not None]
    if student.start == "slice":
        if student.model is not None:
            text = f"{student.model!r} is not used by start: slice. Set start: pretrained or config, or remove it."
            yield problem("student.model", text, "student.start")
        if student.tokenizer is not None:
            text = f"{student.tokenizer!r} does not fit start: slice, which keeps the teacher's tokens. Remove it."
            yield problem("student.tokenizer", text, "student.start")
    else:
        if student.model is None:
            text = f"missing, and start: {student.start} needs one. Give a folder or a hub id."
            yield problem("student.model", text, "student.start")
        # The shape of a config may still be changed, that of weights may not.
        for key in (shape if student.start == "pretrained" else []) + derived:
            value = getattr(student, key)
            text = f"{value} is not used: start: {student.start} takes the shape of student.model. Remove it."
            yield problem(f"student.{key}", text, "student.start")
        return
    if len(derived) == 2:
        text = f"{student.max_parameters} beside size {student.size}: each derives the whole shape. Keep one."
        yield problem("student.max_parameters", text, "student.size")
    for key in shape if derived else ():
        value = getattr(student, key)
        text = f"{value} beside {derived[0]}, which derives the whole shape. Keep one of the two."
        yield problem(f"student.{key}", text, f"student.{derived[0]}")
    if student.num_heads and student.num_key_value_heads and student.num_heads % student.num_key_value_heads:
        text = f"{student.num_key_value_heads} does not divide num_heads = {student.num_heads}. Take a divisor of it."
        yield problem("student.num_key_value_heads", text, "student.num_heads")


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
        if is_cut and student.chosen_by == "mixed" and features.chosen_by is None:
            text = "null takes 'mixed', which is known for the cut alone. Name another choice, as scores or variance."
            yield problem(f"{at}.chosen_by", text, *reads)
        return
    if is_cut and features.chosen_by not in (None, student.chosen_by):
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
    of units.
    """
    chooses_units = FEATURE_LOSS_FACTS[features.loss].pairs_units and features.basis == "units"
    is_taught_its_cut = student.start == "slice" and features.mapping != "matched"
    if features.weight == 0 or not chooses_units or is_taught_its_cut:
        return
    scored = scores.layer if isinstance(scores.layer, tuple) else (scores.layer,)
    missing = sorted(set(features.layer_map.values()) - set(scored))
    if missing:
        layers = sorted({*scored, *missing})
        text = f"{list(scored)} lacks teacher layers {missing} of objective.features.layer_map. Use {layers}."
        keys = ("layer_map", "loss", "basis", "mapping", "weight")
        yield problem("scores.layer", text, *(f"objective.features.{key}" for key in keys), "student.start")


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


def training_problems(task: TaskSection, teacher: TeacherSection, training: TrainingSection) -> Iterator[RecipeProblem]:
    """Check that the device batch divides the batch, and that settings of language models are used with them."""
    if task.type not in GENERATION_TASKS:
        if training.packing:
            yield problem("training.packing", f"{task.type} reads each row by itself. Set it to false.", "task.type")
        if training.logit_chunk != "auto":
            text = f"{training.logit_chunk!r} is used where text is written, not by {task.type}. Remove it."
            yield problem("training.logit_chunk", text, "task.type")
    sections: dict[str, TrainingSection | FineTune | None] = {
        "teacher.fine_tune": teacher.fine_tune,
        "training": training,
    }
    for at, section in sections.items():
        rows = None if section is None else section.per_device_batch_size
        if section is not None and rows is not None and section.batch_size % rows:
            divisors = [size for size in range(1, section.batch_size + 1) if section.batch_size % size == 0]
            near = sorted(sorted(divisors, key=lambda size: abs(size - rows))[:2])
            text = f"{rows} does not divide batch_size = {section.batch_size}. Nearest: {' or '.join(map(str, near))}."
            yield problem(f"{at}.per_device_batch_size", text, f"{at}.batch_size")
