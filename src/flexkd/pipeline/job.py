"""What the runs of a recipe share: checked and encoded rows, tokenizers, and the teacher that knows the task."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.encoded import EncodedRow
from flexkd.data.encoding.tokenizers import ensure_pad_token
from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.generation import GenerationData
from flexkd.data.examples.teacher_answers import with_teacher_answers
from flexkd.models.forward.autocast import resolve_precision
from flexkd.models.forward.compilation import check_compiler
from flexkd.models.forward.hidden import HEAD_INPUT, model_inputs, states_and_logits, supervised_mask
from flexkd.models.loading.pretrained import load_config, model_fingerprint, tokenizer_fingerprint
from flexkd.pipeline.opening import check_ids, load_tokenizers, open_task
from flexkd.pipeline.shared_work import SharedWork
from flexkd.pipeline.teacher import load_teacher
from flexkd.preflight import Preflight, Resumes, check_family, preflight, read_rows, teacher_labels
from flexkd.preflight.generation import TEMPLATE_NOTE
from flexkd.preflight.run_folder import teacher_inputs
from flexkd.recipe import Recipe
from flexkd.recipe.fingerprints import row_settings
from flexkd.tasks.classifiers import label_entries
from flexkd.tasks.generation import GenerationTask
from flexkd.tasks.generation_rows import check_pass_size
from flexkd.tasks.sanity import look_at_teacher
from flexkd.tasks.task import EncodedRows, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Loaded once for a run, or for all runs of a comparison, which share it.

    Attributes:
        recipe: Of the run, or of the comparison.
        task: Rows, and how models are evaluated on them.
        teacher: In eval mode, knows the task.
        precision: In which students are trained and all models evaluated.
        teacher_precision: In which the teacher is scored and teaches.
        fingerprints: Of teacher, tokenizers and data.
        notes: What a reader of the results has to know.
        students: How many students the teacher will teach.
        memo: What was computed of the teacher once and serves every run; it alone changes.
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
        """The student's tokenizer."""
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
        positions = supervised_mask(model, inputs, batch["labels"].to(model.device)) if self.writes_text else None
        with torch.no_grad():
            states, _ = states_and_logits(model, inputs, (layer,), rows=positions)
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
            VocabularyError: It has other classes, or its tokenizer is another model's.
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
        students: How many the teacher will teach.
        resumes: What is continued in the run folder, and so has to belong to the recipe.
        stop_at_weak: Refuse a teacher that does not know the task, because time will be spent on it.

    Raises:
        FlexKDError: Whatever is wrong with recipe, rows or models, before anything is trained.
    """
    checks = preflight(recipe, resumes=resumes)
    checks.raise_errors()
    if recipe.training.compile:
        check_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    # What is said of a template is said again by the task, of the tokenizer that is loaded.
    notes = _warned(note for note in checks.notes if not note.startswith(TEMPLATE_NOTE))
    sources = {"teacher": recipe.teacher.model, "student": recipe.student.model}
    configs = {name: load_config(source, where=f"{name}.model") for name, source in sources.items() if source}
    data = _rows(recipe, checks, configs["teacher"])
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
    teacher = load_teacher(recipe, task, teacher_tokenizer, _row_fingerprints(recipe, data.fingerprint, task))
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
        inputs=teacher_inputs(recipe, checks.teacher),
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


def _rows(recipe: Recipe, checks: Preflight, teacher: PreTrainedConfig) -> ClassificationData | GenerationData:
    """The rows as they were checked; read here where they, or the labels of the teacher, were not on this machine."""
    labels = teacher_labels(recipe, label_entries(teacher))
    if checks.data is not None and labels == checks.teacher_labels:
        return checks.data
    data = read_rows(recipe, labels)
    _warned(_label_notes(data))
    return data


def _label_notes(data: ClassificationData | GenerationData) -> tuple[str, ...]:
    return data.label_notes if isinstance(data, ClassificationData) else ()


def _row_fingerprints(recipe: Recipe, data: str, task: Task[Any]) -> dict[str, str]:
    """What decides the features of the rows besides the tokenizers."""
    layout = task.format.fingerprints() if isinstance(task, GenerationTask) else {}
    return {**row_settings(recipe, data), **layout}
