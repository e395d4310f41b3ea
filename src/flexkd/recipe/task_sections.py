"""Sections of a recipe about its task: the kind of task, the rows, and how answers are generated."""

from collections.abc import Mapping
from datetime import date as Date
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, model_validator

from flexkd.facts.metrics import METRIC_NAMES
from flexkd.facts.names import GENERATION_TASKS, SeparatorName
from flexkd.facts.own_metrics import OWN_METRICS
from flexkd.recipe.section import Problem, Section, TaskType
from flexkd.recipe.values import (
    Count,
    Encoding,
    LabelNames,
    Number,
    Positive,
    ScalarOrList,
    Seed,
    Share,
    Source,
    SourceOrShare,
    Switch,
    Text,
    Whole,
)

_Day = Annotated[Date, WithJsonSchema({"type": "string", "format": "date", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"})]
_METRICS = sorted({name for names in METRIC_NAMES.values() for name in names})
_Metric = Annotated[
    Text, WithJsonSchema({"anyOf": [{"enum": _METRICS}, {"type": "string", "pattern": "^[\\w.]+:[\\w.]+$"}]})
]


class TaskSection(Section):
    """The task, and the metric that it is evaluated by."""

    type: TaskType = "classification"
    """Kind of task: classification (also regression), instruction (answers to prompts) or summarization."""
    problem: Problem = "single_label"
    """What is predicted: single_label (one class a row), multi_label (any number of classes), regression (one number)
    or generation (text, for instruction and summarization). Default: single_label, or generation where text is
    written."""
    metric: _Metric = ""
    """Metric of the final results: one of the problem, one that was registered in Python, or module:function, code of
    your own that runs with --allow-code. Default: the first metric of the problem."""
    higher_is_better: Switch | None = None
    """Which way a metric of your own is better; null for the others. Default: true for module:function, and what was
    said when it was registered."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        problem = values.get("problem")
        if problem is None:
            problem = "generation" if values.get("type") in GENERATION_TASKS else "single_label"
        names = METRIC_NAMES.get(problem) if isinstance(problem, str) else None
        metric = values.get("metric") or (names or METRIC_NAMES["single_label"])[0]
        filled = {**values, "problem": problem, "metric": metric}
        if isinstance(metric, str) and metric in OWN_METRICS and values.get("higher_is_better") is None:
            filled["higher_is_better"] = OWN_METRICS[metric].higher_is_better
        return filled


class DataSection(Section):
    """The rows: their sources, their columns and how they are prepared."""

    train: Source
    """Training rows: a .jsonl, .json, .csv, .tsv, .txt or .parquet file, also packed (.gz, .bz2, .xz), a folder, a
    pattern (rows/*.csv), a hub id (owner/name or owner/name:config), package:IMPORT_NAME/SUB/PATH, own:NAME of
    flexkd.register_rows, or a list of these."""
    validation: SourceOrShare = 0.1
    """Rows that choose the best checkpoint: a source like `train`, or a share of the training rows between 0 and 1."""
    test: SourceOrShare = 0.1
    """Rows of the final results: a source like `train`, or a share of the training rows between 0 and 1."""
    text: Text = "text"
    """Column of the text; classification."""
    text_pair: Text | None = None
    """Column of the second text of a sentence pair; classification."""
    label: Text = "label"
    """Column of the label; classification."""
    label_names: LabelNames | None = None
    """Names of the classes in the order of their ids, or a mapping of each stored value to the name of its class; null
    takes them from the rows; classification."""
    prompt: Text = "prompt"
    """Column of the prompt; instruction."""
    context: Text | None = None
    """Column of a text that the prompt refers to, which may be empty in a row and is shortened in rows that are too
    long; instruction."""
    response: Text = "response"
    """Column of the answer, or of a list of answers: the first is taught, all are references; instruction."""
    messages: Text | None = None
    """Column of chat messages, in place of prompt, context and response; the last message is the answer;
    instruction."""
    document: Text = "document"
    """Column of the text to summarize, which is shortened in rows that are too long; summarization."""
    summary: Text = "summary"
    """Column of the summary, or of a list of summaries: the first is taught, all are references; summarization."""
    group: Text | None = None
    """Column; rows with the same value go into one split when shares are split off; instruction and summarization."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Whether prompts are written with the tokenizer's chat template: auto (if there is one), always or never."""
    date: _Day = Date(2026, 1, 1)
    """Date for chat templates that write today's date, also fixed in the student's template; a constant, so that a
    recipe gives the same prompts on every day."""
    chat_variables: dict[Text, bool | int | Text] | None = None
    """Other variables of the chat template, like {enable_thinking: false}, also fixed in the student's template."""
    markup: Literal["text", "tokens"] = "text"
    """How special tokens inside the texts of rows are read: as text or as tokens."""
    template: Text | None = None
    """Plain layout of a prompt with {prompt} and {context}, or {document}, in place of a chat template."""
    teacher_answers: Text | None = None
    """File of `flexkd generate`: students train on the teacher's answers instead of those of the rows."""
    separator: SeparatorName = "auto"
    """Sign between the fields of a .csv or .txt file: comma, semicolon, tab, pipe, none (a .csv of one column, a .txt
    of one text a line), or auto, which finds it out and refuses a file that leaves it open."""
    encoding: Encoding = "auto"
    """Encoding of text files that are not UTF-8, as Python names it: cp1252, utf-16-le; auto finds it out and refuses a
    file that leaves it open. A file that is UTF-8 is read so in any case."""
    where: dict[Text, ScalarOrList] | None = None
    """Only rows whose column has this value, or one of these values, are read."""
    max_length: Count = 128
    """Longest input in tokens, for a decoder with the answer; longer inputs are cut and counted. Default: 128, or 512
    where text is written."""
    max_answer_length: Count = 128
    """Longest answer in tokens; rows with longer answers are left out and counted. Only where text is written."""
    max_rows: Count | None = None
    """Largest number of rows used of each source; null uses all."""
    train_share: Share | None = None
    """Share of the training rows that students learn from, and their starts are calibrated on, drawn by
    student.start_seed; the teacher is fine-tuned on all. null takes all."""
    bad_rows: Literal["skip_few", "skip", "stop"] = "skip_few"
    """What to do with rows that cannot be used: skip_few (skip and count up to a tenth of a source, stop at more), skip
    (skip any number) or stop (stop at any)."""
    unlabelled: Literal["skip", "keep"] = "skip"
    """Training rows without a label: skip them, or keep them to learn from the teacher alone; classification."""


class GenerationSection(Section):
    """How answers are generated and evaluated, the same for teacher, baselines and student."""

    rows: Count | None = 200
    """Number of test rows that are answered; null answers all."""
    max_new_tokens: Count | None = None
    """Longest generated answer in tokens; null takes data.max_answer_length."""
    num_beams: Count = 1
    """Number of beams of beam search; 1 is greedy decoding."""
    do_sample: Switch = False
    """Sample tokens instead of taking the most likely one."""
    temperature: Positive = 1.0
    """Divides the logits when tokens are sampled; it has no part in the loss."""
    top_p: Share = 1.0
    """Sample from the most likely tokens that together have this probability; 1 samples from all."""
    top_k: Annotated[Whole, Field(ge=0)] = 0
    """Sample from this number of most likely tokens; 0 samples from all."""
    repetition_penalty: Positive = 1.0
    """Divides the scores of tokens that were already generated; 1 has no effect."""
    no_repeat_ngram_size: Annotated[Whole, Field(ge=0)] = 0
    """Runs of this many tokens are never generated twice; 0 allows all."""
    length_penalty: Number = 1.0
    """Exponent of the length by which the score of a beam is divided; above 0 favours longer answers."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of decoding; results are means over them. More than one needs do_sample."""
    batch_size: Count = 32
    """Number of prompts that are answered together."""
    stemmer: Switch = True
    """Compare the stems of English words in ROUGE."""
    tokenizer: Literal["latin", "unicode"] = "latin"
    """Words of ROUGE: latin (only a-z and 0-9, as in published results) or unicode (words of every script)."""
    validation_rows: Count | None = None
    """Number of validation rows that are answered at every evaluation, so that task.metric chooses the best checkpoint;
    null chooses it by the nll of all validation answers."""
    examples: Count = 6
    """Number of rows whose answers are shown side by side in the report."""
