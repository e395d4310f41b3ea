"""The model card of a student: what it is, what it can do, and the lines that run it."""

import json
import math
import re
from collections.abc import Sequence
from typing import Final

from huggingface_hub import EvalResult, ModelCardData

from flexkd.data.sources.rows import is_hub_id
from flexkd.facts.metrics import LOWER_IS_BETTER, metric_label
from flexkd.record import GenerationRecord, ModelRecord, RunRecord
from flexkd.report.answers import DOCUMENT_SLOT, SAMPLE_DOCUMENT, example_prompt, generation_facts
from flexkd.report.local_paths import is_hub_model, without_local_paths
from flexkd.report.rivals import rival_lines
from flexkd.report.run_view import cost_cells, definitions_text, metric_names, recipe_text
from flexkd.report.verdicts import verdict
from flexkd.report.wording import (
    interval_text,
    intervals_note,
    latency_text,
    markdown_text,
    model_interval,
    model_label,
)

_CALLS: Final = {
    "causal": (
        "from transformers import pipeline",
        'student = pipeline("text-generation", model=".")',
        "print(student({prompt}, max_new_tokens={limit}, do_sample={do_sample}, return_full_text=False{options})[0]"
        '["generated_text"])',
    ),
    # There is no pipeline for encoder-decoders any more.
    "seq2seq": (
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
        'student, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
        'print(tokenizer.decode(student.generate(**tokenizer({prompt}, return_tensors="pt"), max_new_tokens={limit})'
        "[0], skip_special_tokens=True))",
    ),
}
"""Lines that load and call a student that writes; the last one has slots."""

_CLASSIFIES: Final = {
    "single_label": "It gives each {row} one of {count} labels: {labels}.",
    "multi_label": "It gives each {row} any number of {count} labels: {labels}.",
    "regression": "It gives each {row} a number.",
}
_HUB_METRICS: Final = {
    "macro_f1": "f1",
    "micro_f1": "f1",
    "subset_accuracy": "accuracy",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "rougeL": "rouge",
    "rouge1": "rouge",
    "rouge2": "rouge",
    "rougeLsum": "rouge",
}
"""What the hub calls a metric, where that is another name than ours."""
_WRITES: Final = {"summarization": "It writes the summary of a text."}


def model_card(record: RunRecord) -> str:
    """`README.md` of the student's folder, as the Hugging Face hub reads it; a pure function of the record.

    With one exception: a teacher whose name looks like a hub id is taken for one only if no folder has that name. It
    names no folder of the machine: of paths the last part stands there.
    """
    teacher = record.model("teacher")
    base_model = teacher.name if teacher is not None and _is_base_model(teacher.name) else None
    data_set, recipe = _hub_data_set(record), record.recipe
    record = without_local_paths(record)
    shortened = " Of files and folders only the names stand in it." if record.recipe != recipe else ""
    parts = [
        _header(record, base_model, data_set),
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
        f"The resolved recipe, which `flexkd check` reads.{shortened}",
        _code("yaml", recipe_text(record.recipe)),
        "## Data",
        _data(record),
        "## Limits",
        _limits(record),
    ]
    card = "\n\n".join(part for part in parts if part) + "\n"
    # A lone surrogate out of the data has no UTF-8 form.
    return card.encode("utf-8", errors="replace").decode("utf-8")


def inference_lines(record: RunRecord) -> list[str]:
    """Lines of Python that run the student, from inside its folder; long texts lose what they lost in training."""
    if record.generation is not None:
        return _writing_lines(record, record.generation)
    text = '"A text to judge."'
    if _reads_pairs(record):
        text = '{"text": "A text to judge.", "text_pair": "And the one beside it."}'
    every = ", top_k=None" if record.problem == "multi_label" else ""
    limit = _limit_of(record, "max_length")
    cut = "" if limit is None else f", truncation=True, max_length={limit}"
    return [
        "from transformers import pipeline",
        'student = pipeline("text-classification", model=".")',
        f"print(student({text}{every}{cut}))",
    ]


def _limit_of(record: RunRecord, key: str) -> int | None:
    """A limit of tokens in the section `data` of the recipe; None where it is not known."""
    data = record.recipe.get("data")
    limit = data.get(key) if isinstance(data, dict) else None
    return limit if isinstance(limit, int) else None


