"""What depends on the kind of task: loading its models, encoding its rows, predicting, and metrics of predictions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.encoded import Cut, EncodedRow
from flexkd.data.encoding.vocabulary import check_largest_id, check_lengths
from flexkd.evaluate.cost import Cost
from flexkd.evaluate.sanity import SanityResult
from flexkd.models.forward.embeddings import num_embedded_tokens
from flexkd.models.forward.positions import has_soft_limit, position_limit
from flexkd.record import AnswerExample, ClassRecord, Disagreement, GenerationRecord, RowIntervals
from flexkd.tasks.serving import ServingSettings
from flexkd.tasks.stored_results import StoredResults
from flexkd.training.fit import ValidationMetrics

TEACHER_KEY: Final = "teacher.model"
"""The recipe key that names the teacher, in messages."""

Results = TypeVar("Results")
"""Results of one model on the test rows."""


@dataclass(frozen=True)
class EncodedRows:
    """The rows of all splits as token ids and labels.

    Attributes:
        splits: Encoded rows by split.
        cuts: Rows that were shortened.
        collator: Encoded rows to batches.
        tokenizer: The student's, which made them.
        has_own_encoding: Whether the rows also have an encoding for the teacher's own tokenizer.
        dropped: Rows that did not fit and were left out, by reason.
        notes: What a reader of the results has to know.
        outputs: For each class, the index of the model's output for it; None: in the same order.
        teacher_cuts: Rows that were shortened in the teacher's own encoding; empty if it reads the student's.
    """

    splits: Mapping[str, list[EncodedRow]]
    cuts: Mapping[str, Cut]
    collator: Collator
    tokenizer: PreTrainedTokenizerBase
    has_own_encoding: bool = False
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    outputs: tuple[int, ...] | None = None
    teacher_cuts: Mapping[str, Cut] = field(default_factory=dict)

    def ids(self, split: str) -> list[str]:
        """Ids of a split's rows."""
        return [str(row["id"]) for row in self.splits[split]]

    def num_truncated(self) -> dict[str, int]:
        """Number of shortened rows of each split; `SPLIT (teacher)` counts those in the teacher's own encoding."""
        student = {split: cut.num_rows for split, cut in self.cuts.items()}
        return student | {f"{split} (teacher)": cut.num_rows for split, cut in self.teacher_cuts.items()}

    def batches(self, split: str, *, num_rows: int | None = None, batch_size: int) -> Iterator[dict[str, Any]]:
        """Batches of all rows of a split, or of its first `num_rows`, in their order."""
        return self.collated(self.splits[split][:num_rows], batch_size=batch_size)

    def collated(self, rows: Sequence[EncodedRow], *, batch_size: int) -> Iterator[dict[str, Any]]:
        """Batches of any rows in their order."""
        loader: DataLoader[Any] = DataLoader(
            rows,  # type: ignore[arg-type]
            batch_size=batch_size,
            collate_fn=self.collator,
        )
        return iter(loader)


@dataclass(frozen=True)
class TestReport:
    """What a page shows of the test rows besides the metrics; as in `RunRecord`."""

    disagreements: list[Disagreement] = field(default_factory=list)
    answers: list[AnswerExample] = field(default_factory=list)
    generation: GenerationRecord | None = None
    notes: list[str] = field(default_factory=list)
    classes: list[ClassRecord] = field(default_factory=list)
    confusion: dict[str, list[list[int]]] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    both_wrong: list[Disagreement] = field(default_factory=list)
    intervals: RowIntervals | None = None


