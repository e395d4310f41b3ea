"""A student read from its folder, which answers rows as it was evaluated."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexkd.data.encoding.classification import encode
from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.data.encoding.generation import encode_prompts
from flexkd.data.encoding.tokenizers import ensure_pad_token
from flexkd.data.examples.classification import Example
from flexkd.data.examples.generation import GenerationExample
from flexkd.data.examples.labels import LabelSpace
from flexkd.data.examples.row_checks import row_fault
from flexkd.data.examples.turns import read_row
from flexkd.data.sources.rows import Row
from flexkd.errors import DataError
from flexkd.evaluate.classification import predict
from flexkd.evaluate.generation import iterate_answers
from flexkd.files import local_path
from flexkd.models.forward.autocast import resolve_precision
from flexkd.models.forward.quiet import quiet
from flexkd.models.loading.pretrained import load_config, load_tokenizer
from flexkd.tasks.language_models import stop_ids
from flexkd.tasks.serving import ServingSettings

Prediction = dict[str, Any]
"""`label` and `probabilities`, `labels` and `probabilities`, `value`, or `answer` and `is_cut`; or `error` alone."""

_BATCHES_TOGETHER: Final = 16
"""Batches whose rows are sorted by length together, so that little is padded."""
_WHERE: Final = "STUDENT"


@dataclass(frozen=True)
class Student:
    """A finished student, its tokenizer, and how it reads rows.

    Attributes:
        precision: Number type of its forward passes.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: ServingSettings
    precision: str

    def predict(self, rows: Iterable[Mapping[str, object] | str], *, batch_size: int = 32) -> Iterator[Prediction]:
        """Answers to rows, in their order, while they are read.

        Args:
            rows: A mapping of column to value each, with the columns of the training rows; or, where one column is
                read, its text.
            batch_size: Rows of a forward pass.

        Raises:
            DataError: A text in the place of a row, where rows have several columns.
        """
        numbered = enumerate(rows)
        while chunk := list(itertools.islice(numbered, batch_size * _BATCHES_TOGETHER)):
            yield from self.predict_rows([self._row(number, row) for number, row in chunk], batch_size=batch_size)

    def predict_rows(self, rows: Sequence[Row], *, batch_size: int = 32) -> list[Prediction]:
        """Answers to some rows of a source, in their order; a row that cannot be used has an `error`."""
        answer = self._answers if self.settings.writes_text else self._classes
        predictions, errors = answer(rows, batch_size)
        missing: Prediction = {"error": "no answer"}
        return [predictions.get(str(place), errors.get(str(place), missing)) for place in range(len(rows))]

    def _row(self, number: int, row: Mapping[str, object] | str) -> Row:
        if isinstance(row, str):
            if len(self.settings.columns) > 1:
                names = ", ".join(self.settings.columns.values())
                raise DataError(f"rows: row {number} is a text, and this student reads {names}. Give mappings.")
            row = dict.fromkeys(self.settings.columns.values(), row)
        return Row(where=f"row {number}", values=dict(row))

    def _classes(self, rows: Sequence[Row], batch_size: int) -> tuple[dict[str, Prediction], dict[str, Prediction]]:
        """Predictions and errors of a classifier, by the place of the row."""
        columns = [self.settings.columns[name] for name in ("text", "text_pair") if name in self.settings.columns]
        errors: dict[str, Prediction] = {}
        examples = []
        for place, row in enumerate(rows):
            fault = row_fault(row, columns)
            if fault is not None:
                errors[str(place)] = {"error": fault}
                continue
            examples.append(Example(str(place), tuple(str(row.values[column]) for column in columns), None))
        if not examples:
            return {}, errors
        labels = LabelSpace(self.settings.problem, self.settings.labels)
        encoded = encode(examples, self.tokenizer, labels=labels, max_length=self.settings.max_length).rows
        collator = Collator(self._pad_id)
        batches = (collator(list(batch)) for batch in _batches(_longest_first(encoded), batch_size))
        predictions = predict(self.model, batches, precision=self.precision)
        described = zip(predictions.ids, predictions.logits, strict=True)
        return {id_: _described(logits, self.settings) for id_, logits in described}, errors

    def _answers(self, rows: Sequence[Row], batch_size: int) -> tuple[dict[str, Prediction], dict[str, Prediction]]:
        """Predictions and errors of a model that writes, by the place of the row."""
        settings, columns = self.settings, self.settings.generation_columns()
        prompt_format = settings.prompt_format(_template(self.tokenizer))
        errors: dict[str, Prediction] = {}
        examples = []
        for place, row in enumerate(rows):
            good, fault = read_row(row, columns)
            if good is None:
                errors[str(place)] = {"error": fault}
            else:
                examples.append(GenerationExample(str(place), good.turns, good.document, None, ()))
        encoded = encode_prompts(
            examples,
            self.tokenizer,
            prompt_format,
            max_length=settings.max_length,
            max_answer_length=settings.max_answer_length,
            seq2seq=bool(self.model.config.is_encoder_decoder),
        )
        errors |= {row.where: {"error": row.reason} for row in encoded.dropped}
        decoding = settings.generation_settings()
        ends = stop_ids(self.model, self.tokenizer, prompt_format)
        predictions: dict[str, Prediction] = {}
        for prompts in _batches(_longest_first(encoded.rows), batch_size):
            options: dict[str, Any] = {"seed": decoding.seeds[0], "precision": self.precision}
            for answers in iterate_answers(self.model, self.tokenizer, prompts, decoding, stop_ids=ends, **options):
                predictions |= {answer.id: {"answer": answer.text, "is_cut": answer.is_cut} for answer in answers}
        return predictions, errors

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)


def load_student(folder: str | Path, *, precision: str = "auto", device: str | None = None) -> Student:
    """A finished student, ready to answer rows.

    Args:
        folder: The `student` folder of a run.
        precision: float32, bfloat16, float16, or auto: the fastest that this machine supports well.
        device: As torch names it; None: an accelerator if there is one, else the CPU.

    Raises:
        ArtifactError: The folder does not say how rows are read.
        UnsupportedModelError: The folder holds no model.

    Example:
        student = flexkd.load_student("runs/demo-classification/student")
        next(student.predict(["A warm and funny film."]))  # {'label': 'positive', 'probabilities': {...}}
    """
    place = local_path(folder, where=_WHERE)
    settings = ServingSettings.read(place)
    source = str(place)
    is_seq2seq = load_config(source, where=_WHERE).is_encoder_decoder
    text_builder = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    builder: Any = text_builder if settings.writes_text else AutoModelForSequenceClassification
    with quiet():
        model = builder.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(source, where=_WHERE)
    ensure_pad_token(tokenizer)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Student(model, tokenizer, settings, resolve_precision(precision))


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template if isinstance(template, str) else None


def _longest_first(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    return sorted(rows, key=lambda row: -len(row["input_ids"]))


def _batches(rows: Sequence[EncodedRow], size: int) -> Iterator[Sequence[EncodedRow]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _described(logits: torch.Tensor, settings: ServingSettings) -> Prediction:
    """The outputs of a classifier for one row in words."""
    if settings.problem == "regression":
        return {"value": float(logits[0])}
    is_single = settings.problem == "single_label"
    shares = (logits.softmax(-1) if is_single else logits.sigmoid()).tolist()
    probabilities = dict(zip(settings.labels, (round(share, 6) for share in shares), strict=True))
    if is_single:
        return {"label": settings.labels[int(logits.argmax())], "probabilities": probabilities}
    present = [name for name, logit in zip(settings.labels, logits.tolist(), strict=True) if logit > 0]
    return {"labels": present, "probabilities": probabilities}
