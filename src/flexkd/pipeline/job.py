"""What the runs of a recipe share: checked and encoded rows, tokenizers, and the teacher that knows the task."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.answer_ends import ensure_end_token
from flexkd.data.encoding.drawn_rows import DrawnRows, draw_rows
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.data.encoding.tokenizers import ensure_pad_token, same_tokenizer
from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.generation import GenerationData
from flexkd.data.examples.teacher_answers import with_teacher_answers
from flexkd.data.examples.teacher_labels import label_entries
from flexkd.evaluate.stopping import source_ends
from flexkd.guards.work import hold_folder
from flexkd.home import home_folder
from flexkd.models.forward.autocast import autocast_dtype, resolve_precision
from flexkd.models.forward.compilation import check_compiler
from flexkd.models.forward.engine import engine_of
from flexkd.models.forward.hidden import HEAD_INPUT, model_inputs, states_and_logits, supervised_mask
from flexkd.models.loading.pretrained import load_config, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from flexkd.pipeline.teacher import load_teacher
from flexkd.preflight import Preflight, Resumes, check_family, preflight, read_rows, teacher_labels
from flexkd.preflight.generation import TEMPLATE_NOTE
from flexkd.preflight.run_folder import continued, teacher_inputs
from flexkd.processes import check_alike, check_shared, in_turn, join, num_processes
from flexkd.recipe import Recipe
from flexkd.recipe.fingerprints import row_settings
from flexkd.scoring.shared_work import SharedWork
from flexkd.tasks.feature_passes import check_passes
from flexkd.tasks.generation import GenerationTask
from flexkd.tasks.opening import open_task
from flexkd.tasks.sanity import look_at_teacher
from flexkd.tasks.stored_results import remembered
from flexkd.tasks.task import EncodedRows, Task, check_ids
from flexkd.tasks.vocabulary import cut_to_vocabulary
from flexkd.vocabulary_record import VocabularyRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What is loaded once for a run, or once for all runs of a comparison.

    Attributes:
        recipe: The recipe of the run or of the comparison, as it is continued where an earlier version began it.
        task: Encodes the rows, and evaluates models on them.
        teacher: In eval mode; fine-tuned where the recipe says so.
        precision: Number type in which students are trained and all models evaluated.
        teacher_precision: Number type in which the teacher is scored and teaches.
        fingerprints: Fingerprints of teacher, tokenizers and data, by name.
        notes: What a reader of the results has to know.
        students: Number of students that the teacher will teach.
        memo: Results that the runs of the job share; the only attribute that changes.
        inputs: Settings that made the teacher, known without loading it.
        drawn: Training rows of one student; None: all, in their order.
        vocabulary: The tokens that students know, where these are not all of the teacher's.
        whole: The same with all tokens of the teacher, where students know some of them; None: they know all.
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
    drawn: DrawnRows | None = None
    vocabulary: VocabularyRecord | None = None
    whole: "Job | None" = None

    def for_start(self, recipe: Recipe) -> "Job":
        """The job of one student, whose start reads rows that `student.start_seed` draws.

        Of a `data.train_share`, it learns from those rows alone; teacher and caches know all rows.
        """
        seed, share = recipe.student.start_seed, recipe.data.train_share
        if seed is None and share is None:
            return self
        drawn = draw_rows(self.encoded.splits["train"], seed=seed, share=share)
        return replace(self, drawn=drawn, memo=self.memo.of_start(f"{seed} {share}"))

    @property
    def encoded(self) -> EncodedRows:
        """All rows as both models read them."""
        return self.task.encode()

    @property
    def splits(self) -> Mapping[str, list[EncodedRow]]:
        """Encoded rows by split; of the training rows those that students learn from."""
        splits = self.encoded.splits
        return splits if self.drawn is None else {**splits, "train": self.drawn.training}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer."""
        return self.encoded.tokenizer

    def batches(
        self, split: str, *, num_rows: int | None = None, batch_size: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Batches of all rows of a split, or of its first `num_rows`; training rows as they were drawn for a start."""
        drawn = self.drawn if split == "train" else None
        rows = self.encoded.splits[split] if drawn is None else drawn.first
        return self.encoded.collated(rows[:num_rows], batch_size=batch_size or self.recipe.training.batch_size)

    def calibration(self, recipe: Recipe) -> list[dict[str, Tensor]]:
        """The calibration rows in the teacher's encoding, under the names that a single encoding has."""
        batches = self.batches("train", num_rows=recipe.student.calibration_rows)
        return [{**model_inputs(self.teacher, batch, as_teacher=True), "labels": batch["labels"]} for batch in batches]

    def width(self, model: PreTrainedModel, layer: int = HEAD_INPUT, *, as_teacher: bool = False) -> int:
        """Width of a model's state at a layer, read from a forward and never from the config."""
        batch = next(self.batches("test", num_rows=1))
        inputs = {
            key: value.to(model.device) for key, value in model_inputs(model, batch, as_teacher=as_teacher).items()
        }
        positions = supervised_mask(model, inputs, batch["labels"].to(model.device)) if self.writes_text else None
        with torch.no_grad():
            states, _ = states_and_logits(model, inputs, (layer,), positions=positions)
        return int(states[layer].shape[-1])

    @property
    def writes_text(self) -> bool:
        """Whether models answer in words; otherwise they classify rows."""
        return isinstance(self.data, GenerationData)

    @property
    def reported(self) -> "Job":
        """The job whose teacher is the one that a student is compared with: it knows all of its tokens."""
        return self if self.whole is None else self.whole

    def predict_teacher(self) -> Any:
        """What the teacher says about the test rows, in its own tokens; said once for all runs with this teacher."""
        job = self.reported
        task, teacher = job.task, job.teacher
        return remembered(
            "teacher's answers to the test rows",
            {
                **job.fingerprints,
                **engine_of(teacher, autocast_dtype(job.precision)),
                **task.asked(teacher),
                "of": "test rows",
            },
            lambda: task.predict(teacher, teacher=teacher),
            pack=task.pack,
            unpack=lambda stored: task.unpack(stored, teacher),
        )

    def predict(self, model: PreTrainedModel, *, followed: Any = None, is_untrained: bool = False) -> Any:
        """What a model says about the test rows, in the same precision for every model of a run.

        Args:
            followed: What `predict_teacher` returned, which saves passes of the teacher.
            is_untrained: As in `Task.predict`.
        """
        # Of a vocabulary that was cut, the teacher that is followed knows other tokens than the one reported.
        reusable = followed if self.whole is None else None
        return self.task.predict(model, teacher=self.teacher, followed=reusable, is_untrained=is_untrained)

    def for_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Job":
        """The same test rows in the encoding of a model that is neither teacher nor student.

        Raises:
            VocabularyError: It has other classes, or its tokenizer is another model's.
            DataError: It reads fewer tokens than the longest row may have.
        """
        ensure_pad_token(tokenizer)
        model.config.pad_token_id = tokenizer.pad_token_id
        task = self.task.for_model(model, tokenizer)
        check_ids(model, task.encode().splits, tokenizer, where="evaluate")
        return replace(self, task=task)


def prepare(
    recipe: Recipe,
    *,
    students: int = 1,
    resumes: Resumes = "nothing",
    stop_at_weak: bool = True,
    variants: Mapping[str, Recipe] | None = None,
) -> Job:
    """Check everything that can be checked, then load rows, tokenizers and the teacher.

    Args:
        students: Number of students that the teacher will teach.
        resumes: What is continued in the run folder, and therefore has to belong to this recipe.
        stop_at_weak: Refuse a teacher that does not know the task, before time is spent on it.
        variants: As in `preflight`.

    Raises:
        FlexKDError: Whatever is wrong with recipe, rows or models, before anything is trained.
    """
    recipe, checks = _checked(recipe, resumes, variants)
    # The task itself reports on the chat template, that of the tokenizer which is loaded below.
    notes = _warned(note for note in checks.notes if not note.startswith(TEMPLATE_NOTE))
    configs, data = _read(recipe, checks)
    taught_data = with_teacher_answers(data, recipe.data.teacher_answers) if isinstance(data, GenerationData) else data
    teacher_tokenizer, tokenizer = load_tokenizers(recipe)
    notes += filter(None, map(ensure_pad_token, {id(t): t for t in (teacher_tokenizer, tokenizer)}.values()))
    if recipe.student.start == "slice":
        check_family(configs["teacher"].model_type, writes_text=recipe.generation is not None)
    opened = partial(open_task, recipe, tokenizer=tokenizer, teacher_tokenizer=teacher_tokenizer, configs=configs)
    task, more_notes = opened(data)
    for name, config in configs.items():
        task.check_config(name, config)
    taught_task = task if taught_data is data else opened(taught_data)[0]
    student_config = configs.get("student", configs["teacher"])
    notes += _warned(check_passes(recipe, taught_task.encode().splits["train"], student_config))
    # Fine-tuned on the answers of the data: a teacher tuned on its own answers would not be the one that wrote them.
    rows = row_fingerprints(recipe, data.fingerprint, task)
    teacher = load_teacher(recipe, task, teacher_tokenizer, rows)
    teacher.config.pad_token_id = teacher_tokenizer.pad_token_id
    notes += _warned(task.loader.notes_on_model(teacher, where="teacher.model"))
    models = _model_fingerprints(teacher, teacher_tokenizer, tokenizer)
    notes += look_at_teacher(recipe, task, teacher, stop=stop_at_weak, made_of={**models, **rows})
    task = taught_task
    taught_data = task.data if isinstance(task, GenerationTask) else taught_data  # without rows it cannot write
    notes += [*_row_notes(recipe, data), *taught_data.notes, *task.encode().notes, *more_notes]
    job = Job(
        recipe=recipe,
        data=taught_data,
        task=task,
        teacher_tokenizer=teacher_tokenizer,
        teacher=teacher,
        precision=resolve_precision(recipe.training.precision),
        teacher_precision=resolve_precision(recipe.teacher.precision),
        fingerprints={**models, **row_fingerprints(recipe, taught_data.fingerprint, task)},
        notes=tuple(dict.fromkeys(notes)),
        students=students,
        inputs=teacher_inputs(recipe, checks.teacher),
    )
    _check_same_files(job)
    return job if recipe.student.vocabulary is None else _with_cut_vocabulary(job)


def _check_processes(recipe: Recipe) -> None:
    """Refuse processes that would do different work, or leave it in different places.

    Raises:
        ProcessError: Their recipes differ, or one does not see the folders of the first.
    """
    if num_processes() == 1:
        return
    for section, values in recipe.model_dump(mode="json").items():
        check_alike(section, json.dumps(values), advice="Start all with the same recipe.")
    folders = [recipe.folder]
    if recipe.teacher.fine_tune is not None or recipe.rivals is not None:
        folders.append(home_folder("teachers"))
    if recipe.cache_folder.parent != recipe.folder:
        folders.append(recipe.cache_folder)
    for folder in folders:
        check_shared(folder)


def _check_same_files(job: Job) -> None:
    for name, fingerprint in sorted(job.fingerprints.items()) if num_processes() > 1 else ():
        check_alike(name, fingerprint, advice="Give all processes the same files.")


def _with_cut_vocabulary(job: Job) -> Job:
    """The job whose teacher, as it teaches, and whose students know the tokens of `student.vocabulary` alone."""
    cut = cut_to_vocabulary(job.recipe, job.data, job.task, job.teacher, job.teacher_tokenizer)
    whole = replace(job, data=cut.data, task=cut.whole_task)
    return replace(
        whole,
        task=cut.task,
        teacher=cut.teacher,
        teacher_tokenizer=cut.tokenizer,
        fingerprints={**job.fingerprints, **_model_fingerprints(cut.teacher, cut.tokenizer, cut.tokenizer)},
        notes=(*job.notes, cut.record.describe()),
        whole=whole,
        vocabulary=cut.record,
    )


def _checked(recipe: Recipe, resumes: Resumes, variants: Mapping[str, Recipe] | None) -> tuple[Recipe, Preflight]:
    """The recipe as its run folder continues it, after the errors of its checks, if there are any."""
    join()
    with in_turn():
        checks = preflight(recipe, resumes=resumes, variants=variants)
        checks.raise_errors()
        recipe, _ = continued(recipe)
        hold_folder(recipe.folder)
        if recipe.training.compile:
            check_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    _check_processes(recipe)
    return recipe, checks


def _read(recipe: Recipe, checks: Preflight) -> tuple[dict[str, PreTrainedConfig], ClassificationData | GenerationData]:
    """The configs of the models, and the rows; the first process may have to convert and to fetch them."""
    with in_turn():
        configs = _configs(recipe)
        return configs, _rows(recipe, checks, configs["teacher"])


def _configs(recipe: Recipe) -> dict[str, PreTrainedConfig]:
    """The configs of the models that a recipe names, by `teacher` and `student`."""
    sources = {"teacher": recipe.teacher.model, "student": recipe.student.model}
    return {name: load_config(source, where=f"{name}.model") for name, source in sources.items() if source}


def _row_notes(recipe: Recipe, data: ClassificationData | GenerationData) -> tuple[str, ...]:
    share = recipe.data.train_share
    if share is None:
        return _label_notes(data)
    note = f"data.train_share: students learn from {share:.3g} of the training rows, the teacher from all."
    return (*_label_notes(data), note)


def _model_fingerprints(
    teacher: PreTrainedModel, teacher_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    return {
        "teacher": model_fingerprint(teacher),
        "teacher_tokenizer": tokenizer_fingerprint(teacher_tokenizer),
        "student_tokenizer": tokenizer_fingerprint(tokenizer),
    }


def _warned(notes: Iterable[str]) -> list[str]:
    """Log the notes as warnings, and return them."""
    warned = list(notes)
    for note in warned:
        logger.warning("%s", note)
    return warned


def _rows(recipe: Recipe, checks: Preflight, teacher: PreTrainedConfig) -> ClassificationData | GenerationData:
    """The rows that the preflight read; read now if they, or the teacher's labels, were not on this machine then."""
    labels = teacher_labels(recipe, label_entries(teacher))
    if checks.data is not None and labels == checks.teacher_labels:
        return checks.data
    data = read_rows(recipe, labels)
    _warned(_label_notes(data))
    return data


def _label_notes(data: ClassificationData | GenerationData) -> tuple[str, ...]:
    return data.label_notes if isinstance(data, ClassificationData) else ()


def row_fingerprints(recipe: Recipe, data: str, task: Task[Any]) -> dict[str, str]:
    """Fingerprints of what encoded rows depend on besides the tokenizers."""
    layout = task.format.fingerprints() if isinstance(task, GenerationTask) else {}
    return {**row_settings(recipe, data), **layout}


def load_tokenizers(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The teacher's and the student's tokenizer; one object where both are the same."""
    teacher = load_tokenizer(recipe.teacher.tokenizer or recipe.teacher.model, where="teacher.tokenizer")
    if recipe.generation is not None:
        _ensure_end(teacher, recipe.teacher.model, "teacher.model")
    source = recipe.student.tokenizer or (recipe.student.model if recipe.student.start == "pretrained" else None)
    if source is None:
        return teacher, teacher
    student = load_tokenizer(source, where="student.tokenizer")
    if recipe.generation is not None:
        _ensure_end(student, recipe.student.model or recipe.teacher.model, "student.model")
    is_same = same_tokenizer(teacher, student) and teacher.chat_template == student.chat_template
    return teacher, teacher if is_same else student


def _ensure_end(tokenizer: PreTrainedTokenizerBase, source: str, where: str) -> None:
    """Give a tokenizer that names no end of text the one of its checkpoint."""
    note = ensure_end_token(tokenizer, source_ends(source, where=where)) if tokenizer.eos_token is None else None
    if note is not None:
        logger.warning("%s", note)
