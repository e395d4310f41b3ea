"""A record without paths of the machine that made it, for what leaves that machine: names of files stay, folders go."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from flexkd.data.sources.rows import is_hub_id, joined_sources
from flexkd.facts.names import HUB_ID, HUB_OWNER
from flexkd.files import is_there
from flexkd.record import RunRecord

_MODELS: Final = (
    ("teacher", "model"),
    ("teacher", "adapter"),
    ("teacher", "tokenizer"),
    ("student", "model"),
    ("student", "tokenizer"),
    ("rivals", "models"),
)
_SOURCES: Final = (("data", "train"), ("data", "validation"), ("data", "test"))
_FILES: Final = (("output",), ("data", "teacher_answers"), ("teacher", "cache"))
"""Keys of a recipe that may hold a path, by what else they may hold."""

_HUB_MODEL: Final = re.compile(rf"{HUB_ID}|{HUB_OWNER}", re.ASCII)
_ROOTED: Final = re.compile(r"(?<![\w./:<~-])~?(?:/[\w.+@~-]+)+/(?P<name>[\w.+@~-]+)/?")
_SCHEME: Final = re.compile(r"[a-z]+:(?!//)")


def without_local_paths(record: RunRecord) -> RunRecord:
    """The record with the last part of each path in place of the path; ids of the hub stay as they are."""
    names = _path_names(record.recipe)
    teacher = record.model("teacher")
    if teacher is not None and not is_hub_model(teacher.name):
        names |= {teacher.name: last_part(teacher.name)}

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [clean(inner) for inner in value]
        return _without_paths(value, names) if isinstance(value, str) else value

    return replace(
        record,
        recipe=clean(record.recipe),
        notes=clean(record.notes),
        models=[replace(model, name=clean(model.name)) for model in record.models],
        data=replace(
            record.data,
            sources=clean(record.data.sources),
            skipped={clean(reason): count for reason, count in record.data.skipped.items()},
        ),
    )


def is_hub_model(name: str) -> bool:
    """Whether a model is on the hub: its name looks so, and nothing on this machine has it."""
    return _HUB_MODEL.fullmatch(name) is not None and not is_there(Path(name))


def last_part(source: str) -> str:
    """The name of a file or folder without those above it; names in packages and fetched sources stay whole."""
    return source if _SCHEME.match(source) else Path(source).name or source


def _path_names(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The name that stands for each path of a recipe."""
    names = {}
    for path in (*_MODELS, *_SOURCES, *_FILES):
        value: Any = recipe
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        values = value if isinstance(value, list | tuple) else [value]
        for part in (part for text in values if isinstance(text, str) and text for part in joined_sources(text)):
            is_on_hub = (path in _MODELS and is_hub_model(part)) or (path in _SOURCES and is_hub_id(part))
            if not is_on_hub:
                names[part] = last_part(part)
    return names


def _without_paths(text: str, names: Mapping[str, str]) -> str:
    for path in sorted(names, key=len, reverse=True):
        # A name may hold a backslash, which `re.sub` would read as its own.
        text = re.sub(rf"(?<![\w./~-]){re.escape(path)}(?![\w-])", names[path].replace("\\", r"\\"), text)
    return _ROOTED.sub(lambda match: match["name"], text)
