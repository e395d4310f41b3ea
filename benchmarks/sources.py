"""The source of a checkout as data: its modules, their functions, and what each imports."""

import ast
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One Python file.

    Attributes:
        name: Dotted, without the package: `core.losses`; empty for the package itself.
        text: Its content.
        is_folder: Whether it is the `__init__` of a folder.
    """

    name: str
    text: str
    is_folder: bool

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.text)

    @cached_property
    def functions(self) -> list[Function]:
        """All functions and methods, those inside others too."""
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    @property
    def folder(self) -> str:
        """The folder that it stands in; empty for the package."""
        return self.name if self.is_folder else self.name.rpartition(".")[0]

    @property
    def num_lines(self) -> int:
        """All lines."""
        return len(self.text.splitlines())


class House:
    """The modules of a checkout and what each imports.

    Args:
        root: Of the checkout; the package is `src/flexkd` in it.
    """

    def __init__(self, root: Path) -> None:
        package = root / "src" / "flexkd"
        self.sources: dict[str, Source] = {}
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package).with_suffix("").parts
            is_folder = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_folder else parts)
            self.sources[name] = Source(name, path.read_text(encoding="utf-8"), is_folder)
        self.names = {name: self._imported(source) for name, source in self.sources.items()}
        self.imports = {name: {module for module, _ in names.values()} - {name} for name, names in self.names.items()}

    def _imported(self, source: Source) -> dict[str, tuple[str, str]]:
        """Local name to the module it comes from and its name there; a module itself has no name there."""
        names: dict[str, tuple[str, str]] = {}
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "flexkd":
                base = (node.module or "").partition(".")[2]
                for alias in node.names:
                    inner = f"{base}.{alias.name}".lstrip(".")
                    is_module = inner in self.sources
                    names[alias.asname or alias.name] = (inner, "") if is_module else (base, alias.name)
        return names

    @cached_property
    def depths(self) -> dict[str, int]:
        """For each module, the modules of the longest chain of imports below it."""
        depths: dict[str, int] = {}

        def depth(name: str) -> int:
            if name not in depths:
                depths[name] = 0
                depths[name] = 1 + max((depth(below) for below in self.imports[name]), default=-1)
            return depths[name]

        for name in self.sources:
            depth(name)
        return depths

    def inner_floors(self) -> dict[str, int]:
        """For each folder right below the package, the modules of the longest chain of imports inside it."""
        chains: dict[str, int] = {}

        def chain(name: str) -> int:
            if name not in chains:
                chains[name] = 1
                part = name.partition(".")[0]
                inside = [below for below in self.imports[name] if below.partition(".")[0] == part and "." in below]
                chains[name] = 1 + max(map(chain, inside), default=0)
            return chains[name]

        floors: dict[str, int] = defaultdict(int)
        for name in self.sources:
            part, dot, _ = name.partition(".")
            if dot:
                floors[part] = max(floors[part], chain(name))
        return dict(floors)


def function_lines(node: Function) -> int:
    """Lines of a function without its docstring."""
    total = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total
