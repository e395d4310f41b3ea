"""The model card of a student: what it is, what it can do, and three lines that run it."""

import json
import math
import re
from collections.abc import Sequence
from typing import Final

import yaml

from flexkd.facts.metrics import LOWER_IS_BETTER, metric_label
from flexkd.record import GenerationRecord, ModelRecord, RunRecord
from flexkd.report.answers import example_prompt, generation_facts
from flexkd.report.local_paths import is_hub_model, without_local_paths
from flexkd.report.rivals import rival_lines
from flexkd.report.run_view import cost_cells, definitions_text, metric_names, recipe_text
from flexkd.report.verdicts import verdict
from flexkd.report.wording import latency_text, markdown_text, model_label

_CLASSIFIES: Final = {
    "single_label": "It gives each {row} one of {count} labels: {labels}.",
    "multi_label": "It gives each {row} any number of {count} labels: {labels}.",
    "regression": "It gives each {row} a number.",
}
_WRITES: Final = {"summarization": "It writes the summary of a text."}


def model_card(record: RunRecord) -> str:
    """`README.md` of the student's folder, as the Hugging Face hub reads it; a pure function of the record.

    With one exception: a teacher whose name looks like a hub id is taken for one only if no folder has that name. It
    names no folder of the machine: of paths the last part stands there.
    """
    teacher = record.model("teacher")
    base_model = teacher.name if teacher is not None and _is_base_model(teacher.name) else None
    record = without_local_paths(record)
    parts = [
        _header(record, base_model),
        f"# {markdown_text(record.name)}",
        _summary(record),
        "## Use",
        "In this folder, or with its path or hub id in place of `.`; plain transformers, nothing else is needed:",
        _code("python", "\n".join(inference_lines(record))),
        _prompts_and_decoding(record),
        "## Results",
        _results(record),
        "## How it was made",
        f"Made by flexkd with seed {record.seed}; it minimized",
        _code("", record.objective),
        record.choices,
        _notes(record),
        "The resolved recipe:",
        _code("yaml", recipe_text(record.recipe)),
        "## Data",
        _data(record),
        "## Limits",
        _limits(record),
    ]
    card = "\n\n".join(part for part in parts if part) + "\n"
    # A lone surrogate out of the data has no UTF-8 form.
    return card.encode("utf-8", errors="replace").decode("utf-8")


def inference_lines(record: RunRecord) -> tuple[str, str, str]:
    """Three lines of Python that run the student, from inside its folder."""
    if record.generation is not None:
        return _writing_lines(record.generation)
    text = '"A text to judge."'
    if _reads_pairs(record):
        text = '{"text": "A text to judge.", "text_pair": "And the one beside it."}'
    every = ", top_k=None" if record.problem == "multi_label" else ""
    return (
        "from transformers import pipeline",
        'student = pipeline("text-classification", model=".")',
        f"print(student({text}{every}))",
    )


def _writing_lines(generation: GenerationRecord) -> tuple[str, str, str]:
    prompt = json.dumps(generation.prefix + example_prompt(generation), ensure_ascii=False)
    limit = generation.max_new_tokens
    if generation.kind == "seq2seq":
        # There is no pipeline for encoder-decoders any more.
        if generation.is_chat:
            turns = f'[{{"role": "user", "content": {prompt}}}]'
            prompt = f"tokenizer.apply_chat_template({turns}, tokenize=False, add_generation_prompt=True)"
        return (
            "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
            'student, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
            f'print(tokenizer.decode(student.generate(**tokenizer({prompt}, return_tensors="pt"), '
            f"max_new_tokens={limit})[0], skip_special_tokens=True))",
        )
    settings = generation.decoding.get("student")
    do_sample = isinstance(settings, dict) and bool(settings.get("do_sample"))
    text = f'[{{"role": "user", "content": {prompt}}}]' if generation.is_chat else prompt
    encoding = "" if generation.adds_special_tokens else ", add_special_tokens=False"
    return (
        "from transformers import pipeline",
        'student = pipeline("text-generation", model=".")',
        f"print(student({text}, max_new_tokens={limit}, do_sample={do_sample}, return_full_text=False{encoding})[0]"
        '["generated_text"])',
    )


def _reads_pairs(record: RunRecord) -> bool:
    data = record.recipe.get("data")
    return isinstance(data, dict) and bool(data.get("text_pair"))


def _reads_teacher(record: RunRecord) -> bool:
    """Whether a term of the objective read the teacher."""
    objective = record.recipe.get("objective")
    return isinstance(objective, dict) and any(objective.get(term) for term in ("logits", "features"))


def _is_base_model(name: str) -> bool:
    return "/" in name and is_hub_model(name)


