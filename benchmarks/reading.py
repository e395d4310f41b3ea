"""The order in which somebody reads a run who follows every call from `distill`."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final

from benchmarks.sources import Function, House

STARTS: Final = ("pipeline.distill", "train.pipeline")
"""Modules of `distill`, the newest layout first."""

UPPER: Final = frozenset(("train", "pipeline", "tasks", "training", "scoring"))
"""Folders that a reader of a run walks through; what lies below is looked up."""


class Reading:
    """The order in which a reader meets the functions of a run who follows every call from `distill`.

    A call is followed where its name can be resolved without running anything: functions and classes of this package,
    methods of `self`, and methods of parameters and variables whose class is annotated or constructed. Each function
    is read once, at its first call.

    Args:
        house: Its modules.
    """

    def __init__(self, house: House) -> None:
        self.house = house
        self.modules: list[str] = []
        self._seen: set[tuple[str, str]] = set()
        self._read(next(name for name in STARTS if name in house.sources), "distill")

    @property
    def files(self) -> list[str]:
        """Modules of the upper house in the order in which they are opened."""
        return list(dict.fromkeys(module for module in self.modules if module.partition(".")[0] in UPPER))

    @property
    def climbs(self) -> int:
        """How often the next file to be opened stands higher in the order of imports than the one before."""
        depths = [self.house.depths[module] for module in self.files]
        return sum(after > before for before, after in pairwise(depths))

    def _read(self, module: str, name: str) -> None:
        node = self._definition(module, name)
        if node is None or (module, name) in self._seen:
            return
        self._seen.add((module, name))
        if isinstance(node, ast.ClassDef):
            for method in ("__init__", "__post_init__"):
                self._read(module, f"{name}.{method}")
            return
        if not isinstance(node, Function):
            return
        self.modules.append(module)
        classes = dict(self._classes(module, name, node))
        for call in sorted(_calls(node), key=lambda call: (call.end_lineno or 0, call.end_col_offset or 0)):
            target = self._target(module, call.func, classes)
            if target is not None:
                self._read(*target)

    def _definition(self, module: str, name: str) -> ast.AST | None:
        body: Sequence[ast.AST] = self.house.sources[module].tree.body if module in self.house.sources else ()
        node: ast.AST | None = None
        for part in name.split("."):
            node = next((item for item in body if getattr(item, "name", None) == part), None)
            body = getattr(node, "body", ())
        return node

    def _classes(self, module: str, name: str, function: Function) -> Iterator[tuple[str, tuple[str, str]]]:
        """Variables of a function whose class is known."""
        if "." in name:
            yield "self", (module, name.partition(".")[0])
        arguments = function.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            if (place := self._class_of(module, argument.annotation)) is not None:
                yield argument.arg, place
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and len(node.targets) == 1:
                target, place = node.targets[0], self._target(module, node.value.func, {})
                result = None if place is None else self._result(*place)
                if isinstance(target, ast.Name) and result is not None:
                    yield target.id, result

    def _result(self, module: str, name: str) -> tuple[str, str] | None:
        """The class of what a call gives."""
        node = self._definition(module, name)
        if isinstance(node, ast.ClassDef):
            return module, name
        return self._class_of(module, node.returns) if isinstance(node, Function) else None

    def _class_of(self, module: str, annotation: ast.AST | None) -> tuple[str, str] | None:
        place = self._place(module, annotation.id) if isinstance(annotation, ast.Name) else None
        return place if place and isinstance(self._definition(*place), ast.ClassDef) else None

    def _place(self, module: str, name: str) -> tuple[str, str] | None:
        """Where a name of a module is defined."""
        if self._definition(module, name) is not None:
            return module, name
        source, inner = self.house.names[module].get(name, ("", ""))
        while inner and self._definition(source, inner) is None and inner in self.house.names.get(source, {}):
            source, inner = self.house.names[source][inner]
        return (source, inner) if inner else None

    def _target(self, module: str, function: ast.AST, classes: Mapping[str, tuple[str, str]]) -> tuple[str, str] | None:
        if isinstance(function, ast.Name):
            return self._place(module, function.id)
        if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
            return None
        owner = function.value.id
        if owner in classes:
            source, name = classes[owner]
            return source, f"{name}.{function.attr}"
        source, inner = self.house.names[module].get(owner, ("", ""))
        if source and not inner:
            return self._place(source, function.attr)
        place = self._place(module, owner)
        return None if place is None else (place[0], f"{place[1]}.{function.attr}")


def _calls(function: Function) -> Iterator[ast.Call]:
    return (node for node in ast.walk(function) if isinstance(node, ast.Call))
