"""The plan of a study: its settings, methods, contrasts and rules, read from `plans/` and checked as a whole."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flexkd.facts.metrics import LOWER_IS_BETTER
from flexkd.facts.names import VALIDATION_PREFIX
from flexkd.recipe import Recipe, load_recipe, override_recipe
from flexkd.recipe.methods import method_recipe

HERE: Final = Path(__file__).resolve().parent
PLANS: Final = HERE / "plans"
MAIN_PLAN: Final = "study"
STUDY_TEACHER: Final = "study:teacher"
STUDY_SECTIONS: Final = "study:sections"
"""What stands in a recipe of the study for a folder and a file that `teacher` makes in the user's cache."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Contrast(_Entry):
    """Two methods whose difference is judged at every mismatch of a setting that has both.

    Attributes:
        question: What it answers, in words.
    """

    method: str
    reference: str
    question: str

    @property
    def name(self) -> str:
        """The two methods in words."""
        return f"{self.method} against {self.reference}"


class Search(_Entry):
    """One key that is searched on the validation rows, once a setting, with a seed that no cell has.

    Attributes:
        method: The method that tries the values.
        methods: Those that take the best one, besides itself.
    """

    method: str
    key: str
    values: tuple[float, ...] = Field(min_length=2)
    methods: tuple[str, ...] = ()

    def applies_to(self, method: str) -> bool:
        """Whether a method takes the best value."""
        return method == self.method or method in self.methods