@runtime_checkable
class ModelLoader(Protocol):
    """Loads or creates the models of a run, and writes the task into a student's config."""

    def load_teacher(self) -> PreTrainedModel:
        """The recipe's teacher; where the recipe fine-tunes it, before that."""

    def load(
        self, source: str, *, where: str, seed: int = 0, own_head: bool = False
    ) -> tuple[PreTrainedModel, list[str]]:
        """A model for this task in float32, and the names of its newly initialised weights.

        Args:
            source: A folder or a hub id.
            where: The recipe key or command that names it, for messages.
            seed: Seed of newly initialised weights.
            own_head: Keep a head that does not fit the labels of the data, instead of initialising a new one.
        """

    def fresh(self, source: str, sizes: dict[str, int], *, seed: int) -> PreTrainedModel:
        """A model with random weights from a config; `sizes` overrides entries of it, by their keys in the config."""

    def make_ready(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Write what belongs to the task into the config of an untrained student."""

    def notes_on_model(self, model: PreTrainedModel, *, where: str) -> tuple[str, ...]:
        """What is unusual about a model under this task, in words for the reader of its results."""


@runtime_checkable
class Task(Protocol[Results]):
    """One kind of task under one recipe, with the rows that models learn from and are evaluated on.

    Every model of a run is loaded and evaluated through it, so that teacher, baselines and student are treated alike.
    """

    loss: str
    """Loss against the labels, as in `TaskTerm`."""
    labels: tuple[str, ...]
    """Names of the classes; empty for a task that writes text."""
    shared_outputs: int | None
    """Outputs that mean the same in teacher and student, as in `LogitTerm`."""

    @property
    def loader(self) -> ModelLoader:
        """Loads the models."""

    def check_config(self, name: str, config: PreTrainedConfig) -> None:
        """Refuse a model that cannot read the rows, by its config alone; called before `encode`."""

    def encode(self) -> EncodedRows:
        """All rows as both models read them; encoded by the first call, later calls return the same object."""

    def validation_metrics(self) -> ValidationMetrics:
        """How a model is evaluated on the validation rows while it trains."""

    def look(self, teacher: PreTrainedModel, rows: Sequence[EncodedRow]) -> SanityResult:
        """How well the teacher does on some validation rows, compared with a baseline that needs no model."""

    def predict(
        self,
        model: PreTrainedModel,
        *,
        teacher: PreTrainedModel,
        followed: Results | None = None,
        is_untrained: bool = False,
    ) -> Results:
        """Results of a model on the test rows; the teacher reads its own encoding of them.

        Args:
            teacher: The model that is followed.
            followed: Its results on the same rows and tokens, where these are known.
            is_untrained: The model says nothing yet, so that it answers few rows where answers take long.
        """

    def asked(self, model: PreTrainedModel) -> dict[str, str]:
        """What the results of a model depend on besides its weights, its tokenizers, the rows and how it computes."""

    def pack(self, results: Results) -> StoredResults:
        """Results as `unpack` reads them."""

    def unpack(self, stored: StoredResults, model: PreTrainedModel) -> Results:
        """Results of the model as they were packed.

        Raises:
            KeyError, TypeError, ValueError: They are not of these rows.
        """

    def baselines(self) -> dict[str, Results]:
        """Results that need no model, by name."""

    def metrics(self, results: Results, teacher: Results) -> dict[str, float | None]:
        """Every metric of the task, and how far the model follows the teacher."""

    def write(self, path: Path, results: Mapping[str, Results]) -> None:
        """All results on disk, so that each reported number can be recomputed."""

    def report(self, results: Mapping[str, Results]) -> TestReport:
        """What a page shows besides the metrics; the names include `teacher`, `student_before` and `student`."""

    def cost_batches(self, *, as_teacher: bool = False) -> list[dict[str, Any]]:
        """Test rows that speed, latency and memory are measured on, in the student's or the teacher's encoding."""

    def costs(
        self, folders: Sequence[Path], *, as_teacher: Sequence[bool], own_batches: Mapping[int, list[dict[str, Any]]]
    ) -> list[Cost]:
        """Size, speed, latency and memory of saved models on the same rows, the models in turns.

        Args:
            folders: One a model.
            as_teacher: Which of them read the teacher's encoding.
            own_batches: `cost_batches` of models that read an encoding of their own, by their place in `folders`.
        """

    def serving(self) -> ServingSettings:
        """How a finished student reads rows, for its folder."""

    def for_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Task[Results]":
        """The same task with the test rows encoded for a model that is neither teacher nor student."""


def check_positions(name: str, config: PreTrainedConfig, max_length: int) -> None:
    """Check that the longest row fits into a model's positions; a rotary model only gets a warning.

    Raises:
        DataError: It does not, and the model would fail deep inside training.
    """
    plain = config.to_dict()
    limits: dict[bool, dict[str, int | None]] = {True: {}, False: {}}
    limits[has_soft_limit(plain)][name] = position_limit(plain)
    check_lengths(max_length, limits[False], soft_limits=limits[True])


def check_ids(
    model: PreTrainedModel,
    splits: Mapping[str, Sequence[EncodedRow]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    where: str,
) -> None:
    """Refuse rows with token ids, or padded with one, that a model has no embedding for.

    Args:
        tokenizer: The one that made the rows.

    Raises:
        VocabularyError: The tokenizer is another model's.
    """
    largest = max(max(row["input_ids"]) for rows in splits.values() for row in rows)
    check_largest_id(max(largest, pad_id(tokenizer)), num_embedded_tokens(model), where=where)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the padding token, which every tokenizer of a job has."""
    assert tokenizer.pad_token_id is not None, "every tokenizer of a job has a padding token"
    return int(tokenizer.pad_token_id)