def _writing_lines(record: RunRecord, generation: GenerationRecord) -> list[str]:
    """Three lines, and where prompts hold documents those that cut them."""
    is_seq2seq, room = generation.kind == "seq2seq", _prompt_room(record, generation)
    cuts = room is not None and _reads_documents(record, generation)
    prompt = json.dumps(generation.prefix + example_prompt(generation, open_document=cuts), ensure_ascii=False)
    text = f'layout.replace("{DOCUMENT_SLOT}", document)' if cuts else prompt
    turns = f'[{{"role": "user", "content": {text}}}]'
    asked = turns if generation.is_chat else text
    if is_seq2seq and generation.is_chat:
        asked = f"tokenizer.apply_chat_template({turns}, tokenize=False, add_generation_prompt=True)"
    lines = _CALLS["seq2seq" if is_seq2seq else "causal"]
    settings = generation.decoding.get("student")
    call = lines[-1].format(
        prompt="prompt()" if cuts else asked,
        limit=generation.max_new_tokens,
        do_sample=isinstance(settings, dict) and bool(settings.get("do_sample")),
        options="" if generation.adds_special_tokens else ", add_special_tokens=False",
    )
    if not cuts:
        return [*lines[:-1], call]
    tokenizer = "tokenizer" if is_seq2seq else "student.tokenizer"
    options = "" if generation.adds_special_tokens else ", add_special_tokens=False"
    count = f"{tokenizer}(prompt(){options})"
    if generation.is_chat and not is_seq2seq:
        count = f"{tokenizer}.apply_chat_template(prompt(), add_generation_prompt=True, return_dict=True)"
    return [
        *lines[:-1],
        f'layout, document = {prompt}, "{SAMPLE_DOCUMENT}"',
        f"places = {tokenizer}(document, add_special_tokens=False, return_offsets_mapping=True)",
        'ends = [end for _, end in places["offset_mapping"]]',
        "",
        "",
        "def prompt():",
        f"    return {asked}",
        "",
        "",
        f"# A prompt has at most {room} tokens, as in training: of a longer one the document loses its end.",
        f'while (excess := len({count}["input_ids"]) - {room}) > 0:',
        "    ends = ends[:-excess]",
        "    document = document[: ends[-1]].rstrip()",
        call,
    ]


def _prompt_room(record: RunRecord, generation: GenerationRecord) -> int | None:
    """Longest prompt in tokens; None where it is not known."""
    longest, answer = _limit_of(record, "max_length"), _limit_of(record, "max_answer_length")
    if generation.kind == "seq2seq" or longest is None:
        return longest
    return None if answer is None else longest - answer


def _reads_documents(record: RunRecord, generation: GenerationRecord) -> bool:
    """Whether prompts hold texts that were cut where they were long."""
    if DOCUMENT_SLOT in generation.layout:
        return True
    data = record.recipe.get("data")
    return "{context}" in generation.layout and isinstance(data, dict) and bool(data.get("context"))


def _reads_pairs(record: RunRecord) -> bool:
    data = record.recipe.get("data")
    return isinstance(data, dict) and bool(data.get("text_pair"))


def _reads_teacher(record: RunRecord) -> bool:
    """Whether a term of the objective read the teacher."""
    objective = record.recipe.get("objective")
    return isinstance(objective, dict) and any(objective.get(term) for term in ("logits", "features"))


def _is_base_model(name: str) -> bool:
    return "/" in name and is_hub_model(name)


def _header(record: RunRecord, base_model: str | None, data_set: str | None) -> str:
    """Metadata as the hub reads them; text of the user stands in them only as values, which the YAML writer quotes."""
    results = _eval_results(record, data_set)
    data = ModelCardData(
        base_model=base_model,
        datasets=None if data_set is None else [data_set],
        library_name="transformers",
        pipeline_tag=_pipeline_tag(record),
        tags=["flexkd", "knowledge-distillation"],
        metrics=[_HUB_METRICS.get(record.metric, record.metric)],
        # The hub asks for a name where there are results, and for a text that is not empty.
        model_name=(" ".join(record.name.split()) or "student") if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _eval_results(record: RunRecord, data_set: str | None) -> list[EvalResult]:
    """The student's metrics that are defined, the main one first."""
    student = record.model("student")
    values = {} if student is None else {name: student.metrics.get(name) for name in metric_names(record)}
    sources, data = record.data.sources, record.recipe.get("data")
    rows = sources.get("test") or "test rows"
    if isinstance(data, dict) and isinstance(data.get("test"), float):
        rows = f"{sources.get('train', 'rows')}, {rows}"
    return [
        EvalResult(
            task_type=_pipeline_tag(record),
            dataset_type=data_set or "custom",
            dataset_name=data_set or " ".join(rows.split()),
            dataset_split="test",
            metric_type=_HUB_METRICS.get(name, name),
            metric_name=metric_label(name),
            metric_value=value,
        )
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    ]


def _hub_data_set(record: RunRecord) -> str | None:
    """The id of the data set of the test rows; None where they are not on the hub."""
    data = record.recipe.get("data")
    sources = [data.get(split) for split in ("test", "train")] if isinstance(data, dict) else []
    source = next((source for source in sources if isinstance(source, str)), "")
    return re.split(r"[:\[]", source, maxsplit=1)[0] if is_hub_id(source) else None


def _pipeline_tag(record: RunRecord) -> str:
    if record.generation is None:
        return "text-classification"
    # The hub no longer has a task of its own for encoder-decoders.
    is_summarizer = record.task == "summarization" and record.generation.kind == "seq2seq"
    return "summarization" if is_summarizer else "text-generation"


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
    rows = [_row(model, names) for model in record.models]
    if record.intervals is not None:
        columns.insert(2, "95% interval")
        for row, model in zip(rows, record.models, strict=True):
            row.insert(2, interval_text(model_interval(record, model)))
    rule = ["---", *["---:"] * (len(columns) - 1)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))
    texts = (definitions_text(record), intervals_note(record), latency_text(record))
    notes = " ".join(text for text in texts if text)
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
