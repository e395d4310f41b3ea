"""Answers on disk, one line a row, from which every reported number can be recomputed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexkd.data.sources.json_lines import read_lines, write_lines
from flexkd.errors import ArtifactError
from flexkd.evaluate.answers import ModelAnswers, Question
from flexkd.evaluate.generation import Answer
from flexkd.evaluate.likelihood import RowLikelihood


def write_answers(path: str | Path, questions: Sequence[Question], models: Mapping[str, ModelAnswers]) -> None:
    """Write one JSON line a row: `id`, `prompt`, `references`, and by model its answers and likelihood.

    An answer stands by its decoding seed with text, length, whether it was cut, and its ROUGE. A sum that is not
    finite becomes null beside its number of tokens.

    Args:
        path: Ends in .jsonl by habit.
        questions: The rows.
        models: By model ("teacher", "student"), or the name of a baseline.
    """
    write_lines(path, _rows(questions, models))


def _rows(questions: Sequence[Question], models: Mapping[str, ModelAnswers]) -> Iterator[dict[str, object]]:
    for index, question in enumerate(questions):
        said = {name: _said(question, model, index) for name, model in models.items()}
        references = list(question.references)
        yield {"id": question.id, "prompt": question.prompt, "references": references, "models": said}


def _said(question: Question, model: ModelAnswers, index: int) -> dict[str, object]:
    answers: dict[str, object] = {}
    for seed, row in model.answers.items():
        answer = row[index]
        assert answer.id == question.id, "models were asked different questions"
        shown = {"text": answer.text, "num_tokens": answer.num_tokens, "is_cut": answer.is_cut}
        answers[str(seed)] = {**shown, "rouge": model.rouge[seed][index]}
    found = model.likelihood[index]
    if found is None:
        return {"answers": answers, "likelihood": None}
    sums = {"tokens": found.tokens, "nll": _finite(found.nll)}
    if found.agreements is not None and found.kl is not None:
        sums |= {"agreements": found.agreements, "kl": _finite(found.kl)}
    return {"answers": answers, "likelihood": sums}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_answers(path: str | Path) -> tuple[list[Question], dict[str, ModelAnswers]]:
    """Read what `write_answers` has written; a sum that was not finite is NaN.

    Raises:
        ArtifactError: No such file, or a damaged one; with the number of the line.
    """
    rows = read_lines(path, _parsed)
    shapes = {tuple((name, *answers) for name, (answers, _) in models.items()) for _, models in rows}
    if len(shapes) > 1:
        raise ArtifactError(f"{path}: holds not every model and seed for every row. Evaluate again.")
    questions = [question for question, _ in rows]
    return questions, {name: _joined([models[name] for _, models in rows]) for name in rows[0][1]}


_Said = tuple[dict[int, tuple[Answer, dict[str, float] | None]], RowLikelihood | None]


def _parsed(row: Any) -> tuple[Question, dict[str, _Said]]:
    question = Question(row["id"], row["prompt"], tuple(row["references"]))
    return question, {name: _parsed_model(row["id"], said) for name, said in row["models"].items()}


def _parsed_model(id_: str, said: Any) -> _Said:
    answers = {
        int(seed): (Answer(id_, one["text"], one["num_tokens"], one["is_cut"]), one["rouge"])
        for seed, one in said["answers"].items()
    }
    sums = said["likelihood"]
    if sums is None:
        return answers, None
    kl = _number(sums["kl"]) if "kl" in sums else None
    return answers, RowLikelihood(id_, sums["tokens"], _number(sums["nll"]), sums.get("agreements"), kl)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _joined(rows: Sequence[_Said]) -> ModelAnswers:
    seeds = list(rows[0][0])
    return ModelAnswers(
        {seed: tuple(answers[seed][0] for answers, _ in rows) for seed in seeds},
        {seed: tuple(answers[seed][1] for answers, _ in rows) for seed in seeds},
        tuple(found for _, found in rows),
    )


def metrics_of(path: str | Path) -> dict[str, dict[str, float | None]]:
    """The metrics of each model, recomputed from the file: equal to the reported ones."""
    return {name: model.metrics() for name, model in read_answers(path)[1].items()}