class Setting(_Entry):
    """A teacher, rows, and the students that are cut from it.

    Attributes:
        recipe: File in `recipes/`.
        overrides: KEY=VALUE of this setting, as a share of the rows.
        widths: Mismatch, the teacher's width over the student's, to the student's width.
        metric: Metric that the contrasts are judged by, of the test rows; behind `validation_`, of the validation rows.
        also_shown: Other metrics that stand in the table, where the teacher has them.
        baseline: The trivial baseline that stands in every table.
        methods: Method to its number of seeds, which are 0, 1, ....
        searches: Names of the plan's searches, in their order.
        search_mismatch: Where they are searched.
        cpu_minutes: Expected CPU minutes of a cell, over all cores.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    widths: dict[int, int]
    metric: str
    also_shown: tuple[str, ...] = ("rougeL", "accuracy")
    baseline: str
    methods: dict[str, int]
    searches: tuple[str, ...] = ()
    search_mismatch: int
    cpu_minutes: float

    @property
    def sign(self) -> int:
        """1 where a larger value of the metric is better, -1 where a smaller one is."""
        return -1 if self.metric.removeprefix(VALIDATION_PREFIX) in LOWER_IS_BETTER else 1


class Plan(_Entry):
    """A study, as it was written down before its first run.

    Attributes:
        name: That of its file in `plans/`.
        title: Heading of its page.
        question: What it asks.
        level: Largest chance of any false claim that a primary contrast holds.
        cpu_hours: All cells together take no more.
        search_seed: Seed of the searches.
        definitions: Methods of the study's own: name to the KEY=VALUE that they change.
        contrasts: The primary ones.
        rules: How a claim is decided, and what follows, in words; `rules.py` computes what can be computed.
    """

    name: str
    title: str
    question: str
    level: float
    cpu_hours: float
    search_seed: int
    settings: dict[str, Setting]
    definitions: dict[str, tuple[str, ...]] = {}
    searches: dict[str, Search]
    contrasts: tuple[Contrast, ...]
    rules: tuple[str, ...]

    # A plan is read once: what is computed from it is remembered by its identity.
    __hash__ = object.__hash__

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        for name, setting in self.settings.items():
            absent = [search for search in setting.searches if search not in self.searches]
            absent += [
                s for s in setting.searches if s not in absent and self.searches[s].method not in setting.methods
            ]
            if absent:
                raise ValueError(f"settings.{name}.searches: {absent} are no searches of methods of this setting.")
            if setting.search_mismatch not in setting.widths:
                raise ValueError(f"settings.{name}.search_mismatch: {setting.search_mismatch} is none of its widths.")
            if max(setting.methods.values()) > self.search_seed:
                raise ValueError(f"settings.{name}.methods: seed {self.search_seed} is for searches alone.")
        return self


@dataclass(frozen=True)
class Cell:
    """One student: a method under one seed, or a value that a search tries.

    Attributes:
        search: The search that it belongs to; empty for a cell of the comparison.
        value: What it tries.
    """

    setting: str
    mismatch: int
    method: str
    seed: int
    search: str = ""
    value: float | None = None

    @property
    def name(self) -> str:
        """Its place below the folder of its setting."""
        method = f"{self.search}-{self.value:g}" if self.value is not None else f"{self.method}-{self.seed}"
        return f"x{self.mismatch}/{method}"


@cache
def read_plan(name: str = MAIN_PLAN) -> Plan:
    """A plan by its name."""
    content = yaml.safe_load((PLANS / f"{name}.yaml").read_text(encoding="utf-8"))
    return Plan.model_validate({"name": name, **content})


def plan_names() -> list[str]:
    """The names of all plans, sorted."""
    return sorted(path.stem for path in PLANS.glob("*.yaml"))


def search_cells(plan: Plan, name: str, search: str) -> list[Cell]:
    """The cells of one search of a setting."""
    mismatch, entry = plan.settings[name].search_mismatch, plan.searches[search]
    return [Cell(name, mismatch, entry.method, plan.search_seed, search, value) for value in entry.values]


def cells(plan: Plan, name: str) -> list[Cell]:
    """The cells of a setting, seed by seed over all widths, so that its beginning is always a balanced comparison."""
    setting = plan.settings[name]
    return [
        Cell(name, mismatch, method, seed)
        for seed in range(max(setting.methods.values()))
        for mismatch in setting.widths
        for method, num_seeds in setting.methods.items()
        if seed < num_seeds
    ]


def blocks(plan: Plan, settings: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """Setting and seed of all cells in the order in which they run: a seed of every setting before the next seed."""
    names = list(settings or plan.settings)
    for seed in range(max(max(plan.settings[name].methods.values()) for name in names)):
        for name in names:
            if seed < max(plan.settings[name].methods.values()):
                yield name, seed


@cache
def setting_recipe(plan: Plan, name: str, mismatch: int) -> Recipe:
    """The recipe of a setting at one width, with its methods in the `compare` section."""
    setting = plan.settings[name]
    methods = {method: plan.definitions.get(method) for method in setting.methods}
    overrides = [
        *setting.overrides,
        f"name=study-{name}",
        f"output=runs/study/{name}",
        f"student.hidden_size={setting.widths[mismatch]}",
        f"compare.methods={json.dumps(methods)}",
        f"compare.seeds={list(range(max(2, *setting.methods.values())))}",
    ]
    return load_recipe(HERE / "recipes" / setting.recipe, overrides)


def recipe_of(plan: Plan, cell: Cell, values: Mapping[str, float]) -> Recipe:
    """The recipe of a cell, with its seed and without a `compare` section.

    A seed is the order of the rows, the rows that the start is calibrated and scored on, and, of a share of the rows,
    which these are: the same for all methods.

    Args:
        values: Recipe key to the value that a search chose for its method.
    """
    recipe = method_recipe(setting_recipe(plan, cell.setting, cell.mismatch), cell.method)
    values = dict(values)
    if cell.value is not None:
        values[plan.searches[cell.search].key] = cell.value
    seeds = [f"{key}={cell.seed}" for key in ("training.seed", "student.start_seed")]
    return override_recipe(recipe, [*(f"{key}={value:g}" for key, value in values.items()), *seeds])


def digest_of(plan: Plan, cell: Cell, values: Mapping[str, float]) -> str:
    """Short hash of the settings that decide a cell; places of files and keys at their default are no part of it."""
    return _digest(plan, cell, tuple(values.items()))


@cache
def _digest(plan: Plan, cell: Cell, values: tuple[tuple[str, float], ...]) -> str:
    recipe = recipe_of(plan, cell, dict(values))
    settings = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"name", "output", "compare"})
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
