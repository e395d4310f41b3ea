"""Answers of models to the questions of a test, likelihoods of the references, and the metrics of both."""

import logging
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexkd.display.progress import Tracked
from flexkd.evaluate.generation import Answer, GenerationSettings, generate_answers
from flexkd.evaluate.inference import evenly_spaced
from flexkd.evaluate.likelihood import HeadStates, RowLikelihood, likelihood_metrics, likelihoods
from flexkd.evaluate.rouge import (
    RougeSettings,
    bootstrap_interval,
    dropped_note,
    rouge_means,
    rouge_scores,
    unicode_words,
)
from flexkd.facts.metrics import ROUGE
from flexkd.facts.own_metrics import own_values
from flexkd.record import AnswerExample

_log = logging.getLogger(__name__)

CUT_SHARE: Final = 0.05
"""Share of answers cut by the limit of new tokens above which a note warns."""

_MOST_EXAMPLES: Final = 6
_SENTENCE_END: Final = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))\s+(?=["'(\[]*[^\W_a-z])  # before a capital, a digit, another script
      | (?<=[\u3002\uff01\uff1f])                                     # full stops that no space follows
      | \s*\n\s*\n\s*                                                 # a new paragraph
    """,
    re.VERBOSE,
)
_ABBREVIATION: Final = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|Dr|Mr|Mrs|Ms|Prof|St|No|Fig)|\b[A-Z])\.$")


@dataclass(frozen=True)
class Question:
    """One row of a test: the text of its prompt, and every answer that counts as right."""

    id: str
    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class ModelAnswers:
    """Answers of one model, in the order of the questions.

    Attributes:
        answers: Answers by decoding seed; None for a row that the model did not answer.
        rouge: ROUGE of each answer, by decoding seed; None for a row without a reference or an answer.
        likelihood: Likelihood of the reference of each row; None where it was not measured.
    """

    answers: dict[int, tuple[Answer | None, ...]]
    rouge: dict[int, tuple[dict[str, float] | None, ...]]
    likelihood: tuple[RowLikelihood | None, ...]

    def metrics(self) -> dict[str, float | None]:
        """ROUGE (mean over decoding seeds), likelihood, share of answers cut by the limit, mean length in tokens."""
        by_seed = [rouge_means(rows) for rows in self.rouge.values()]
        metrics: dict[str, float | None] = {name: _mean([means[name] for means in by_seed]) for name in ROUGE}
        likelihoods_of_rows = [row for row in self.likelihood if row is not None]
        if likelihoods_of_rows:
            metrics |= likelihood_metrics(likelihoods_of_rows)
        answers = self.all()
        lengths = [answer.num_tokens for answer in answers if answer.num_tokens is not None]
        if lengths:
            metrics |= {
                "cut_share": _mean([float(answer.is_cut) for answer in answers]),
                "answer_tokens": _mean([float(length) for length in lengths]),
            }
        return metrics

    def all(self) -> list[Answer]:
        """The answers that there are, of all seeds."""
        return [answer for of_seed in self.answers.values() for answer in of_seed if answer is not None]

    @property
    def num_answered(self) -> int:
        """Rows that the model answered."""
        return sum(answer is not None for answer in next(iter(self.answers.values())))

    def own_metrics(self, questions: Sequence[Question], name: str) -> dict[str, float | None]:
        """The user's own metric of this name, over answered rows with a reference; empty where it is not the user's."""
        values = {}
        for seed, of_seed in self.answers.items():
            pairs = zip(questions, of_seed, strict=True)
            judged = [(list(row.references), answer.text) for row, answer in pairs if answer and row.references]
            values[seed] = own_values(name, [row for row, _ in judged], [text for _, text in judged])
        return {
            metric: _mean([of_seed[metric] for of_seed in values.values()]) for metric in next(iter(values.values()))
        }


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined else None


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[Mapping[str, Any]],
    settings: GenerationSettings,
    *,
    stop_ids: Sequence[int],
    limit: int | None = None,
    rouge: RougeSettings | None = None,
    batches: Collection[Mapping[str, Any]] = (),
    states: HeadStates | None = None,
    teacher: PreTrainedModel | HeadStates | None = None,
    vocab_size: int | None = None,
    precision: str = "float32",
    progress: str | None = None,
) -> ModelAnswers:
    """Let one model answer all questions, once for each decoding seed, and measure how likely it finds the references.

    Args:
        model: Teacher, baseline or student.
        tokenizer: The model's own.
        questions: Rows of the test.
        prompts: The encoded prompts of the same rows (`id`, `input_ids`, `attention_mask`), in the same order.
        settings: How answers are decoded.
        stop_ids: Tokens that end an answer.
        limit: Most rows that are answered, at equal distances; None: all. The likelihoods are of all rows.
        rouge: As in `rouge_scores`.
        batches: Batches of the same rows with `labels`, for the likelihoods; rows may be missing.
        states: The model's own on these batches, where they are known.
        teacher: As in `likelihoods`.
        vocab_size: As in `likelihoods`.
        precision: As in `inference`.
        progress: Names the work where its progress is shown; None: it is not.
    """
    options: dict[str, Any] = {"stop_ids": stop_ids, "precision": precision, "progress": progress}
    assert [str(prompt["id"]) for prompt in prompts] == [question.id for question in questions], "not the same rows"
    asked = evenly_spaced(prompts, len(prompts) if limit is None else limit)
    answers = {
        seed: generate_answers(model, tokenizer, asked, settings, seed=seed, **options) for seed in settings.seeds
    }
    read = batches if progress is None else Tracked(batches, f"{progress}, likelihood")
    rows = likelihoods(states or model, read, teacher=teacher, vocab_size=vocab_size, precision=precision)
    return judged_answers(questions, answers, rows, rouge)


def judged_answers(
    questions: Sequence[Question],
    answers: Mapping[int, Iterable[Answer]],
    rows: Iterable[RowLikelihood],
    rouge: RougeSettings | None = None,
) -> ModelAnswers:
    """Answers and likelihoods in the order of the questions, with the ROUGE of each answer.

    Args:
        questions: Rows of the test.
        answers: Of some or all of these rows, by decoding seed.
        rows: Likelihoods of some or all of these rows.
        rouge: As in `rouge_scores`.
    """
    likelihood_of = {row.id: row for row in rows}
    by_seed = {}
    for seed, of_seed in answers.items():
        by_id = {answer.id: answer for answer in of_seed}
        by_seed[seed] = tuple(by_id.get(question.id) for question in questions)
    of_questions = tuple(likelihood_of.get(question.id) for question in questions)
    return ModelAnswers(by_seed, _rouge(by_seed, questions, rouge), of_questions)


def baseline_answers(
    texts: Sequence[str], questions: Sequence[Question], rouge: RougeSettings | None = None
) -> ModelAnswers:
    """Answers that come from no model, such as the first sentence of each document, with the same metrics."""
    pairs = zip(questions, texts, strict=True)
    return judged_answers(
        questions, {0: [Answer(question.id, text, None, False) for question, text in pairs]}, (), rouge
    )


def first_sentence(document: str) -> str:
    """The first sentence of a document, the baseline of every summarizer; empty if there is none.

    Example:
        >>> first_sentence("A tool for e.g. Debian. It is small.")
        'A tool for e.g. Debian.'
    """
    return next(iter(sentences(document)), "")


def sentences(text: str) -> list[str]:
    """Sentences in order, each on one line; an approximation, as no list of abbreviations fits every language.

    Example:
        >>> sentences("A tool for e.g. Debian. It is small.")
        ['A tool for e.g. Debian.', 'It is small.']
    """
    lines: list[str] = []
    for part in _SENTENCE_END.split(text):
        line = " ".join(part.split())
        if lines and _ABBREVIATION.search(lines[-1]):
            lines[-1] = f"{lines[-1]} {line}"
        elif line:
            lines.append(line)
    return lines


def _rouge(
    answers: Mapping[int, Sequence[Answer | None]], questions: Sequence[Question], settings: RougeSettings | None
) -> dict[int, tuple[dict[str, float] | None, ...]]:
    return {
        # Without a reference no answer has a score.
        seed: rouge_scores(
            ["" if answer is None else answer.text for answer in of_seed],
            [() if answer is None else row.references for row, answer in zip(questions, of_seed, strict=True)],
            settings,
        )
        for seed, of_seed in answers.items()
    }


def validation_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[Mapping[str, Any]],
    settings: GenerationSettings,
    *,
    stop_ids: Sequence[int],
    rouge: RougeSettings | None = None,
    limit: int = 200,
    precision: str = "float32",
) -> tuple[list[Question], ModelAnswers]:
    """At most `limit` rows at equal distances, and the answers to them, for the selection of a checkpoint.

    Decoded with the settings of the test and the first of its seeds.
    """
    questions, prompts = evenly_spaced(questions, limit), evenly_spaced(prompts, limit)
    seed = settings.seeds[0]
    options: dict[str, Any] = {"stop_ids": stop_ids, "precision": precision}
    answers = {seed: generate_answers(model, tokenizer, prompts, settings, seed=seed, **options)}
    return list(questions), judged_answers(questions, answers, (), rouge)


def answer_notes(
    questions: Sequence[Question], models: Mapping[str, ModelAnswers], rouge: RougeSettings | None = None
) -> list[str]:
    """Notes on the metrics: characters that ROUGE ignores, cut and empty answers, spread and confidence interval.

    Logs a warning for each model of which more than 5 % of the answers were cut, and if ROUGE ignores characters.
    """
    references = (text for question in questions for text in question.references)
    dropped = dropped_note(references, rouge or RougeSettings())
    notes = [] if dropped is None else [dropped]
    for role, model in models.items():
        name = role.replace("_", " ")
        cut = model.metrics().get("cut_share") or 0.0
        if cut > CUT_SHARE:
            text = (
                f"{name}: the limit of new tokens cut {cut:.1%} of its answers, which lowers its ROUGE. Raise "
                "generation.max_new_tokens, or see whether it has learned to stop."
            )
            _log.warning(text)
            notes.append(text)
        if model.num_answered < len(questions):
            notes.append(
                f"{name}: it answered {model.num_answered} of the {len(questions):,} rows, at equal distances, which "
                "its ROUGE, its cut answers and their length are of; its likelihood is of all rows."
            )
        answers = model.all()
        empty = sum(not unicode_words(answer.text) for answer in answers)
        if empty:
            notes.append(f"{name}: {empty:,} of {len(answers):,} answers hold no word; they score 0.")
        notes += _spread(name, model)
    any_model = next(iter(models.values()))
    without_reference = sum(row is None for row in next(iter(any_model.rouge.values())))
    if without_reference:
        notes.append(f"{without_reference:,} of {len(questions):,} rows have no reference; they are in no ROUGE.")
    return notes


def _spread(name: str, model: ModelAnswers) -> list[str]:
    by_seed = [[row["rougeL"] for row in rows if row is not None] for rows in model.rouge.values()]
    if not by_seed[0]:
        return []
    by_row = [statistics.fmean(values) for values in zip(*by_seed, strict=True)]
    low, high = bootstrap_interval(by_row)
    text = f"{name}: rougeL {statistics.fmean(by_row):.4f}, 95% bootstrap interval over rows {low:.4f} to {high:.4f}"
    means = [statistics.fmean(values) for values in by_seed]
    if len(means) > 1:
        text += f"; over {len(means)} decoding seeds its standard deviation is {statistics.stdev(means):.4f}"
    return [f"{text}."]


def answer_examples(
    questions: Sequence[Question],
    models: Mapping[str, ModelAnswers],
    *,
    by: str = "student",
    limit: int = _MOST_EXAMPLES,
) -> list[AnswerExample]:
    """Rows from the worst to the best of one model by rougeL, evenly spaced in rank, so that none is hand-picked.

    Answers are those of the first decoding seed, on rows that all models answered.
    """
    answers = {name: next(iter(model.answers.values())) for name, model in models.items()}
    rouge = {
        name: [None if row is None else row["rougeL"] for row in next(iter(model.rouge.values()))]
        for name, model in models.items()
    }
    shown = [
        index for index in range(len(questions)) if all(of_model[index] is not None for of_model in answers.values())
    ]
    ranked = sorted((value, index) for index in shown if (value := rouge[by][index]) is not None)
    order = [index for _, index in ranked] or shown
    count = min(limit, len(order))
    ranks = [round(place * (len(order) - 1) / max(count - 1, 1)) for place in range(count)]
    return [
        _example(
            questions[index],
            {name: answer for name, of_model in answers.items() if (answer := of_model[index]) is not None},
            {name: of_model[index] for name, of_model in rouge.items()},
        )
        for index in (order[rank] for rank in ranks)
    ]


def _example(question: Question, answers: Mapping[str, Answer], rouge: dict[str, float | None]) -> AnswerExample:
    return AnswerExample(
        id=question.id,
        prompt=question.prompt,
        references=list(question.references),
        answers={name: answer.text for name, answer in answers.items()},
        rouge=dict(rouge),
        cut=[name for name, answer in answers.items() if answer.is_cut],
    )
