"""The text of a first recipe: the columns of the rows, sizes that fit them, and comments on what was seen there."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from flexkd.data.examples.classification import ClassificationData
from flexkd.data.sources.rows import ReadOnce, TableReader, is_hub_id, joined_sources
from flexkd.data.sources.table import TextFormat
from flexkd.draft.columns import Column, columns_of, roles_of
from flexkd.errors import DataError, RecipeError, unknown_name
from flexkd.facts.names import GENERATION_TASKS, TASKS
from flexkd.files import local_path, written_whole
from flexkd.packages import shipped_recipes
from flexkd.preflight import read_rows
from flexkd.recipe.document import KeyPath
from flexkd.recipe.loading import check_values
from flexkd.recipe.overrides import WHERE, parse_overrides, with_value
from flexkd.recipe.problem import dotted

_TEACHERS: Final = {
    "classification": "answerdotai/ModernBERT-base",
    "instruction": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "summarization": "HuggingFaceTB/SmolLM2-360M-Instruct",
}
_ROLES: Final = {
    "classification": ("text", "text_pair", "label"),
    "instruction": ("prompt", "context", "response", "messages"),
    "summarization": ("document", "summary"),
}
_ANSWERS: Final = ("response", "messages", "summary")
_NO_ROWS: Final = "rows.csv"
_PLACEHOLDERS: Final = {
    "classification": {"text": "text", "label": "label"},
    "instruction": {"prompt": "prompt", "response": "response"},
    "summarization": {"document": "document", "summary": "summary"},
}
_TOKENS_A_WORD: Final = 1.5
"""More than the 1.2 to 1.4 of English, so that other languages are not cut at once."""
_LENGTHS: Final = (32, 64, 128, 256, 512, 1024)
_STEP: Final = 8
_NAMES_SHOWN: Final = 8
_COMMENT_COLUMN: Final = 44


@dataclass
class Draft:
    """A recipe that is being written.

    Attributes:
        values: As in the file.
        comments: Dotted key to what stands behind its value.
    """

    values: dict[str, Any]
    comments: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The YAML file."""
        head = [
            "# A first recipe. Next: flexkd check FILE, flexkd plan FILE, flexkd distill FILE.",
            "# All keys: flexkd schema. A key that does not stand here has its default.",
        ]
        return "\n".join([*head, *self._lines()]) + "\n"

    def _lines(self) -> Iterator[str]:
        for name, value in self.values.items():
            if not isinstance(value, Mapping):
                yield self._line("", name, value)
                continue
            yield f"{name}:"
            yield from (self._line(f"{name}.", key, entry) for key, entry in value.items())

    def _line(self, section: str, key: str, value: object) -> str:
        flow = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
        line = f"{'  ' if section else ''}{key}: {flow.removesuffix('...' + chr(10)).strip()}"
        comment = self.comments.get(f"{section}{key}")
        return line if comment is None else f"{line:<{_COMMENT_COLUMN}}  # {comment}"


def write_draft(path: Path, task: str, source: str | None, overrides: Sequence[str] = ()) -> str:
    """Write a first recipe for a task and its rows, or a copy of one that comes with flexkd; returns its text.

    Args:
        path: The file, which must not exist.
        task: One of `TASKS`, or the name of a recipe, as classification/sst2.
        source: Rows as in `data.train`; None: a recipe with names to fill in.
        overrides: KEY=VALUE that the recipe shall have, as the column of a label.

    Raises:
        RecipeError: The file exists, the task is unknown, or the values do not fit together.
        DataError: The rows cannot be read, or have no column that looks like what the task needs.
    """
    if path.exists():
        raise RecipeError(f"--output: '{path}' exists. Name another file, or delete it.")
    if "/" in task:
        text = _shipped_text(task, source)
    elif task in TASKS:
        text = _draft(task, source, _parsed(overrides)).text()
    else:
        raise RecipeError(unknown_name("TASK", "task", task, TASKS))
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return text


