"""One recipe: its sections, held together by the rules between them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator

from flexkd.files import local_path
from flexkd.recipe.document import write_yaml
from flexkd.recipe.model_sections import ScoresSection, StudentSection, TeacherSection
from flexkd.recipe.problem import BrokenRulesError
from flexkd.recipe.rules import (
    cache_problems,
    models_problems,
    objective_problems,
    student_problems,
    training_problems,
)
from flexkd.recipe.section import GENERATION_TASKS, Section
from flexkd.recipe.task_rules import generation_problems, task_problems
from flexkd.recipe.task_sections import DataSection, GenerationSection, TaskSection
from flexkd.recipe.training_sections import CompareSection, ObjectiveSection, TrainingSection
from flexkd.recipe.values import Text


class Recipe(Section):
    """One job: a teacher, a task, a student, and how the one teaches the other."""

    name: Text
    """Name of the job, in the run folder, the report and the model card."""
    output: Text
    """Run folder; runs/NAME unless given."""
    task: TaskSection = TaskSection()
    """What the models must do, and how it is judged."""
    data: DataSection
    """Where the rows come from."""
    generation: GenerationSection | None = None
    """How answers are written and judged; only where the task is to write text, and there {} unless given."""
    teacher: TeacherSection
    """The model that teaches."""
    student: StudentSection
    """The model that learns."""
    scores: ScoresSection = ScoresSection()
    """How much the task uses each unit of the teacher."""
    objective: ObjectiveSection = ObjectiveSection()
    """The sum that training makes small."""
    training: TrainingSection = TrainingSection()
    """How the student is trained."""
    compare: CompareSection | None = None
    """Methods and seeds of `flexkd compare`."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Defaults that hang on another section."""
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        if filled.get("output") is None:
            filled["output"] = f"runs/{filled.get('name', '')}"
        task = filled.get("task")
        if not isinstance(task, Mapping):
            return filled
        if task.get("problem") == "regression":
            _default(filled, ("objective", "logits"), loss="mse")
            if _inner(filled, ("objective", "logits")).get("loss") == "mse":
                _default(filled, ("objective", "logits"), temperature=1.0)
        if task.get("type") in GENERATION_TASKS:
            _default(filled, ("objective", "logits"), temperature=1.0)
            _default(filled, ("objective", "features"), positions="supervised")
            _default(filled, ("data",), max_length=512)
            _default(filled, ("generation",))
        return filled

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if name != name.strip() or name in (".", "..") or any(sign in name for sign in '/\\:\n\t"<>|?*'):
            raise ValueError(f"{name!r} cannot name a folder. Use letters, digits, '-', '_' and '.'.")
        return name

    @model_validator(mode="after")
    def _obeys_rules(self) -> "Recipe":
        problems = [
            *task_problems(self.task, self.data),
            *generation_problems(self.task, self.data, self.generation),
            *models_problems(self.teacher, self.student),
            *student_problems(self.student),
            *objective_problems(self.task, self.scores, self.objective),
            *cache_problems(self.teacher, self.objective),
            *training_problems(self.task, self.teacher, self.training),
        ]
        if problems:
            raise BrokenRulesError(problems)
        return self

    @property
    def folder(self) -> Path:
        """The run folder as a path, `~` and variables of the environment written out."""
        return local_path(self.output, where="output")

    def to_yaml(self) -> str:
        """The recipe with every default written out; `load_recipe` reads the same recipe back."""
        return write_yaml(_plain(self.model_dump()))


def _inner(values: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    """The section at a path; empty where it is not there or is no section."""
    for key in path:
        found = values.get(key, {})
        values = found if isinstance(found, Mapping) else {}
    return values


def _default(values: dict[str, Any], path: Sequence[str], **defaults: Any) -> None:
    """Fill keys of a section that are not given; a section that is null or no section stays as it is."""
    key, *below = path
    section = values.get(key, {})
    if section is None and key == "generation":
        section = {}
    if not isinstance(section, Mapping):
        return
    filled = dict(section)
    if below:
        _default(filled, below, **defaults)
    values[key] = filled if below else {**defaults, **filled}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
