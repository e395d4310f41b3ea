"""What every run of a recipe shares: checked rows, tokenizers, encoded splits and the teacher that knows the task."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.answer_ends import ensure_end_token
from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.data.encoding.tokenizers import ensure_pad_token, same_tokenizer
from flexkd.data.encoding.vocabulary import check_largest_id, compare_vocabularies
from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.generation import GenerationData
from flexkd.data.examples.teacher_answers import with_teacher_answers
from flexkd.evaluate.stopping import source_ends
from flexkd.facts.names import TEACHER_PREFIX
from flexkd.models.forward.attention import prefer_short_rows_attention
from flexkd.models.forward.autocast import resolve_precision
from flexkd.models.forward.compilation import check_compiler
from flexkd.models.forward.embeddings import num_embedded_tokens
from flexkd.models.forward.hidden import HEAD_INPUT, model_inputs, states_and_logits, supervised_mask
from flexkd.models.forward.kinds import check_kinds
from flexkd.models.loading.pretrained import load_config, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from flexkd.models.loading.saving import make_savable
from flexkd.pipeline.shared_work import SharedWork
from flexkd.pipeline.teacher_store import fine_tuned_teacher
from flexkd.preflight import Preflight, Resumes, check_family, preflight, read_rows, teacher_labels
from flexkd.preflight.generation import TEMPLATE_NOTE
from flexkd.preflight.run_folder import teacher_inputs
from flexkd.recipe import Recipe
from flexkd.recipe.fingerprints import row_settings
from flexkd.recipe.taught_features import may_rotate, reads_scores
from flexkd.scoring.units import check_state_is_read
from flexkd.tasks.classification import ClassificationTask
from flexkd.tasks.classifiers import label_entries
from flexkd.tasks.generation import GenerationTask
from flexkd.tasks.generation_rows import check_pass_size
from flexkd.tasks.sanity import look_at_teacher
from flexkd.tasks.task import EncodedRows, Task
from flexkd.training.arguments import RunSettings

logger = logging.getLogger(__name__)


_SHOWN_ROWS: Final = 2
"""Rows that show, before a teacher learns, whether it can be scored."""


@dataclass(frozen=True)
class Job:
    """Loaded once for a run, or for all cells of a comparison.

    Attributes:
        teacher: In eval mode, knows the task.
        task: What is done differently for this kind of task.
        fingerprints: Of teacher, tokenizers and data.
        notes: What a reader of the results has to know.
        students: How many students the teacher will teach.
        memo: What was computed of the teacher for one student and serves the others.
        inputs: What made the teacher, known without loading it.
    """

    recipe: Recipe
    data: ClassificationData | GenerationData
    task: Task[Any]
    teacher_tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel
    precision: str
    teacher_precision: str
    fingerprints: Mapping[str, str]
    notes: tuple[str, ...]
    students: int = 1
    memo: SharedWork = field(default_factory=SharedWork)
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def encoded(self) -> EncodedRows:
        """All rows as both models read them."""
        return self.task.encode()

    @property
    def splits(self) -> Mapping[str, list[EncodedRow]]:
        """Encoded rows by split."""
        return self.encoded.splits

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's."""
        return self.encoded.tokenizer

    def batches(
        self, split: str, *, num_rows: int | None = None, batch_size: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Batches of a split in its own order, or of its first rows."""
        return self.encoded.batches(split, num_rows=num_rows, batch_size=batch_size or self.recipe.training.batch_size)

    def width(self, model: PreTrainedModel, layer: int = HEAD_INPUT, *, as_teacher: bool = False) -> int:
        """Width of a model's state at a layer, read from a forward and never from the config."""
        batch = next(self.batches("test", num_rows=1))
        inputs = {
            key: value.to(model.device) for key, value in model_inputs(model, batch, as_teacher=as_teacher).items()
        }
        rows = supervised_mask(model, inputs, batch["labels"].to(model.device)) if self.writes_text else None
        with torch.no_grad():
            states, _ = states_and_logits(model, inputs, (layer,), rows=rows)
        return int(states[layer].shape[-1])

    @property
    def writes_text(self) -> bool:
        """Whether models answer in words; otherwise they classify rows."""
        return isinstance(self.data, GenerationData)

    def predict(self, model: PreTrainedModel) -> Any:
        """What a model says about the test rows, in the same precision for every model of a run."""
        return self.task.predict(model, teacher=self.teacher)

    def for_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Job":
        """The same test rows in the encoding of a model that is neither teacher nor student.

        Raises:
            VocabularyError: It speaks of other classes, or its tokenizer is another model's.
            DataError: It reads fewer tokens than the longest row may have.
        """
        ensure_pad_token(tokenizer)
        model.config.pad_token_id = tokenizer.pad_token_id
        task = self.task.for_model(model, tokenizer)
        check_ids(model, task.encode().splits, where="evaluate")
        return replace(self, task=task)


def prepare(recipe: Recipe, *, students: int = 1, resumes: Resumes = "nothing", stop_at_weak: bool = True) -> Job:
    """Check everything that can be checked, then load rows, tokenizers and the teacher.

    Args:
        recipe: Of the run, or of the comparison.
        students: How many the teacher will teach.
        resumes: What is gone on with in the run folder, and so has to belong to the recipe.
        stop_at_weak: Whether something will be spent on a teacher, which then has to know the task.

    Raises:
        FlexKDError: Whatever is wrong with recipe, rows or models, before anything is trained.
    """
    found = preflight(recipe, resumes=resumes)
    found.raise_errors()
    if recipe.training.compile:
        check_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    # What is said of a template is said again by the task, of the tokenizer that is loaded.
    notes = _warned(note for note in found.notes if not note.startswith(TEMPLATE_NOTE))
    sources = {"teacher": recipe.teacher.model, "student": recipe.student.model}
    configs = {name: load_config(source, where=f"{name}.model") for name, source in sources.items() if source}
    data = _rows(recipe, found, configs["teacher"])
    taught = with_teacher_answers(data, recipe.data.teacher_answers) if isinstance(data, GenerationData) else data
    teacher_tokenizer, tokenizer = load_tokenizers(recipe)
    notes += filter(None, map(ensure_pad_token, {id(t): t for t in (teacher_tokenizer, tokenizer)}.values()))
    if recipe.student.start == "slice":
        check_family(configs["teacher"].model_type, writes_text=recipe.generation is not None)
    task, more_notes = open_task(recipe, data, tokenizer, teacher_tokenizer, configs)
    for name, config in configs.items():
        task.check_config(name, config)
    check_pass_size(recipe, task.encode().splits["train"])
    # From the rows' own answers: only so is it the teacher whose answers the student may learn.
    teacher = _teacher(recipe, task, teacher_tokenizer, _row_fingerprints(recipe, data.fingerprint, task))
    teacher.config.pad_token_id = teacher_tokenizer.pad_token_id
    notes += _warned(task.loader.notes_on_model(teacher, where="teacher.model"))
    notes += look_at_teacher(recipe, task, teacher, stop=stop_at_weak)
    if taught is not data:
        task, _ = open_task(recipe, taught, tokenizer, teacher_tokenizer, configs)
    if isinstance(task, GenerationTask):
        # Without the rows that its chat template cannot write.
        taught = task.data
    made_of = _row_fingerprints(recipe, taught.fingerprint, task)
    return Job(
        recipe=recipe,
        data=taught,
        task=task,
        teacher_tokenizer=teacher_tokenizer,
        teacher=teacher,
        precision=resolve_precision(recipe.training.precision),
        teacher_precision=resolve_precision(recipe.teacher.precision),
        fingerprints={**_model_fingerprints(teacher, teacher_tokenizer, tokenizer), **made_of},
        notes=tuple(dict.fromkeys((*notes, *_label_notes(data), *taught.notes, *task.encode().notes, *more_notes))),
        students=students,
        inputs=teacher_inputs(recipe, found.teacher),
    )


def _model_fingerprints(
    teacher: PreTrainedModel, teacher_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    return {
        "teacher": model_fingerprint(teacher),
        "teacher_tokenizer": tokenizer_fingerprint(teacher_tokenizer),
        "student_tokenizer": tokenizer_fingerprint(tokenizer),
    }


def _warned(notes: Iterable[str]) -> list[str]:
    """The notes, after they were logged."""
    warned = list(notes)
    for note in warned:
        logger.warning("%s", note)
    return warned


def _rows(recipe: Recipe, found: Preflight, teacher: PreTrainedConfig) -> ClassificationData | GenerationData:
    """The rows as they were checked; read here where they, or the labels of the teacher, were not on this machine."""
    labels = teacher_labels(recipe, label_entries(teacher))
    if found.data is not None and labels == found.teacher_labels:
        return found.data
    data = read_rows(recipe, labels)
    _warned(_label_notes(data))
    return data


def _label_notes(data: ClassificationData | GenerationData) -> tuple[str, ...]:
    return data.label_notes if isinstance(data, ClassificationData) else ()


def load_tokenizers(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The teacher's and the student's; one object where both are the same."""
    teacher = load_tokenizer(recipe.teacher.tokenizer or recipe.teacher.model, where="teacher.tokenizer")
    if recipe.generation is not None:
        _ensure_end(teacher, recipe.teacher.model, "teacher.model")
    own = recipe.student.tokenizer or (recipe.student.model if recipe.student.start == "pretrained" else None)
    if own is None:
        return teacher, teacher
    student = load_tokenizer(own, where="student.tokenizer")
    if recipe.generation is not None:
        _ensure_end(student, recipe.student.model or recipe.teacher.model, "student.model")
    is_same = same_tokenizer(teacher, student) and teacher.chat_template == student.chat_template
    return teacher, teacher if is_same else student


def _ensure_end(tokenizer: PreTrainedTokenizerBase, source: str, where: str) -> None:
    """An end of text for a tokenizer that names none, as its checkpoint says."""
    note = ensure_end_token(tokenizer, source_ends(source, where=where)) if tokenizer.eos_token is None else None
    if note is not None:
        logger.warning("%s", note)


def open_task(
    recipe: Recipe,
    data: ClassificationData | GenerationData,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    configs: Mapping[str, PreTrainedConfig],
) -> tuple[Task[Any], list[str]]:
    """The kind of task, and what a reader has to know about the two vocabularies."""
    if isinstance(data, ClassificationData):
        return ClassificationTask(recipe, data, tokenizer, teacher_tokenizer), []
    kinds = {name: bool(config.is_encoder_decoder) for name, config in configs.items()}
    check_kinds(kinds)
    shared, notes = None, []
    if recipe.student.start == "pretrained" or tokenizer is not teacher_tokenizer:
        # A fresh student has as many outputs as its teacher, whatever tokenizer it reads with.
        student = "student" if recipe.student.start == "pretrained" else "teacher"
        sizes = [int(configs[name].get_text_config().vocab_size) for name in ("teacher", student)]
        found = compare_vocabularies(teacher_tokenizer, tokenizer, *sizes)
        shared = found.size if len({found.size, *sizes}) > 1 else None
        notes = [] if found.note is None else [found.note]
        for note in notes:
            logger.warning("%s", note)
    task = GenerationTask(recipe, data, tokenizer, teacher_tokenizer, seq2seq=kinds["teacher"], shared_outputs=shared)
    return task, notes


def check_ids(model: PreTrainedModel, splits: Mapping[str, Sequence[Mapping[str, Any]]], *, where: str) -> None:
    """Refuse rows with ids that a model has no embedding for.

    Raises:
        VocabularyError: The tokenizer is another model's.
    """
    largest = max(max(row["input_ids"]) for rows in splits.values() for row in rows)
    check_largest_id(largest, num_embedded_tokens(model), where=where)


def _row_fingerprints(recipe: Recipe, data: str, task: Task[Any]) -> dict[str, str]:
    """What decides the features of the rows besides the tokenizers."""
    layout = task.format.fingerprints() if isinstance(task, GenerationTask) else {}
    return {**row_settings(recipe, data), **layout}


def _teacher(
    recipe: Recipe,
    task: Task[Any],
    tokenizer: PreTrainedTokenizerBase,
    row_fingerprints: Mapping[str, str],
) -> PreTrainedModel:
    section = recipe.teacher
    encoded = task.encode()
    own = encoded.has_own_encoding
    teacher = task.loader.load_teacher()
    teacher.config.pad_token_id = tokenizer.pad_token_id
    rows = {split: _own_features(features, own) for split, features in encoded.splits.items()}
    check_ids(teacher, rows, where="teacher.model")
    prefer_short_rows_attention([teacher], recipe.data.max_length)
    # Fine-tuning saves it, a slice takes its settings over, and it is measured as it was saved.
    make_savable(teacher, where="teacher.model")
    if section.fine_tune is None:
        return teacher
    collator = Collator(int(tokenizer.pad_token_id)) if own else encoded.collator
    layers = recipe.scores.layer if isinstance(recipe.scores.layer, tuple) else (recipe.scores.layer,)
    if recipe.generation is None and HEAD_INPUT in layers and reads_scores(recipe, rotated=may_rotate(recipe)):
        check_state_is_read(teacher, collator(rows["train"][:_SHOWN_ROWS]))
    settings = RunSettings(
        metric=task.validation_metrics().metric,
        precision=resolve_precision(section.precision),
        keep_checkpoints=1,
        **section.fine_tune.model_dump(),
    )
    return fine_tuned_teacher(
        teacher,
        tokenizer,
        train=[row for row in rows["train"] if _has_label(row["labels"])],
        validation=rows["validation"],
        collator=collator,
        settings=settings,
        validation_metrics=task.validation_metrics(),
        loss=task.loss,
        fingerprints={"problem": recipe.task.problem, **row_fingerprints},
        load=lambda folder: task.loader.load(folder, where="teacher store", own_head=True)[0],
    )


def _own_features(rows: list[EncodedRow], as_teacher: bool) -> list[EncodedRow]:
    """The teacher's encoding of rows as if it were the only one."""
    if not as_teacher:
        return rows
    plain = ("id", "labels")
    return [
        {
            key.removeprefix(TEACHER_PREFIX): value
            for key, value in row.items()
            if key in plain or key.startswith(TEACHER_PREFIX)
        }
        for row in rows
    ]


def _has_label(label: Any) -> bool:
    values = label if isinstance(label, list) else [label]
    return any(value == value and value != -100 for value in values)
