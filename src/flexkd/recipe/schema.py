"""One recipe: its sections, held together by the rules between them."""

from collections.abc import Mapping
from typing import Any

from pydantic import field_validator, model_validator

from flexkd.recipe.document import write_yaml
from flexkd.recipe.rules import (
    BrokenRulesError,
    objective_problems,
    student_problems,
    task_problems,
    training_problems,
)
from flexkd.recipe.sections import (
    CompareSection,
    DataSection,
    ObjectiveSection,
    ScoresSection,
    Section,
    StudentSection,
    TaskSection,
    TeacherSection,
    TrainingSection,
)
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
        task, objective = filled.get("task"), filled.get("objective", {})
        if isinstance(task, Mapping) and task.get("problem") == "regression" and isinstance(objective, Mapping):
            logits = objective.get("logits", {})
            if isinstance(logits, Mapping) and logits.get("loss", "mse") == "mse":
                filled["objective"] = {**objective, "logits": {"loss": "mse", "temperature": 1.0, **logits}}
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
            *student_problems(self.student),
            *objective_problems(self.task, self.scores, self.objective),
            *training_problems(self.training),
        ]
        if problems:
            raise BrokenRulesError(problems)
        return self

    def to_yaml(self) -> str:
        """The recipe with every default written out; `load_recipe` reads the same recipe back."""
        return write_yaml(_plain(self.model_dump()))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
