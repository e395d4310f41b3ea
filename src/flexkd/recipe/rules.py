"""Rules between keys of a recipe: settings that do not fit together, contradict each other or have no effect."""

import math
from collections.abc import Iterator

from flexkd.facts.metrics import LOSS, METRIC_NAMES, ROUGE, validation_names
from flexkd.facts.names import GENERATION_TASKS, SIZE_NAMES
from flexkd.facts.own_metrics import CODE_SIGN, NOT_ALLOWED, OWN_METRICS
from flexkd.recipe.model_sections import FineTune, StudentSection, TeacherSection
from flexkd.recipe.problem import RecipeProblem, problem, unknown_text
from flexkd.recipe.task_sections import DataSection, GenerationSection, TaskSection
from flexkd.recipe.training_sections import ObjectiveSection, RivalsSection, SizesSection, TrainingSection

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
    is_own = task.metric in OWN_METRICS
    if CODE_SIGN in task.metric and not is_own:
        yield problem("task.metric", f"{task.metric!r} {NOT_ALLOWED}")
    elif task.metric not in metrics and not is_own:
        text = unknown_text(f"metric of {task.problem}", task.metric, metrics)
        yield problem("task.metric", text, "task.problem")
    if task.higher_is_better is not None and task.metric in metrics:
        text = f"{str(task.higher_is_better).lower()} is said of {task.metric}, whose direction is known. Remove it."
        yield problem("task.higher_is_better", text, "task.metric")
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
    if generation.validation_rows is not None and task.metric not in (*ROUGE, *OWN_METRICS):
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
    # Earlier versions wrote the default as scores.
    if student.start != "slice" and student.chosen_by not in ("auto", "scores"):
        text = (
            f"'{student.chosen_by}' is only for start: slice, not {student.start}. Remove it, or choose what is taught "
            "with objective.features.chosen_by."
        )
        yield problem("student.chosen_by", text, "student.start")
    if student.start == "config" and student.lora is not None:
        text = "low-rank updates of random weights learn little: start: config trains all of them. Set it to null."
        yield problem("student.lora", text, "student.start")


def rival_problems(teacher: TeacherSection, rivals: RivalsSection | None) -> Iterator[RecipeProblem]:
    """Check that a section of rivals names some, each once, and that what is in few bits already is not put in int8."""
    if rivals is None:
        return
    if not rivals.int8_teacher and not rivals.models:
        yield problem("rivals", "names none. Set int8_teacher: true, list models, or remove it.")
    if len(set(rivals.models)) < len(rivals.models):
        yield problem("rivals.models", f"{list(rivals.models)} names one twice. Name each once.")
    if rivals.int8_teacher and teacher.quantization is not None:
        text = f"a teacher in {teacher.quantization} is not put in int8 again. Set it to false."
        yield problem("rivals.int8_teacher", text, "teacher.quantization")
    default = RivalsSection.model_fields["learning_rate"].default
    if rivals.learning_rate != default and not rivals.models:
        text = f"{rivals.learning_rate:g} is used by models alone, and none is named. Remove it."
        yield problem("rivals.learning_rate", text, "rivals.models")


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
        if student.vocabulary is not None and (student.start == "pretrained" or student.tokenizer is not None):
            text = (
                f"{student.vocabulary!r} chooses among the teacher's tokens, and the student brings its own. Remove it."
            )
            yield problem("student.vocabulary", text, "student.start", "student.tokenizer")
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


def early_stopping_problems(
    task: TaskSection, generation: GenerationSection | None, objective: ObjectiveSection, training: TrainingSection
) -> Iterator[RecipeProblem]:
    """Check that early stopping can end a run, and that the figure it watches is computed and keeps its meaning."""
    section, at = training.early_stopping, "training.early_stopping"
    if section is None:
        return
    steps, evaluations = training.max_steps, training.evaluations
    # Evaluations are evenly spaced: a few steps have fewer of them.
    count = evaluations if steps is None else math.ceil(steps / math.ceil(steps / evaluations))
    if count < section.patience + 2:
        waited, times = (f"{number} evaluation{'s' * (number != 1)}" for number in (section.patience, count))
        text = (
            f"{waited} without an improvement cannot end a run of {times} before its last one. Set "
            f"training.evaluations to {section.patience + 2} or more{'' if steps is None else ', with as many steps'}"
            f"{', or lower it' if section.patience > 1 else ''}."
        )
        yield problem(f"{at}.patience", text, "training.evaluations", "training.max_steps")
    answers = generation is not None and generation.validation_rows is not None
    figures = validation_names(task.problem, answers=answers)
    if task.metric in OWN_METRICS and (answers or generation is None):
        figures += (task.metric,)
    if section.metric is not None and section.metric not in figures:
        text = unknown_text("figure of the validation rows", section.metric, figures)
        if section.metric in METRIC_NAMES[task.problem]:
            text = f"{section.metric!r} is not computed on the validation rows. Watch {' or '.join(figures)}."
            text += " Answers are scored there with generation.validation_rows." if section.metric in ROUGE else ""
        yield problem(f"{at}.metric", text, "task.problem", "generation.validation_rows")
    if section.metric == LOSS and objective.features is not None and objective.features.fade is not None:
        text = "'loss' changes its meaning while objective.features.fade lowers a weight in it. Watch another figure."
        yield problem(f"{at}.metric", text, "objective.features.fade")


def unequal_steps_text(training: TrainingSection, which: str) -> str:
    """Why students that share their steps cannot stop early; empty where they do not."""
    if training.early_stopping is None:
        return ""
    return (
        f"training.early_stopping: the students {which} would take different numbers of steps. Set it to null: of each "
        "student the best checkpoint is kept either way."
    )


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


def sizes_problems(sizes: SizesSection | None, student: StudentSection) -> Iterator[RecipeProblem]:
    """Check that the sizes are two or more, that none repeats, and that students of these sizes can be cut."""
    if sizes is None:
        return
    if student.start != "slice":
        text = f"start: {student.start} takes the shape of student.model, and sizes are cut out of the teacher. "
        yield problem("sizes", f"{text}Set start: slice, or remove this section.", "student.start")
    for name, numbers in (("values", sizes.values), ("seeds", sizes.seeds)):
        if len(set(numbers)) < len(numbers):
            yield problem(f"sizes.{name}", f"{[*numbers]} names one twice. Name each once.")
    if len(sizes.values) == 1 or (not sizes.values and sizes.key != "size"):
        text = f"{[*sizes.values]} makes no curve. Give two values of student.{sizes.key} or more."
        yield problem("sizes.values", text, "sizes.key")
    for value in sizes.values:
        if sizes.key == "size" and value > 1:
            text = f"{value:g} is more than the whole teacher. Give shares of its parameters, above 0 and up to 1."
            yield problem("sizes.values", text, "sizes.key")
        if sizes.key != "size" and not value.is_integer():
            yield problem("sizes.values", f"{value:g} is no {sizes.key}. Give whole numbers.", "sizes.key")