def _shipped_text(name: str, source: str | None) -> str:
    """The recipe of that name that comes with flexkd, as it stands."""
    recipes = shipped_recipes()
    if name not in recipes:
        raise RecipeError(unknown_name("TASK", "recipe", name, recipes))
    if source is not None:
        raise RecipeError(f"DATA: '{name}' names its rows. Leave '{source}' out, and change data.train in the copy.")
    return recipes[name].read_text(encoding="utf-8")


def _parsed(overrides: Sequence[str]) -> dict[KeyPath, Any]:
    parsed, problems = parse_overrides(overrides)
    if problems:
        raise RecipeError("\n".join(problems))
    return {override.path: override.value for override in parsed}


def _draft(task: str, source: str | None, overrides: Mapping[KeyPath, Any]) -> Draft:
    draft, reader = Draft(_skeleton(task, source)), ReadOnce()
    if source is None:
        draft.values["data"] |= _PLACEHOLDERS[task]
        draft.comments["data.train"] = (
            "a .csv, .tsv, .json, .jsonl or .parquet file, a list of files, a folder, or a hub id"
        )
    else:
        _fill_in_columns(draft, task, source, overrides, reader)
    before = draft.values
    for path, value in overrides.items():
        draft.values = with_value(draft.values, path, value)
    # What was seen of a column stays true of it where the user named it.
    draft.comments = {
        key: comment for key, comment in draft.comments.items() if _at(draft.values, key) == _at(before, key)
    }
    recipe, problems = check_values(draft.values)
    if recipe is None or problems:
        raise RecipeError("\n".join(f"{WHERE}: {dotted(problem.path)}: {problem.text}" for problem in problems))
    if source is not None:
        data = read_rows(recipe, reader=reader)
        if isinstance(data, ClassificationData):
            _fill_in_classes(draft, data)
    return draft


def _skeleton(task: str, source: str | None) -> dict[str, Any]:
    """The sections of a recipe before anything is known of its rows."""
    name = "first" if source is None else _name(source)
    writes = task in GENERATION_TASKS
    fine_tune = {"epochs": 2 if not writes else 1, "learning_rate": 5e-5 if not writes else 1e-4}
    return {
        "name": name,
        "output": f"runs/{name}",
        "task": {"type": task},
        "data": {"train": source or _NO_ROWS, "validation": 0.1, "test": 0.1},
        "teacher": {"model": _TEACHERS[task], "fine_tune": fine_tune},
        "student": {"size": 0.5 if writes else 0.35},
        "training": {"epochs": 3, "learning_rate": 5e-4 if writes else 2e-4},
    }


def _name(source: str) -> str:
    """A name for a run: that of the first file or data set, in letters that fit a folder."""
    first = joined_sources(source)[0]
    # What follows a colon is a configuration of a data set of the hub, but not in the path of a file.
    first = first.partition(":")[0] if is_hub_id(first) else first
    return re.sub(r"[^\w.-]+", "-", Path(first).stem).strip("-.") or "first"


