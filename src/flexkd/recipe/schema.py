"""The recipe: its sections, and the rules between them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator

from flexkd.facts.losses import LOGIT_LOSSES_OF, WITHOUT_TEMPERATURE
from flexkd.facts.names import ALWAYS, AUTO, GENERATION_TASKS, NEVER
from flexkd.files import local_path
from flexkd.recipe.document import write_yaml
from flexkd.recipe.model_sections import ScoresSection, StudentSection, TeacherSection
from flexkd.recipe.objective_rules import cache_problems, objective_problems
from flexkd.recipe.problem import BrokenRulesError
from flexkd.recipe.renamed import may_be_rotated, renamed
from flexkd.recipe.rules import (
    early_stopping_problems,
    generation_problems,
    models_problems,
    rival_problems,
    sizes_problems,
    student_problems,
    task_problems,
    training_problems,
)
from flexkd.recipe.section import Section
from flexkd.recipe.task_sections import DataSection, GenerationSection, TaskSection
from flexkd.recipe.training_sections import (
    CompareSection,
    ObjectiveSection,
    PushSection,
    RivalsSection,
    SizesSection,
    TrainingSection,
)
from flexkd.recipe.values import Text
from flexkd.run_files import CACHE_FOLDER


class Recipe(Section):
    """One distillation job: a task, a teacher, a student, and how the student is trained."""

    name: Text
    """Name of the job, in the run folder, the report and the model card."""
    output: Text
    """Run folder. Default: runs/NAME."""
    task: TaskSection = TaskSection()
    """The task, and the metric that it is evaluated by."""
    data: DataSection
    """The rows: their sources, their columns and how they are prepared."""
    generation: GenerationSection | None = None
    """How answers are generated and evaluated; only where the task is to write text, where the default is {}."""
    teacher: TeacherSection
    """The model that teaches."""
    student: StudentSection
    """The model that learns."""
    scores: ScoresSection = ScoresSection()
    """The unit scores: how much the task uses each unit of the teacher."""
    objective: ObjectiveSection = ObjectiveSection()
    """The objective: the weighted sum of losses that training minimizes."""
    training: TrainingSection = TrainingSection()
    """The training of the student."""
    rivals: RivalsSection | None = None
    """Rivals of the student: the teacher in int8, small models off the shelf; null measures none."""
    compare: CompareSection | None = None
    """Methods and seeds of `flexkd compare`."""
    sizes: SizesSection | None = None
    """Sizes and seeds of `flexkd sizes`."""
    push_to_hub: PushSection | None = None
    """Upload of the finished student to the Hugging Face hub, by `flexkd distill`; null uploads nothing."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Fill defaults that depend on another section."""
        if not isinstance(values, Mapping):
            return values
        filled = renamed(values)[0]
        if filled.get("output") is None:
            filled["output"] = f"runs/{filled.get('name', '')}"
        if not may_be_rotated(filled):
            _default(filled, ("objective", "features"), basis="auto")
            filled = _replaced(filled, ("objective", "features", "basis"), "auto", "units")
        task = filled.get("task")
        if not isinstance(task, Mapping):
            return filled
        default_loss = next(iter(LOGIT_LOSSES_OF.get(str(task.get("problem")), ())), None)
        if default_loss in WITHOUT_TEMPERATURE:
            _default(filled, ("objective", "logits"), loss=default_loss)
            if _inner(filled, ("objective", "logits")).get("loss") in WITHOUT_TEMPERATURE:
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
            *objective_problems(self.task, self.student, self.scores, self.objective),
            *cache_problems(self.teacher, self.objective),
            *rival_problems(self.teacher, self.rivals),
            *training_problems(self.task, self.teacher, self.training),
            *early_stopping_problems(self.task, self.generation, self.objective, self.training),
            *sizes_problems(self.sizes, self.student),
        ]
        if problems:
            raise BrokenRulesError(problems)
        return self

    @property
    def folder(self) -> Path:
        """The run folder as a path, with `~` and environment variables expanded."""
        return local_path(self.output, where="output")

    @property
    def cache_folder(self) -> Path:
        """The folder of the caches of a run or a comparison, each of which has a folder of its own."""
        setting = self.teacher.cache
        if setting in (AUTO, ALWAYS, NEVER):
            return self.folder / CACHE_FOLDER
        return local_path(setting, where="teacher.cache")

    def to_yaml(self) -> str:
        """The recipe as YAML with all defaults; `load_recipe` reads the same recipe back."""
        return write_yaml(self.to_values())

    def to_values(self) -> Any:
        """The values of all keys as YAML holds them, defaults too."""
        return _plain(self.model_dump())


def _inner(values: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    """The section at a path; empty where there is none."""
    for key in path:
        section = values.get(key, {})
        values = section if isinstance(section, Mapping) else {}
    return values


def _default(values: dict[str, Any], path: Sequence[str], **defaults: Any) -> None:
    """Fill missing keys of a section; null, or a value that is no section, stays as it is."""
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


def _replaced(values: Any, path: Sequence[str], before: str, after: str) -> Any:
    """The values with another one at a path, where it is there and is `before`."""
    if not path:
        return after if values == before else values
    if not isinstance(values, Mapping) or path[0] not in values:
        return values
    return {**values, path[0]: _replaced(values[path[0]], path[1:], before, after)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
