"""Classification and regression as a run sees them: encoded texts, predictions of a row, metrics and agreement."""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.classification import encode, encode_for_both
from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.encoded import Cut, EncodedRow, EncodedSplit
from flexkd.data.encoding.tokenizers import same_tokenizer
from flexkd.data.examples.classification import ClassificationData, Example
from flexkd.data.examples.teacher_labels import output_order
from flexkd.display.progress import Tracked
from flexkd.evaluate.classification import (
    Predictions,
    agreement,
    answers_of,
    classification_metrics,
    constant_outputs,
    labelled,
    predict,
    predicted,
)
from flexkd.evaluate.cost import Cost, measure_costs
from flexkd.evaluate.predictions import (
    both_wrong,
    class_records,
    confusion_counts,
    disagreements,
    outcomes,
    write_predictions,
)
from flexkd.evaluate.sanity import SanityResult, classifier_sanity
from flexkd.facts.losses import TASK_LOSS_OF
from flexkd.facts.names import SPLITS, TEACHER_PREFIX
from flexkd.facts.own_metrics import OWN_METRICS, own_values
from flexkd.models.forward.autocast import resolve_precision
from flexkd.models.forward.row_ends import check_row_ends, row_end
from flexkd.recipe import Recipe
from flexkd.tasks.classifiers import ClassifierLoader, labels_of
from flexkd.tasks.intervals import classifier_intervals
from flexkd.tasks.serving import ServingSettings
from flexkd.tasks.stored_results import StoredResults
from flexkd.tasks.task import EncodedRows, TestReport, check_positions, pad_id
from flexkd.training.fit import ValidationMetrics

logger = logging.getLogger(__name__)

COST_ROWS: Final = 256
"""Test rows that speed and memory are measured on."""

SINGLE_ROWS: Final = 64
"""Those of them that are timed one by one."""

_BASELINES: Final = {
    "single_label": "most_frequent_class",
    "multi_label": "label_frequencies",
    "regression": "training_mean",
}
"""The trivial baseline of each kind of problem."""

_BATCH_SIZE: Final = 64
_EXAMPLES: Final = 8