def _at(values: Any, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _fill_in_columns(
    draft: Draft, task: str, source: str, overrides: Mapping[KeyPath, Any], reader: TableReader
) -> None:
    """The columns of the rows and the lengths of their texts, with what was seen of them."""
    options = {key: overrides[("data", key)] for key in ("separator", "encoding") if ("data", key) in overrides}
    table = reader(source, where=overrides.get(("data", "where")), text_format=TextFormat(**options))
    columns = columns_of(table)
    named = {role: str(name) for role in _ROLES[task] if (name := overrides.get(("data", role))) is not None}
    roles = roles_of(task, columns, named)
    data, comments = draft.values["data"], draft.comments
    for split in ("validation", "test"):
        if _has_split(source, split, reader):
            data[split], comments[f"data.{split}"] = source, "its own rows of this split"
    comments["data.train"] = f"{len(table.rows):,} rows"
    for role in _ROLES[task]:
        if role in roles:
            data[role] = roles[role]
            comments[f"data.{role}"] = _seen(columns[roles[role]])
    if task == "classification":
        draft.values["task"]["problem"] = _problem(columns[roles["label"]])
    _fill_in_lengths(draft, {role: columns[name] for role, name in roles.items() if role != "label"})
    comments["teacher.model"] = "a hub id or a folder; the larger, the better it teaches"
    comments["teacher.fine_tune"] = "null for a teacher that knows this task"
    comments["student.size"] = "share of the teacher's parameters; flexkd sizes FILE shows the curve"


def _has_split(source: str, split: str, reader: TableReader) -> bool:
    """Whether a folder or a data set of the hub has rows of a split; a file has no splits."""
    if not all(is_hub_id(part) or local_path(part, where="DATA").is_dir() for part in joined_sources(source)):
        return False
    try:
        return bool(reader(source, split=split, columns=()).rows)
    except DataError:
        return False


def _seen(column: Column) -> str:
    """What a column holds, in a few words."""
    if column.is_text or column.is_chat:
        return f"{column.words[len(column.words) // 2]} words in the median"
    if column.has_classes:
        most = column.counts.most_common(_NAMES_SHOWN)
        more = f" and {len(column.counts) - len(most)} more" if len(column.counts) > len(most) else ""
        return ", ".join(f"{value} ({count:,})" for value, count in most) + more
    return f"{len(column.counts):,} different values"


def _problem(label: Column) -> str:
    """What is predicted: several classes for lists, a number where there are too many for classes or fractions."""
    if all(isinstance(value, list) for value in label.values):
        return "multi_label"
    has_fractions = label.has_numbers and any(not float(value).is_integer() for value in label.values)
    return "regression" if label.has_numbers and (has_fractions or not label.has_classes) else "single_label"


def _fill_in_lengths(draft: Draft, texts: Mapping[str, Column]) -> None:
    """Limits in tokens that nearly all texts fit, by their role."""
    words = sum(_long(column.words) for column in texts.values())
    tokens = _TOKENS_A_WORD * words
    data = draft.values["data"]
    data["max_length"] = next((length for length in _LENGTHS if length >= tokens), _LENGTHS[-1])
    draft.comments["data.max_length"] = f"tokens; 99 of 100 rows have at most {words:,} words"
    answer = next((texts[role] for role in _ANSWERS if role in texts), None)
    if answer is not None:
        words = _long(answer.answer_words)
        data["max_answer_length"] = _STEP * max(2, math.ceil(_TOKENS_A_WORD * words / _STEP))
        data["max_length"] = max(data["max_length"], 2 * data["max_answer_length"])
        draft.comments["data.max_answer_length"] = (
            f"tokens; 99 of 100 have at most {words:,} words; longer are left out"
        )


def _long(words: Sequence[int]) -> int:
    """Words of a long text, than which one of a hundred is longer; of lengths in ascending order."""
    return words[math.ceil(0.99 * len(words)) - 1] if words else 0


def _fill_in_classes(draft: Draft, data: ClassificationData) -> None:
    """The names of the classes as they were read; numbers are left to be named."""
    names = data.labels.names
    if data.labels.problem == "regression" or "label_names" in draft.values["data"]:
        return
    if all(name.lstrip("-").isdigit() for name in names):
        examples = ", ".join(f"name of {name}" for name in names[:3])
        advice = f"name the classes: label_names: [{examples}{', ...' * (len(names) > 3)}]"
        draft.comments["data.label"] = "; ".join(filter(None, [draft.comments.get("data.label"), advice]))
        return
    entries = list(draft.values["data"].items())
    place = next(index for index, (key, _) in enumerate(entries) if key == "label") + 1
    draft.values["data"] = dict([*entries[:place], ("label_names", list(names)), *entries[place:]])
