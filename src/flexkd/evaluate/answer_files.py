"""Answers on disk, one line for each row, from which every reported number can be recomputed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flexkd.data.sources.json_lines import write_lines
from flexkd.evaluate.answers import ModelAnswers, Question


def write_answers(path: str | Path, questions: Sequence[Question], models: Mapping[str, ModelAnswers]) -> None:
    """Write one JSON line for each row: `id`, `prompt`, `references`, and for each model its answers and likelihood.

    Answers are stored by decoding seed with text, length, whether they were cut, and their ROUGE; rows that a model
    did not answer have none. A sum that is not finite becomes null.

    Args:
        path: By convention ends in .jsonl.
        questions: The rows.
        models: Answers by the name of the model ("teacher", "student") or baseline.
    """
    write_lines(path, _rows(questions, models))


def _rows(questions: Sequence[Question], models: Mapping[str, ModelAnswers]) -> Iterator[dict[str, object]]:
    for index, question in enumerate(questions):
        by_model = {name: _row_of(question, model, index) for name, model in models.items()}
        references = list(question.references)
        yield {"id": question.id, "prompt": question.prompt, "references": references, "models": by_model}


def _row_of(question: Question, model: ModelAnswers, index: int) -> dict[str, object]:
    answers: dict[str, object] = {}
    for seed, of_seed in model.answers.items():
        answer = of_seed[index]
        if answer is None:
            continue
        assert answer.id == question.id, "all models answer the same questions in the same order"
        answers[str(seed)] = {
            "text": answer.text,
            "num_tokens": answer.num_tokens,
            "is_cut": answer.is_cut,
            "rouge": model.rouge[seed][index],
        }
    likelihood = model.likelihood[index]
    if likelihood is None:
        return {"answers": answers, "likelihood": None}
    sums = {"tokens": likelihood.tokens, "nll": _finite(likelihood.nll)}
    if likelihood.agreements is not None and likelihood.kl is not None:
        sums |= {"agreements": likelihood.agreements, "kl": _finite(likelihood.kl)}
    return {"answers": answers, "likelihood": sums}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