class ClassificationTask:
    """A `Task` whose results are one row of outputs for each text.

    Args:
        data: Rows of the recipe.
        tokenizer: The student's.
        teacher_tokenizer: The teacher's; the same object where both read one encoding.
    """

    shared_outputs: int | None = None

    def __init__(
        self,
        recipe: Recipe,
        data: ClassificationData,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.problem = recipe.task.problem
        self.loss = TASK_LOSS_OF[self.problem]
        self.labels = data.labels.names
        self.tokenizer = tokenizer
        self.teacher_tokenizer = teacher_tokenizer
        self.loader = ClassifierLoader(recipe.teacher, data.labels)
        self._row_ends: dict[str, int] = {}

    def encode(self) -> EncodedRows:
        """All rows as both models read them; encoded once where the tokenizers agree."""
        return self._encoded

    @cached_property
    def _encoded(self) -> EncodedRows:
        splits = {split: self._encode(split) for split in SPLITS}
        has_own_encoding = not same_tokenizer(self.tokenizer, self.teacher_tokenizer)
        for name, end in self._row_ends.items():
            key = f"{TEACHER_PREFIX if has_own_encoding and name == 'teacher' else ''}input_ids"
            _check_ends([row for encoded in splits.values() for row in encoded.rows], key, end, name)
        teacher_pad = pad_id(self.teacher_tokenizer) if has_own_encoding else None
        teacher_cuts = {
            split: encoded.teacher_cut for split, encoded in splits.items() if encoded.teacher_cut is not None
        }
        return EncodedRows(
            splits={split: encoded.rows for split, encoded in splits.items()},
            cuts={split: encoded.cut for split, encoded in splits.items()},
            collator=Collator(pad_id(self.tokenizer), teacher_pad),
            tokenizer=self.tokenizer,
            has_own_encoding=has_own_encoding,
            notes=_notes_on_teacher_cuts(teacher_cuts),
            teacher_cuts=teacher_cuts,
        )

    def _encode(self, split: str) -> EncodedSplit:
        examples: tuple[Example, ...] = getattr(self.data, split)
        return encode_for_both(
            examples,
            self.tokenizer,
            self.teacher_tokenizer,
            labels=self.data.labels,
            max_length=self.recipe.data.max_length,
        )

    def check_config(self, name: str, config: PreTrainedConfig) -> None:
        """Refuse a model with fewer positions than the longest row; remember the token that its head reads, if any."""
        check_positions(name, config, self.recipe.data.max_length)
        end = row_end(config.to_dict(), where=name)
        if end is not None:
            self._row_ends[name] = end

    def validation_metrics(self) -> ValidationMetrics:
        """The metric of the task, from the outputs on all validation rows."""
        return ValidationMetrics(self.recipe.task.metric, of_outputs=self._metrics_of_outputs)

    def _metrics_of_outputs(self, prediction: EvalPrediction) -> dict[str, float]:
        logits = torch.as_tensor(prediction.predictions).float()
        metrics = self._metrics(logits, torch.as_tensor(prediction.label_ids))
        return {name: float("nan") if value is None else value for name, value in metrics.items()}

    def look(self, teacher: PreTrainedModel, rows: Sequence[EncodedRow]) -> SanityResult:
        """Compared with the most frequent class, the best constant answer, or no correlation."""
        batches = self._encoded.collated(rows, batch_size=_BATCH_SIZE)
        precision = resolve_precision(self.recipe.teacher.precision)
        predictions = predict(teacher, batches, precision=precision, as_teacher=True)
        return classifier_sanity(predictions, self.problem, self.labels)

    def predict(
        self,
        model: PreTrainedModel,
        *,
        teacher: PreTrainedModel,
        followed: Predictions | None = None,
        is_untrained: bool = False,
    ) -> Predictions:
        """Outputs of every test row, in the order of the data's classes."""
        count = math.ceil(len(self._encoded.splits["test"]) / _BATCH_SIZE)
        batches = Tracked(self._encoded.batches("test", batch_size=_BATCH_SIZE), "test rows", total=count)
        precision = resolve_precision(self.recipe.training.precision)
        predictions = predict(model, batches, precision=precision, as_teacher=model is teacher)
        if self._encoded.outputs is None:
            return predictions
        return replace(predictions, logits=predictions.logits[:, list(self._encoded.outputs)])

    def asked(self, model: PreTrainedModel) -> dict[str, str]:
        """Batches, whose padding rounds, and the order of the classes."""
        return {"batch_size": str(_BATCH_SIZE), "outputs": str(self._encoded.outputs), "labels": str(self.labels)}

    def pack(self, results: Predictions) -> StoredResults:
        """Ids, logits and labels."""
        return StoredResults(list(results.ids), {"logits": results.logits, "labels": results.labels})

    def unpack(self, stored: StoredResults, model: PreTrainedModel) -> Predictions:
        """Predictions of the test rows."""
        ids = self._encoded.ids("test")
        if stored.values != ids or len(stored.tensors["logits"]) != len(ids):
            raise ValueError("other rows")
        return Predictions(tuple(ids), stored.tensors["logits"], stored.tensors["labels"])

    def baselines(self) -> dict[str, Predictions]:
        """The same answer for every row, from the training labels alone: their frequencies, or their mean."""
        train, test = (_label_tensor(self._encoded.splits[split]) for split in ("train", "test"))
        output = constant_outputs(train, self.problem, num_outputs=len(self.labels) or 1)
        ids = tuple(self._encoded.ids("test"))
        return {_BASELINES[self.problem]: Predictions(ids, output.expand(len(ids), -1).clone(), test)}

    def metrics(self, results: Predictions, teacher: Predictions) -> dict[str, float | None]:
        """Metrics of the problem, and the agreement with the teacher."""
        metrics = self._metrics(results.logits, results.labels)
        return {**metrics, **agreement(results.logits, teacher.logits, self.problem)}

    def _metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float | None]:
        """Metrics of the problem, and that of the recipe where it is the user's own."""
        metrics, name = classification_metrics(logits, labels, self.problem), self.recipe.task.metric
        if name not in OWN_METRICS:
            return metrics
        keep = labelled(labels)
        if not bool(logits[keep].isfinite().all()):
            return {**metrics, name: None}
        truth, predictions = answers_of(labels[keep], self.problem), predicted(logits[keep], self.problem)
        return {**metrics, **own_values(name, truth.numpy(), predictions.numpy())}

    def write(self, path: Path, results: Mapping[str, Predictions]) -> None:
        """Logits of every model for every row."""
        write_predictions(path, results)

    def report(self, results: Mapping[str, Predictions]) -> TestReport:
        """Rows on which teacher and student differ or are both wrong, both class by class, and intervals."""
        labels, rows = self.data.labels, self.data.test
        teacher, student = results["teacher"], results["student"]
        compared = {"teacher": teacher, "student": student}
        counts = {name: confusion_counts(part, labels) for name, part in compared.items()}
        return TestReport(
            disagreements(rows, teacher, student, labels, _EXAMPLES),
            classes=class_records(compared, labels),
            confusion={name: of_model for name, of_model in counts.items() if of_model},
            outcomes=outcomes(teacher, student, self.problem),
            both_wrong=both_wrong(rows, teacher, student, labels, _EXAMPLES // 2),
            intervals=classifier_intervals(results, self.problem, self.recipe.task.metric),
        )

    def costs(
        self, folders: Sequence[Path], *, as_teacher: Sequence[bool], own_batches: Mapping[int, list[dict[str, Any]]]
    ) -> list[Cost]:
        """Forward passes over test rows."""
        by_place = dict(own_batches)
        if self._encoded.has_own_encoding:
            teachers = [place for place, is_teacher in enumerate(as_teacher) if is_teacher]
            by_place = {place: self.cost_batches(as_teacher=True) for place in teachers} | by_place
        return measure_costs(
            folders,
            self.cost_batches(),
            precision=resolve_precision(self.recipe.training.precision),
            single_rows=min(SINGLE_ROWS, len(self._encoded.splits["test"])),
            own_batches=by_place,
        )

    def cost_batches(self, *, as_teacher: bool = False) -> list[dict[str, Any]]:
        """The first test rows in batches of 32."""
        prefix = TEACHER_PREFIX if as_teacher and self._encoded.has_own_encoding else ""
        return [_plain(batch, prefix) for batch in self._encoded.batches("test", num_rows=COST_ROWS, batch_size=32)]

    def serving(self) -> ServingSettings:
        """Columns, length and classes."""
        section = self.recipe.data
        columns = {"text": section.text, "text_pair": section.text_pair}
        return ServingSettings(
            task=self.recipe.task.type,
            problem=self.problem,
            columns={name: column for name, column in columns.items() if column is not None},
            max_length=section.max_length,
            labels=tuple(self.labels),
        )

    def for_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "ClassificationTask":
        """The same task for a classifier of the same labels, with the test rows in its encoding.

        Raises:
            VocabularyError: Its classes are not those of the data.
            DataError: It reads fewer tokens than the longest row may have.
        """
        if same_tokenizer(tokenizer, self.tokenizer):
            tokenizer = self.tokenizer
        order = output_order(labels_of(model.config, where="evaluate"), self.data.labels)
        if order.note is not None:
            logger.warning("%s", order.note)
        self.check_config("the model", model.config)
        labels, length = self.data.labels, self.recipe.data.max_length
        encoded = encode(self.data.test, tokenizer, labels=labels, max_length=length)
        end = row_end(model.config.to_dict(), where="the model")
        if end is not None:
            _check_ends(encoded.rows, "input_ids", end, "the model")
        task = copy.copy(self)
        task._encoded = EncodedRows(
            {"test": encoded.rows},
            {"test": encoded.cut},
            Collator(pad_id(tokenizer)),
            tokenizer,
            outputs=order.outputs,
        )
        return task


def _notes_on_teacher_cuts(cuts: Mapping[str, Cut]) -> tuple[str, ...]:
    notes = tuple(
        f"{split}: {cut.num_rows:,} texts are cut at data.max_length for the teacher, whose tokenizer is another one; "
        f"it does not read {cut.mean_lost_tokens:.1f} of their tokens on average."
        for split, cut in cuts.items()
        if cut.num_rows
    )
    for note in notes:
        logger.warning("%s", note)
    return notes


def _label_tensor(rows: Sequence[EncodedRow]) -> Tensor:
    return torch.as_tensor([row["labels"] for row in rows])


def _check_ends(rows: Sequence[EncodedRow], key: str, end: int, name: str) -> None:
    counts = [row[key].count(end) for row in rows]
    check_row_ends(counts, end, where=name, names=[str(row["id"]) for row in rows])


def _plain(batch: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    if prefix:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return {key: value for key, value in tensors.items() if not key.startswith(TEACHER_PREFIX)}
