"""Strict YAML: numbers are read as they look, repeated keys are found, and every key has its line."""

import difflib
import re
import reprlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from flexkd.errors import RecipeError
from flexkd.packages import shipped_recipes

KeyPath = tuple[str | int, ...]
"""Keys and list indices that lead from the top of a recipe to a value."""

# PyYAML follows YAML 1.1, where 1e-5 is text, 010 is 8, 12:30:00 is 45000 and `no` is false. These are the rules of
# YAML 1.2, but whole numbers with a leading zero, and 1_000, stay text so that a number field refuses them.
_SCALARS: Final = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|(?:0|[1-9][0-9]*)[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)
FLOAT: Final = re.compile(rf"(?:{_SCALARS[3][1]})\Z")
"""Text that this YAML reads as a float."""
WHOLE: Final = re.compile(rf"(?:{_SCALARS[2][1]})\Z")
"""Text that this YAML reads as a whole number."""

# A few lines of anchors can hold more values than fit into memory as text.
_SHORT: Final = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 60, 60, 60


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own form)


class _StrictDumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes text that YAML 1.1 or this loader would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    _StrictLoader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))
    _StrictDumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


@dataclass(frozen=True)
class Document:
    """One YAML document with the lines of its keys.

    Attributes:
        node: The parsed tree, which knows the lines; None for an empty document.
        duplicates: For each key that is repeated in one mapping: its path, its line, and the line where it was first.
    """

    value: Any
    node: yaml.Node | None
    duplicates: tuple[tuple[KeyPath, int, int], ...] = ()

    def holds(self, path: KeyPath) -> bool:
        """Whether the document itself has this key, so that its value is not a default."""
        node = self.node
        for step in path:
            child = _child(node, step)
            if child is None:
                return False
            node, _ = child
        return True

    def line(self, path: KeyPath) -> int:
        """Line, from 1, of the key at `path`, or of the deepest part of the path that the document has."""
        node, line = self.node, 1
        for step in path:
            child = _child(node, step)
            if child is None:
                break
            node, line = child
        return line


def _child(node: yaml.Node | None, step: str | int) -> tuple[yaml.Node, int] | None:
    """The node at a key or index of a node, and its line."""
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step].start_mark.line + 1
    child = None
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == str(step):
                # Merged keys (<<) come first, so the last one counts.
                child = value, key.start_mark.line + 1
    return child


def read_document(text: str, where: str) -> Document:
    """Parse one YAML document.

    Args:
        where: Begins every message, like `recipe.yaml` or `command line`.

    Raises:
        RecipeError: The text is not valid YAML; the message names the line.
    """
    try:
        node = yaml.compose(text, Loader=_StrictLoader)
        if node is None:
            return Document(None, None)
        duplicates = tuple(_duplicates(node))
        loader = _StrictLoader("")
        loader.deep_construct = True  # PyYAML then refuses an anchor that contains itself
        return Document(loader.construct_document(node), node, duplicates)
    except yaml.YAMLError as error:
        raise RecipeError(_syntax_message(error, text, where)) from None
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{where}: {_one_line(error)}. Write the value in plain YAML.") from None


def read_recipe_text(path: Path) -> str:
    """Text of a recipe file, UTF-8 with or without a byte order mark.

    Raises:
        RecipeError: The file does not exist, is a folder, or is not UTF-8.
    """
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder. Name the recipe file in it.")
    if not path.exists():
        recipes = sorted(file.name for file in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        listed = f" In {path.parent}: {', '.join(recipes)}." if recipes else ""
        name = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
        shipped = difflib.get_close_matches(name, shipped_recipes(), n=1, cutoff=0.8)
        close = f" flexkd comes with a recipe that is named '{shipped[0]}', without .yaml." if shipped else ""
        raise RecipeError(f"{path}: no such file.{listed}{close} Name an existing recipe.")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: byte {content[error.start]:#04x} is not UTF-8. Save it as UTF-8.") from None


def short_repr(value: object) -> str:
    """A value as a message shows it: null, true and false as in YAML, and at most 80 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write_yaml(value: Any) -> str:
    """YAML text that `read_document` and any reader of YAML 1.1 read back as `value`."""
    return yaml.dump(value, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=120)


def _duplicates(top: yaml.Node) -> Iterator[tuple[KeyPath, int, int]]:
    """Repeated keys of every mapping; each node is visited once, however many aliases lead to it."""
    visited: set[int] = set()
    waiting: list[tuple[yaml.Node, KeyPath]] = [(top, ())]
    while waiting:
        node, path = waiting.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting.extend((item, (*path, index)) for index, item in enumerate(node.value))
        elif isinstance(node, yaml.MappingNode):
            first: dict[Hashable, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                name = str(key.value)
                if name in first:
                    yield (*path, name), line, first[name]
                first.setdefault(name, line)
                waiting.append((value, (*path, name)))


def _syntax_message(error: yaml.YAMLError, text: str, where: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:  # a character that YAML forbids
        position = getattr(error, "position", 0)
        line = text[:position].count("\n") + 1
        return f"{where}:{line}: character {text[position : position + 1]!r} is not allowed in YAML. Remove it."
    lines = text.splitlines()
    line_text = lines[mark.line] if mark.line < len(lines) else ""
    indentation = line_text[: len(line_text) - len(line_text.lstrip())]
    if "\t" in indentation:
        return f"{where}:{mark.line + 1}: a tab in the indentation. Indent with spaces."
    problem = getattr(error, "problem", None) or _one_line(error)
    if getattr(error, "context", None) == "while scanning an alias":
        return f"{where}:{mark.line + 1}: a value begins with '*', which YAML reads as a name. Put it in quotes."
    if "expected a single document" in (getattr(error, "context", None) or ""):
        return f"{where}:{mark.line + 1}: a second document starts here. Keep one recipe in a file."
    shown = f" in {line_text.strip()!r}" if line_text.strip() else ""
    return f"{where}:{mark.line + 1}: not YAML: {problem}{shown}. Check quotes, colons and indentation there."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
