"""Rivals of a student on the rows of its run: the teacher in int8, and small models fine-tuned on its labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.encoded import EncodedRow
from flexkd.data.encoding.tokenizers import ensure_pad_token
from flexkd.errors import DataError
from flexkd.evaluate.cost import Cost
from flexkd.models.forward.attention import prefer_short_rows_attention
from flexkd.models.loading.int8 import int8_copy
from flexkd.models.loading.pretrained import load_config
from flexkd.models.loading.saving import make_savable
from flexkd.pipeline.job import Job, load_tokenizers, row_fingerprints
from flexkd.pipeline.recording import Timed, describe_model
from flexkd.pipeline.teacher import fine_tuned_teacher, has_label
from flexkd.processes import in_turn
from flexkd.recipe.model_sections import StudentSection, TeacherSection
from flexkd.record import ModelRecord
from flexkd.tasks.opening import open_task
from flexkd.tasks.task import Task, check_ids
from flexkd.training.arguments import RunSettings

_INT8_TEACHER: Final = "teacher in int8"


@dataclass(frozen=True)
class OpenedRival:
    """A model that the recipe names, and the rows in its own tokens; its weights are not loaded yet.

    Attributes:
        where: The recipe key that names it.
        source: How the recipe names it.
        tokenizer: Its own.
        task: The task of the recipe on its own encoding of all rows.
    """

    where: str
    source: str
    tokenizer: PreTrainedTokenizerBase
    task: Task[Any]


@dataclass(frozen=True)
class Rival:
    """A rival, ready to be measured, with its results on the test rows.

    Attributes:
        name: In tables and charts.
        preparation: How it was made, in words.
        model: In eval mode, on the CPU.
        own_job: The job with the test rows in its own encoding.
        results: As those of any other model of the run.
        parameters: What int8 packs away from what can be counted; None: as it is counted.
    """

    name: str
    preparation: str
    model: PreTrainedModel
    own_job: Job
    results: Any
    parameters: int | None = None

    @property
    def timed(self) -> Timed:
        """The model for the measurement of its cost."""
        return Timed(self.model, own_job=self.own_job)

    def describe(self, teacher: Any, cost: Cost) -> ModelRecord:
        """Its metrics and costs, measured like every other model's.

        Args:
            teacher: The teacher's results.
            cost: From `model_costs`.
        """
        if self.parameters is not None:
            cost = replace(cost, parameters=self.parameters, dtype="int8")
        record = describe_model(self.own_job, "rival", self.model, self.results, teacher, cost)
        return replace(record, name=self.name, preparation=self.preparation)


def open_rivals(job: Job) -> list[OpenedRival]:
    """The models that the recipe names as rivals, each with its tokenizer and the rows that it reads.

    Raises:
        FlexKDError: One of them cannot read the rows; before anything is trained.
    """
    section = job.recipe.rivals
    return [] if section is None else [_open(job, source, index) for index, source in enumerate(section.models)]


def _open(job: Job, source: str, index: int) -> OpenedRival:
    where, job = f"rivals.models.{index}", job.reported
    # Teacher and student of its task are the rival itself.
    section = TeacherSection(model=source, precision=job.recipe.training.precision)
    recipe = job.recipe.model_copy(update={"teacher": section, "student": StudentSection()})
    config, (tokenizer, _) = load_config(source, where=where), load_tokenizers(recipe)
    ensure_pad_token(tokenizer)
    task, _ = open_task(recipe, job.data, tokenizer, tokenizer, {"teacher": config})
    task.check_config(where, config)
    if task.encode().ids("test") != job.encoded.ids("test"):
        raise DataError(
            f"{where}: '{source}' cannot read all test rows that the teacher reads, and metrics of other rows cannot "
            "be compared. Raise data.max_length, or leave it out."
        )
    return OpenedRival(where, source, tokenizer, task)


def run_rivals(job: Job, opened: Sequence[OpenedRival], settings: RunSettings, *, followed: Any) -> Iterator[Rival]:
    """Every rival of the recipe with its results on the test rows.

    Args:
        job: The job of the student, of whose training rows the models off the shelf learn.
        opened: From `open_rivals`.
        settings: How the student was trained, for as many steps as it took.
        followed: The teacher's results.
    """
    section = job.recipe.rivals
    if section is None:
        return
    if section.int8_teacher:
        teacher = job.reported.teacher
        model = int8_copy(teacher, where="rivals.int8_teacher")
        count = sum(parameter.numel() for parameter in teacher.parameters())
        own_job = job.reported.for_model(model, job.reported.teacher_tokenizer)
        results = own_job.predict(model, followed=followed)
        yield Rival(_INT8_TEACHER, _int8_words(job.precision), model, own_job, results, parameters=count)
    tuning = replace(settings, learning_rate=section.learning_rate, keep_checkpoints=1, report_to=())
    for rival in opened:
        rows = _rows_of_student(job, rival)
        model = _fine_tuned(job, rival, rows, tuning)
        words = (
            f"fine-tuned on the labels alone, {settings.max_steps} steps of {settings.batch_size} of the student's "
            f"{len(rows):,} training rows at learning rate {section.learning_rate:g}"
        )
        own_job = job.reported.for_model(model, rival.tokenizer)
        yield Rival(rival.source, words, model, own_job, own_job.predict(model, followed=followed))


def _int8_words(precision: str) -> str:
    """How the teacher in int8 was made, and what the other models compute in, where that is not float32."""
    others = "" if precision == "float32" else f", where the other models compute in {precision}"
    return (
        f"the teacher's linear layers in int8 by torch's dynamic quantization, all else in float32{others}; nothing is "
        "trained"
    )


def _rows_of_student(job: Job, rival: OpenedRival) -> list[EncodedRow]:
    """The training rows that the student learned from and that have a label, in the rival's encoding."""
    ids = {row["id"] for row in job.splits["train"]}
    return [row for row in rival.task.encode().splits["train"] if row["id"] in ids and has_label(row)]


def _fine_tuned(job: Job, rival: OpenedRival, rows: Sequence[EncodedRow], settings: RunSettings) -> PreTrainedModel:
    """The model fine-tuned as a teacher is, from the store of teachers if it was fine-tuned before."""
    recipe, task, encoded = job.recipe, rival.task, rival.task.encode()
    share = recipe.data.train_share
    drawn = {} if share is None else {"drawn": f"{share} of the rows by seed {recipe.student.start_seed}"}
    with in_turn():  # the first process may have to fetch it
        base, _ = task.loader.load(rival.source, where=rival.where, seed=settings.seed)
    base.config.pad_token_id = rival.tokenizer.pad_token_id
    check_ids(base, encoded.splits, rival.tokenizer, where=rival.where)
    prefer_short_rows_attention([base], recipe.data.max_length)
    make_savable(base, where=rival.where)
    return fine_tuned_teacher(
        base,
        rival.tokenizer,
        train=rows,
        validation=encoded.splits["validation"],
        collator=encoded.collator,
        settings=settings,
        validation_metrics=task.validation_metrics(),
        loss=task.loss,
        fingerprints={
            "problem": recipe.task.problem,
            **drawn,
            **row_fingerprints(recipe, job.reported.data.fingerprint, task),
        },
        load=lambda folder: task.loader.load(folder, where="teacher store", own_head=True)[0],
        description=rival.where,
    )