def _header(record: RunRecord, base_model: str | None) -> str:
    """YAML metadata; text of the user stands in it only as values, which the YAML writer quotes."""
    header: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": _pipeline_tag(record),
        "tags": ["flexkd", "knowledge-distillation"],
        "metrics": [record.metric],
    }
    if base_model is not None:
        header["base_model"] = base_model
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _pipeline_tag(record: RunRecord) -> str:
    if record.generation is None:
        return "text-classification"
    if record.generation.kind == "causal":
        return "text-generation"
    return "summarization" if record.task == "summarization" else "text2text-generation"


def _summary(record: RunRecord) -> str:
    """What the student is, where it comes from, what it does, and how well."""
    student, teacher = record.model("student"), record.model("teacher")
    shape = "" if student is None else f", {student.num_layers} layers with hidden size {student.hidden_size}"
    source = "" if teacher is None else f", distilled from `{_inline(teacher.name)}`"
    if record.generation is not None:
        model = "language model" if record.generation.kind == "causal" else "encoder-decoder"
        does = _WRITES.get(record.task, "It answers instructions.")
        return f"A small {model}{shape}{source}. {does} {markdown_text(str(verdict(record)))}"
    labels = ", ".join(markdown_text(label) for label in record.data.labels)
    does = _CLASSIFIES[record.problem].format(
        row="pair of texts" if _reads_pairs(record) else "text", count=len(record.data.labels), labels=labels
    )
    return f"A small classifier{shape}{source}. {does} {markdown_text(str(verdict(record)))}"


def _prompts_and_decoding(record: RunRecord) -> str:
    """How prompts look and answers are decoded: the conditions under which the metrics hold."""
    if record.generation is None:
        return ""
    facts = generation_facts(record.generation)
    return "\n".join(f"- {markdown_text(name)}: {markdown_text(value)}" for name, value in facts)


def _results(record: RunRecord) -> str:
    names = metric_names(record)
    heads = [
        markdown_text(metric_label(name) + (" (lower is better)" if name in LOWER_IS_BETTER else "")) for name in names
    ]
    columns = ["", *heads, "parameters", "hidden x layers", "weights", "examples/s", "latency, ms", "peak memory"]
    rows = [columns, ["---", *["---:"] * (len(columns) - 1)], *(_row(model, names) for model in record.models)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = " ".join(text for text in (definitions_text(record), latency_text(record)) if text)
    rivals = "\n".join(f"- {markdown_text(line)}" for line in rival_lines(record))
    return "\n\n".join(part for part in (table, markdown_text(notes), rivals) if part)


def _row(model: ModelRecord, names: Sequence[str]) -> list[str]:
    values = [model.metrics.get(name) for name in names]
    metrics = ["n/a" if value is None or not math.isfinite(value) else f"{value:.4f}" for value in values]
    name = model_label(model)
    return [
        markdown_text(f"{model.role} {name}" if model.role in ("baseline", "rival") else name),
        *metrics,
        *map(markdown_text, cost_cells(model)),
    ]


def _notes(record: RunRecord) -> str:
    return "\n".join(f"- {markdown_text(note)}" for note in record.notes)


def _data(record: RunRecord) -> str:
    data = record.data
    lines = [
        f"- {markdown_text(split)}: {rows:,} rows of `{_inline(data.sources.get(split, '?'))}`"
        for split, rows in data.rows.items()
    ]
    skipped = ", ".join(f"{markdown_text(reason)}: {count:,}" for reason, count in data.skipped.items())
    cut = ", ".join(f"{markdown_text(split)}: {count:,}" for split, count in data.truncated.items())
    return "\n".join([*lines, f"- left out: {skipped or 'none'}", f"- cut at the length limit: {cut or 'none'}"])


def _limits(record: RunRecord) -> str:
    if record.problem == "generation":
        scope = "It was trained on prompts like those of the data above; on others these results may not hold."
        caution = "What it writes can be false and still sound right: read it before you use it."
    else:
        scope = "It was trained on the texts and labels of the data above; on other texts these results may not hold."
        caution = (
            "Its confidence can be off: see the calibration error above." if record.problem != "regression" else ""
        )
    limits = [
        scope,
        "It learned from its teacher, and may repeat the teacher's mistakes." if _reads_teacher(record) else "",
        caution,
        "Speed and memory were measured on: "
        + markdown_text(record.environment.get("device", "the machine of the run"))
        + ".",
    ]
    return "\n".join(f"- {limit}" for limit in limits if limit)


def _inline(text: str) -> str:
    """Text of the user for inside a code span."""
    return " ".join(text.replace("`", "'").split())


def _code(language: str, text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
