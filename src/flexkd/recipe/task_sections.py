"""Sections of what is to be learnt: the task, its rows, and how answers are written."""

from collections.abc import Mapping
from datetime import date as Date
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flexkd.facts.metrics import METRIC_NAMES
from flexkd.recipe.section import GENERATION_TASKS, Problem, Section, TaskType
from flexkd.recipe.values import (
    Count,
    LabelNames,
    Number,
    Positive,
    ScalarOrList,
    Seed,
    Share,
    SourceOrShare,
    Switch,
    Text,
    Whole,
)


class TaskSection(Section):
    """What the models must do, and how it is judged."""

    type: TaskType = "classification"
    """classification, instruction (answers to prompts) or summarization."""
    problem: Problem = "single_label"
    """single_label (one class a row), multi_label (any number of classes) or regression (one number); generation where
    text is written."""
    metric: Text = ""
    """Metric of the final figures; the first of the problem's metrics unless given."""

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
        return {**values, "problem": problem, "metric": metric}


class DataSection(Section):
    """Where the rows come from, and which of their columns count."""

    train: Text
    """Training rows: a .jsonl, .json, .csv, .tsv or .parquet file, a folder, a hub id (owner/name or
    owner/name:config), or package:IMPORT_NAME/SUB/PATH."""
    validation: SourceOrShare = 0.1
    """Rows that choose the best checkpoint: a source like `train`, or a share of the training rows."""
    test: SourceOrShare = 0.1
    """Rows of the final figures: a source like `train`, or a share of the training rows."""
    text: Text = "text"
    """Column of the text; classification."""
    text_pair: Text | None = None
    """Column of the second text of a sentence pair; classification."""
    label: Text = "label"
    """Column of the label; classification."""
    label_names: LabelNames | None = None
    """Names of the classes in the order of their ids, or a mapping of each stored value to the name of its class; taken
    from the rows unless given."""
    prompt: Text = "prompt"
    """Column of what is asked; instruction."""
    context: Text | None = None
    """Column of a text that the prompt speaks of, may be empty in a row; instruction. It is cut where a row is long."""
    response: Text = "response"
    """Column of the answer, or of a list of answers: the first is taught, all are references; instruction."""
    messages: Text | None = None
    """Column of chat messages, in place of prompt, context and response; the last one is the answer; instruction."""
    document: Text = "document"
    """Column of the text to summarize; summarization. It is cut where a row is long."""
    summary: Text = "summary"
    """Column of the summary, or of a list of summaries; summarization."""
    group: Text | None = None
    """Column whose rows of one value stay on one side when shares are split off; instruction and summarization."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Whether prompts are written with the tokenizer's chat template; auto: where it has one."""
    date: Date = Date(2026, 1, 1)
    """The day that a chat template is told which writes today's date; pinned in the student's template too. A fixed
    one, so that a recipe gives the same prompts on every day."""
    chat_variables: dict[Text, bool | int | Text] | None = None
    """What else a chat template is told, as {enable_thinking: false}; pinned in the student's template too."""
    markup: Literal["text", "tokens"] = "text"
    """How special tokens are read that stand in the texts of rows: as text, or as the tokens."""
    template: Text | None = None
    """Plain layout of a prompt with {prompt} and {context}, or {document}, in place of a chat template."""
    teacher_answers: Text | None = None
    """File of `flexkd generate`: the training rows learn the teacher's answers in place of their own."""
    where: dict[Text, ScalarOrList] | None = None
    """Keeps rows whose column has this value, or one of these values."""
    max_length: Count = 128
    """Longest input, in tokens, of a decoder the answer included; longer ones are cut and counted. 512
    unless given where text is written."""
    max_answer_length: Count = 128
    """Longest answer, in tokens; rows with longer ones are left out and counted. Where text is written."""
    max_rows: Count | None = None
    """Most rows taken of each source; all unless given."""
    bad_rows: Literal["skip_few", "skip", "stop"] = "skip_few"
    """Rows that cannot be used: skip and count them unless they are more than a tenth of a source (skip_few), skip any
    number of them (skip), or stop at the first."""
    unlabelled: Literal["skip", "keep"] = "skip"
    """Training rows without a label: skip them, or keep them to learn from the teacher alone; classification."""


class GenerationSection(Section):
    """How answers are written and judged, the same for teacher, baselines and student."""

    rows: Count | None = 200
    """Test rows that are answered; null answers all of them."""
    max_new_tokens: Count | None = None
    """Longest answer written, in tokens; data.max_answer_length unless given."""
    num_beams: Count = 1
    """Beams of the search; 1 is greedy."""
    do_sample: Switch = False
    """Draw tokens instead of taking the likeliest."""
    temperature: Positive = 1.0
    """Divides the logits when tokens are drawn; it has no part in the loss."""
    top_p: Share = 1.0
    """Draw from the likeliest tokens that hold this share of the probability."""
    top_k: Annotated[Whole, Field(ge=0)] = 0
    """Draw from so many likeliest tokens; 0: from all."""
    repetition_penalty: Positive = 1.0
    """Divides the scores of tokens that were already written; 1: none."""
    no_repeat_ngram_size: Annotated[Whole, Field(ge=0)] = 0
    """Runs of so many tokens are not written twice; 0: they may be."""
    length_penalty: Number = 1.0
    """Exponent of the length that a beam's score is divided by."""
    seeds: tuple[Seed, ...] = (0,)
    """Decoding seeds; figures are means over them. More than one needs do_sample."""
    batch_size: Count = 32
    """Prompts that are answered together."""
    stemmer: Switch = True
    """ROUGE compares stems of English words."""
    tokenizer: Literal["latin", "unicode"] = "latin"
    """Words of ROUGE: latin (a-z and 0-9 alone, as published figures have it) or unicode (words of every script)."""
    validation_rows: Count | None = None
    """Validation rows answered at every evaluation, so that task.metric chooses the best checkpoint; unless given it is
    chosen by the nll of all validation answers."""
    examples: Count = 6
    """Rows whose answers are shown side by side."""
