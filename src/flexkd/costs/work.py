"""Operations and time of a run, stage by stage."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from flexkd.core.tensors import Number
from flexkd.costs.devices import Device
from flexkd.costs.flops import BACKWARD, forward_flops, head_flops
from flexkd.costs.result import StageWork
from flexkd.costs.rows import Load, RowLengths
from flexkd.costs.skeletons import Skeletons
from flexkd.models.forward.hidden import HEAD_INPUT
from flexkd.recipe import Recipe
from flexkd.recipe.model_sections import FineTune
from flexkd.recipe.taught_features import cut_choice, keys_of_loss, reads_geometry, taught_choice, unit_attributions
from flexkd.recipe.training_sections import TrainingSection
from flexkd.tasks.generation import UNTRAINED_ROWS
from flexkd.training.arguments import RunSettings

_FLOAT64 = 2
"""Operations in float32 that take the time of one in float64."""

TeacherRuns = Literal["always", "once", "never"]
"""On every batch of training, on each row once before training, or not at all."""


def settings_of(section: TrainingSection | FineTune) -> RunSettings:
    """The settings that the run itself would make of a section."""
    options = section.model_dump(include=set(RunSettings.__dataclass_fields__) - {"precision"})
    return RunSettings(precision="auto", metric="", **options)


@dataclass(frozen=True)
class Worker:
    """Operations and time of one recipe on one device.

    Attributes:
        models: Teacher and student, the student without low-rank updates.
        lengths: How long the rows are.
        device: The device it runs on.
        teacher_runs: When the teacher answers the rows that the student learns from.
        processes: Processes, each with a device of its own, that divide all rows.
    """

    recipe: Recipe
    models: Skeletons
    lengths: RowLengths
    device: Device
    teacher_runs: TeacherRuns = "always"
    processes: int = 1

    def seconds(self, flops: Number, precision: str) -> float:
        """Time in which the processes together do these operations; those of one CPU share its cores."""
        alone = self.device.seconds(flops, precision)
        return alone if self.device.is_cpu else alone / self.processes

    def units(self) -> tuple[StageWork, ...]:
        """Scoring, one pass of the teacher over 1,000 training rows, and one step of the student."""
        batch = self.recipe.training.batch_size
        return (
            *self._scorings(),
            self._pass("the teacher reads 1,000 rows", self.models.teacher, self._load("train", 1000), self.taught_in),
            self._training(f"one step of {batch} rows", 1),
        )

    def run(self) -> tuple[StageWork, ...]:
        """All stages; none where the number of rows is not known."""
        steps = self.steps()
        return () if self._count("train") is None or steps is None else tuple(self._stages(steps))

    def steps(self) -> int | None:
        """Optimizer steps of the student's training; None: depends on the number of rows, which is not known."""
        rows = self._count("train")
        if rows is None:
            return self.recipe.training.max_steps
        return settings_of(self.recipe.training).steps(math.ceil(rows * (self.recipe.data.train_share or 1)))

    def passes(self) -> float | None:
        """How often training goes over all rows, within its limit in minutes if it has one; None: not known."""
        rows, section, steps = self._count("train"), self.recipe.training, self.steps()
        if not rows or steps is None:
            return None
        passes = steps * section.batch_size / rows
        if section.max_minutes is None:
            return passes
        return min(passes, passes * 60 * section.max_minutes / self._training("", self.steps() or 1).seconds)

    def student_seconds(self) -> Number | None:
        """Time of the student's training and its evaluations; None where the number of rows is not known."""
        steps = self.steps()
        if self._count("train") is None or steps is None:
            return None
        training = _limited(self._training("", steps), self.recipe.training.max_minutes)
        return training.seconds + self._evaluations().seconds + self._closing().seconds

    def _stages(self, steps: int) -> Iterator[StageWork]:
        fine_tune, models = self.recipe.teacher.fine_tune, self.models
        if fine_tune is not None:
            yield self._fine_tuning(fine_tune)
        yield from self._scorings()
        if self.recipe.student.start == "slice":
            # Rows that the geometry reads too are read once for both.
            shared = self._scored_load().num_rows if models.is_rotated and self._cut_reads_geometry else 0
            rows = self.recipe.student.calibration_rows - shared
            if rows > 0:
                yield self._pass("student's start", models.teacher, self._load("train", rows), "float32")
        if self.teacher_runs == "once":
            load = self._load("train").plus(self._load("validation"))
            yield self._pass("teacher's answers to all rows", models.teacher, load, self.taught_in)
        yield _limited(
            self._training(self._at_most(f"training, {steps:,} steps"), steps), self.recipe.training.max_minutes
        )
        yield self._evaluations()
        yield from self._rivals(steps)
        yield self._closing()

    @property
    def learnt_in(self) -> str:
        """Precision of the student's forward."""
        return self.device.resolved(self.recipe.training.precision)

    @property
    def taught_in(self) -> str:
        """Precision of the teacher's forward."""
        return self.device.resolved(self.recipe.teacher.precision)

    @property
    def scored_in(self) -> str:
        """Precision of unit scores; not float16, in which small gradients become 0."""
        return "float32" if self.taught_in == "float16" else self.taught_in

    def _count(self, split: str) -> int | None:
        return self.lengths.splits[split].num_rows

    def _load(self, split: str, num_rows: Number | None = None) -> Load:
        """The load of `num_rows` rows of a split; None: of all its rows."""
        lengths = self.lengths.splits[split]
        return lengths.whole() if num_rows is None else lengths.load(num_rows)

    def _pass(self, name: str, model: PreTrainedModel, load: Load, precision: str) -> StageWork:
        batches = load.num_rows / self.recipe.training.batch_size
        flops = forward_flops(model, load, batches=batches)
        return StageWork(name, flops, self.seconds(flops, precision))

    def _learning(self, name: str, model: PreTrainedModel, load: Load, precision: str, forwards: Number) -> StageWork:
        once = self._pass(name, model, load, precision)
        return StageWork(name, forwards * once.flops, forwards * once.seconds)

    def _scorings(self) -> Iterator[StageWork]:
        """What measures units or directions, where something reads it."""
        recipe, rotated = self.recipe, self.models.is_rotated
        attributions = unit_attributions(recipe, rotated=rotated)
        cut = cut_choice(recipe, rotated=rotated)
        scores_directions = cut is not None and cut.kind == "directions" and cut.over_layers
        if scores_directions or any(attribution != "random" for attribution in attributions):
            yield self._scoring()
        choices = (cut, taught_choice(recipe, rotated=rotated))
        if keys_of_loss(recipe) or any(map(reads_geometry, choices)):
            yield self._geometry()

    @property
    def _cut_reads_geometry(self) -> bool:
        return reads_geometry(cut_choice(self.recipe, rotated=self.models.is_rotated))

    def _scored_load(self) -> Load:
        """The rows that are scored."""
        rows, requested = self._count("train"), self.recipe.scores.rows
        scored = requested if rows is None else min(requested or rows, rows)
        return self._load("train", 1000 if scored is None else scored)

    def _geometry(self) -> StageWork:
        """The functional geometry of the head's input: a forward, and a product with the head's weight in float64."""
        load, teacher = self._scored_load(), self.models.teacher
        once = self._pass(f"geometry of {load.num_rows:,.0f} rows", teacher, load, "float32")
        product = head_flops(teacher, load)
        seconds = once.seconds + self.seconds(_FLOAT64 * product, "float32")
        return StageWork(once.name, once.flops + product, seconds)

    def _scoring(self) -> StageWork:
        section, teacher = self.recipe.scores, self.models.teacher
        load = self._scored_load()
        precision = self.scored_in
        once = self._pass(f"scores of {load.num_rows:,.0f} rows", teacher, load, precision)
        # Scores at the head take two backward passes through the head alone; those below, one through the body as well.
        flops = once.flops + 2 * head_flops(teacher, load)
        if section.layers != (HEAD_INPUT,):
            flops += once.flops
        return StageWork(once.name, flops, self.seconds(flops, precision))

    def _fine_tuning(self, section: FineTune) -> StageWork:
        load = self._load("train")
        steps = settings_of(section).steps(self._count("train") or 1)
        passes = steps * section.batch_size / max(load.num_rows, 1)
        name = f"teacher's fine-tuning, {steps:,} steps"
        forwards = 1 + BACKWARD + section.gradient_checkpointing
        work = self._learning(name, self.models.whole_teacher, load.times(passes), self.taught_in, forwards)
        return _limited(work, section.max_minutes)

    def _training(self, name: str, steps: int) -> StageWork:
        return self.training_of(self._load("train", steps * self.recipe.training.batch_size), name)

    def training_of(self, load: Load, name: str = "training") -> StageWork:
        """Training of the student on some rows."""
        # Frozen weights need no gradient: the backward pass computes those of the activations alone.
        backward = BACKWARD if self.recipe.student.lora is None else 1
        forwards = 1 + backward + self.recipe.training.gradient_checkpointing
        student = self._learning(name, self.models.student, load, self.learnt_in, forwards)
        if self.teacher_runs != "always":
            return student
        teacher = self._pass(name, self.models.teacher, load, self.taught_in)
        return StageWork(name, student.flops + teacher.flops, student.seconds + teacher.seconds)

    def _evaluations(self) -> StageWork:
        times = self.recipe.training.evaluations
        load = self._load("validation").times(times)
        student = self._pass("", self.models.student, load, self.learnt_in)
        taught = self._pass("", self.models.teacher, load.times(int(self.teacher_runs == "always")), self.taught_in)
        name = self._at_most(f"{times} evaluation{'s' * (times != 1)} on {self._count('validation') or 0:,} rows")
        return StageWork(name, student.flops + taught.flops, student.seconds + taught.seconds)

    def _at_most(self, name: str) -> str:
        """The name of a stage that early stopping can end."""
        return name if self.recipe.training.early_stopping is None else f"{name}, at most"

    def _rivals(self, steps: int) -> Iterator[StageWork]:
        """Rivals of the student: fine-tuned for as many steps, and asked the test rows; in int8 as fast as before."""
        section = self.recipe.rivals
        if section is not None and section.int8_teacher:
            yield self._pass("rival teacher in int8: test rows", self.models.whole_teacher, self._tested(), "float32")
        load = self._load("train", steps * self.recipe.training.batch_size)
        forwards = 1 + BACKWARD + self.recipe.training.gradient_checkpointing
        for name, model in self.models.rivals.items():
            work = self._learning("", model, load, self.learnt_in, forwards)
            tested = self._pass("", model, self._tested(), self.learnt_in)
            short = name.rstrip("/").rpartition("/")[2]
            title = f"rival {short}: {steps:,} steps, test rows"
            yield StageWork(title, work.flops + tested.flops, work.seconds + tested.seconds)

    def _tested(self) -> Load:
        """The test rows; those that are answered too, where text is written, twice."""
        load = self._load("test")
        if self.recipe.generation is None:
            return load
        return load.plus(self._load("test", self.recipe.generation.rows or self._count("test") or 0))

    def _closing(self) -> StageWork:
        """Teacher and student, before and after training, on the test rows; language models also generate answers.

        Of these rows their likelihood is measured, and the untrained student answers few.
        """
        load = before = self._tested()
        if self.recipe.generation is not None:
            rows = self.recipe.generation.rows or self._count("test") or 0
            before = self._load("test", rows).plus(self._load("test", min(rows, UNTRAINED_ROWS)))
        models = self.models
        passes = [
            self._pass("", model, part, self.learnt_in)
            for model, part in ((models.whole_teacher, load), (models.student, before), (models.student, load))
        ]
        return StageWork("test rows, three models", sum(w.flops for w in passes), sum(w.seconds for w in passes))


def _limited(work: StageWork, minutes: Number | None) -> StageWork:
    """The stage, cut short where the recipe limits its minutes."""
    if minutes is None or work.seconds <= 60 * minutes:
        return work
    share = 60 * minutes / work.seconds
    return StageWork(work.name, share * work.flops, share * work.seconds, is_limited=True)
