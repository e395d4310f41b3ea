"""Everything that models say to the questions of a test: their answers and likelihoods, and the metrics of both."""

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexkd.evaluate.generation import Answer, GenerationSettings, generate_answers
from flexkd.evaluate.likelihood import RowLikelihood, likelihood_metrics, likelihoods
from flexkd.evaluate.rouge import (
    RougeSettings,
    bootstrap_interval,
    dropped_note,
    rouge_means,
    rouge_scores,
    unicode_words,
)
from flexkd.facts.metrics import ROUGE
from flexkd.record import AnswerExample

_log = logging.getLogger(__name__)

CUT_SHARE: Final = 0.05
"""A note warns where the limit ends a larger share of a model's answers."""

_MOST_EXAMPLES: Final = 6


@dataclass(frozen=True)
class Question:
    """One row of a test: its prompt as the models read it, as text, and every answer that counts as right."""

    id: str
    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class ModelAnswers:
    """What one model said, in the order of the questions.

    Attributes:
        answers: By decoding seed.
        rouge: Of each answer; None for a row without a reference.
        likelihood: Of each row's reference; None where it was not asked for, or where a row has no answer.
    """

    answers: dict[int, tuple[Answer, ...]]
    rouge: dict[int, tuple[dict[str, float] | None, ...]]
    likelihood: tuple[RowLikelihood | None, ...]

    def metrics(self) -> dict[str, float | None]:
        """ROUGE (mean over decoding seeds), likelihood, share of answers that the limit cut, mean length in tokens."""
        by_seed = [rouge_means(rows) for rows in self.rouge.values()]
        found: dict[str, float | None] = {name: _mean([one[name] for one in by_seed]) for name in ROUGE}
        asked = [row for row in self.likelihood if row is not None]
        if asked:
            found |= likelihood_metrics(asked)
        answers = [answer for row in self.answers.values() for answer in row]
        lengths = [answer.num_tokens for answer in answers if answer.num_tokens is not None]
        if lengths:
            found |= {
                "cut_share": _mean([float(answer.is_cut) for answer in answers]),
                "answer_tokens": _mean([float(length) for length in lengths]),
            }
        return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[Mapping[str, Any]],
    settings: GenerationSettings,
    *,
    stop_ids: Sequence[int],
    rouge: RougeSettings | None = None,
    batches: Iterable[Mapping[str, Any]] = (),
    teacher: PreTrainedModel | None = None,
    vocab_size: int | None = None,
    precision: str = "float32",
    progress: str | None = None,
) -> ModelAnswers:
    """Ask one model all questions, once for each decoding seed, and how likely it finds the references.

    Args:
        model: Teacher, baseline or student: each under the same settings.
        tokenizer: The model's own.
        questions: In the order of the result.
        prompts: Features of the same rows (`id`, `input_ids`, `attention_mask`).
        settings: Of the run.
        stop_ids: Each ends an answer.
        rouge: As in `rouge_scores`.
        batches: The same rows with `labels`, for the likelihoods; rows may be missing.
        teacher: As in `likelihoods`.
        vocab_size: As in `likelihoods`.
        precision: As in `inference`.
        progress: What a bar in the terminal calls this; None shows none.
    """
    options: dict[str, Any] = {"stop_ids": stop_ids, "precision": precision, "progress": progress}
    assert [str(prompt["id"]) for prompt in prompts] == [question.id for question in questions], "not the same rows"
    answers = {
        seed: tuple(generate_answers(model, tokenizer, prompts, settings, seed=seed, **options))
        for seed in settings.seeds
    }
    scored = likelihoods(model, batches, teacher=teacher, vocab_size=vocab_size, precision=precision)
    by_id = {row.id: row for row in scored}
    return ModelAnswers(answers, _rouge(answers, questions, rouge), tuple(by_id.get(one.id) for one in questions))


