"""One student from the teacher's unit scores to trained weights: select, start, pair, train."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.models.forward.autocast import scoring_dtype
from flexkd.models.forward.engine import engine_of
from flexkd.pipeline.job import Job
from flexkd.pipeline.pairing import build_objective, pair_layers
from flexkd.pipeline.scores import are_scores_read, unit_scores
from flexkd.pipeline.start import Start, start_student, start_units
from flexkd.pipeline.student_training import train_student
from flexkd.recipe import Recipe
from flexkd.recipe.fingerprints import selection_settings
from flexkd.run_files import SELECTION_FILE
from flexkd.scoring.selection_file import Selection, load_selection, save_selection


@dataclass(frozen=True)
class Run:
    """One student of a job, from nothing to its trained weights.

    A teacher is wider than a task needs. `select` scores how much the task's answers depend on each unit of its hidden
    state. `start` makes a narrower student, by default cut out of the teacher along the units that score highest.
    `objective` pairs units of the student with those of the teacher and says what is minimised: labels, the teacher's
    logits, and the correlation of each pair. `train` minimises it.

        run = Run(prepare(recipe), recipe, recipe.folder)
        selection = run.select()
        start = run.start(selection)
        selection, objective = run.objective(start, selection)
        student, log = run.train(start, objective)

    Attributes:
        job: Rows, tokenizers and teacher, shared with the other runs of a comparison; its memo holds what was computed
            of the teacher for any of them.
        recipe: How this student starts and learns.
        folder: Scores and checkpoints of this run; a second run in it continues from them.
    """

    job: Job
    recipe: Recipe
    folder: Path

    def select(self) -> Selection:
        """Scores of the teacher's units, and the units that a sliced student is cut by.

        Read from the folder where they are there. Scores that nothing would read are not computed.

        Raises:
            ArtifactError: The folder's scores belong to something else.
        """
        path = self.folder / SELECTION_FILE
        if path.is_file():
            return load_selection(path, self.made_of)
        scores = unit_scores(self.job, self.recipe) if are_scores_read(self.job, self.recipe) else ()
        return self._saved(Selection(scores, start_units(self.job, self.recipe, scores)))

    def score(self) -> Selection:
        """As `select`, with scores whether anything reads them or not."""
        selection = self.select()
        if selection.scores:
            return selection
        return self._saved(replace(selection, scores=unit_scores(self.job, self.recipe)))

    def start(self, selection: Selection) -> Start:
        """The untrained student: sliced, loaded, or made from a config."""
        return start_student(self.job, self.recipe, selection.start_units)

    def objective(self, start: Start, selection: Selection) -> tuple[Selection, Objective]:
        """Pairs of units, stored beside the scores, and the objective that teaches them."""
        layers = selection.layers
        if layers is None:
            layers = pair_layers(self.job, self.recipe, start, selection)
            selection = self._saved(replace(selection, layers=layers))
        return selection, build_objective(self.job, self.recipe, layers, start.student)

    def train(self, start: Start, objective: Objective) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
        """The trained student, and the log of its training; an interrupted one continues from its last checkpoint."""
        return train_student(self.job, self.recipe, start, objective, self.folder / "checkpoints")

    @property
    def made_of(self) -> dict[str, str]:
        """Everything that scores and pairs depend on, as it is stored with them."""
        engine = engine_of(self.job.teacher, scoring_dtype(self.job.teacher_precision))
        return {**self.job.fingerprints, **engine, **selection_settings(self.recipe)}

    def _saved(self, selection: Selection) -> Selection:
        save_selection(self.folder / SELECTION_FILE, selection, self.made_of, self.job.inputs)
        return selection
