"""Results of a model that writes on the test rows, in memory and as they are stored."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from flexkd.evaluate.answers import ModelAnswers, Question, judged_answers
from flexkd.evaluate.generation import Answer
from flexkd.evaluate.likelihood import HeadStates, RowLikelihood
from flexkd.evaluate.rouge import RougeSettings
from flexkd.tasks.stored_results import StoredResults


@dataclass(frozen=True)
class GenerationResult:
    """Results of one model on the test rows.

    Attributes:
        answers: Answers, and likelihoods of the references.
        decoding: Everything that decided the answers; empty for a baseline without a model.
        states: Of a teacher: what its head reads where the references are predicted, for all who follow it.
    """

    answers: ModelAnswers
    decoding: dict[str, object] = field(default_factory=dict)
    states: HeadStates | None = None


def pack(results: GenerationResult) -> StoredResults:
    """Answers, likelihoods and states; ROUGE follows from the answers."""
    answers = results.answers
    states = () if results.states is None else results.states.of_batches
    values: dict[str, Any] = {
        "answers": {seed: [asdict(row) for row in rows if row] for seed, rows in answers.answers.items()},
        "likelihood": [asdict(row) for row in answers.likelihood if row],
        "num_states": None if results.states is None else len(states),
    }
    return StoredResults(values, {f"states.{number}": part for number, part in enumerate(states)})


def unpack(
    stored: StoredResults,
    model: PreTrainedModel,
    questions: Sequence[Question],
    rouge: RougeSettings,
    decoding: dict[str, object],
) -> GenerationResult:
    """Results of a model that were stored.

    Raises:
        KeyError, TypeError, ValueError: They are not of these questions.
    """
    values = stored.values
    answers = {int(seed): [Answer(**row) for row in rows] for seed, rows in values["answers"].items()}
    judged = judged_answers(questions, answers, [RowLikelihood(**row) for row in values["likelihood"]], rouge)
    if any(None in rows for rows in judged.answers.values()):
        raise ValueError("other rows")
    count, states = values["num_states"], None
    if count is not None:
        states = HeadStates(model, tuple(stored.tensors[f"states.{number}"] for number in range(count)))
    return GenerationResult(judged, decoding, states)