def given_answers(
    texts: Sequence[str], questions: Sequence[Question], rouge: RougeSettings | None = None
) -> ModelAnswers:
    """Answers that no model made, such as the first sentence of each document, judged like all others."""
    answers = {0: tuple(Answer(one.id, text, None, False) for one, text in zip(questions, texts, strict=True))}
    return ModelAnswers(answers, _rouge(answers, questions, rouge), (None,) * len(questions))


def _rouge(
    answers: Mapping[int, Sequence[Answer]], questions: Sequence[Question], settings: RougeSettings | None
) -> dict[int, tuple[dict[str, float] | None, ...]]:
    references = [question.references for question in questions]
    return {
        seed: rouge_scores([answer.text for answer in row], references, settings).rows for seed, row in answers.items()
    }


def validation_metrics(
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
) -> dict[str, float | None]:
    """ROUGE and length on at most `limit` rows, evenly spread over those given: for choosing a checkpoint.

    Decoded by the settings of the test, with the first of its seeds.
    """
    count = min(limit, len(prompts))
    chosen = [index * len(prompts) // count for index in range(count)]
    rows = [questions[index] for index in chosen]
    features = [prompts[index] for index in chosen]
    seed = settings.seeds[0]
    options: dict[str, Any] = {"stop_ids": stop_ids, "precision": precision}
    answers = {seed: tuple(generate_answers(model, tokenizer, features, settings, seed=seed, **options))}
    return ModelAnswers(answers, _rouge(answers, rows, rouge), (None,) * count).metrics()


def answer_notes(
    questions: Sequence[Question], models: Mapping[str, ModelAnswers], rouge: RougeSettings | None = None
) -> list[str]:
    """What a reader of the metrics has to know: what ROUGE misses, cut and empty answers, spread and interval.

    Logs a warning for each model of which more than 5 % of the answers were cut, and where ROUGE misses characters.
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
        answers = [answer for row in model.answers.values() for answer in row]
        empty = sum(not unicode_words(answer.text) for answer in answers)
        if empty:
            notes.append(f"{name}: {empty:,} of {len(answers):,} answers hold no word; they score 0.")
        notes += _spread(name, model)
    bare = sum(row is None for row in next(iter(next(iter(models.values())).rouge.values())))
    if bare:
        notes.append(f"{bare:,} of {len(questions):,} rows have no reference; they are in no ROUGE.")
    return notes


def _spread(name: str, model: ModelAnswers) -> list[str]:
    rows = [[row["rougeL"] for row in one if row is not None] for one in model.rouge.values()]
    if not rows[0]:
        return []
    over_rows = [statistics.fmean(values) for values in zip(*rows, strict=True)]
    low, high = bootstrap_interval(over_rows)
    text = f"{name}: rougeL {statistics.fmean(over_rows):.4f}, 95% bootstrap interval over rows {low:.4f} to {high:.4f}"
    means = [statistics.fmean(values) for values in rows]
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
    """Rows from the worst to the best of one model by rougeL, evenly spaced in rank: nobody chose the good ones.

    Answers are those of the first decoding seed.
    """
    first = {name: (next(iter(one.answers.values())), next(iter(one.rouge.values()))) for name, one in models.items()}
    ranked = sorted((row["rougeL"], index) for index, row in enumerate(first[by][1]) if row is not None)
    order = [index for _, index in ranked] or list(range(len(questions)))
    count = min(limit, len(order))
    places = [round(rank * (len(order) - 1) / max(count - 1, 1)) for rank in range(count)]
    return [
        AnswerExample(
            id=questions[index].id,
            prompt=questions[index].prompt,
            references=list(questions[index].references),
            answers={name: answers[index].text for name, (answers, _) in first.items()},
            rouge={
                name: None if (row := rouge[index]) is None else row["rougeL"] for name, (_, rouge) in first.items()
            },
            cut=[name for name, (answers, _) in first.items() if answers[index].is_cut],
        )
        for index in (order[place] for place in places)
    ]
