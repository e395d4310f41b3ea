"""The source of flexkd as data for the tests: modules, what each imports, and the tree as docs/house.md draws it."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGE: Final = ROOT / "src" / "flexkd"

# The floor of every file and folder right below src/flexkd. Imports point down, or stay in their own folder.
FLOORS: Final = {
    "allocator": 0,
    "errors": 0,
    "facts": 1,
    "files": 0,
    "home": 0,
    "fingerprints": 0,
    "packages": 0,
    "processes": 0,
    "display": 1,
    "guards": 1,
    "compare_record": 0,
    "sizes_record": 0,
    "record": 0,
    "run_files": 0,
    "strict_json": 0,
    "tuning_record": 0,
    "vocabulary_record": 0,
    "core": 2,
    "models": 3,
    "data": 3,
    "teacher": 4,
    "recipe": 4,
    "scoring": 5,
    "evaluate": 5,
    "preflight": 5,
    "reference": 5,
    "training": 6,
    "tasks": 7,
    "pipeline": 8,
    "costs": 9,
    "predict": 9,
    "report": 9,
    "demo": 9,
    "draft": 9,
    "demos": 9,
    "terminal": 9,
    "command_options": 10,
    "cli": 10,
    "__main__": 11,
}

# Folders with floors of their own: from the bottom up, modules and folders that do not import each other on one floor.
INNER_FLOORS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "core": (
        ("tensors",),
        ("checks",),
        ("log_probs",),
        ("outputs", "projection"),
        ("losses",),
        ("scores",),
        ("geometry",),
        ("selection",),
        ("terms",),
        ("predictions",),
        ("objective",),
    ),
    "guards": (("locks",), ("work",)),
    "data": (("sources",), ("examples",), ("encoding",)),
    "models": (("forward",), ("loading",), ("slicing",)),
    "teacher": (("signal",), ("live",), ("cache",)),
    "recipe": (
        ("document", "section"),
        ("problem", "renamed", "values"),
        ("model_sections", "overrides", "task_sections", "training_sections"),
        ("objective_rules", "rules"),
        ("schema",),
        ("messages", "taught_features"),
        ("fingerprints",),
        ("loading",),
        ("methods", "search", "sizes"),
    ),
    "preflight": (
        ("tokenizer_files",),
        ("model_files",),
        ("rows",),
        ("inputs",),
        (
            "architecture",
            "contrasts",
            "generation",
            "machine",
            "objective",
            "projection",
            "run_folder",
            "sharding",
            "student_shape",
            "tokenization",
            "weights",
        ),
        ("comparison",),
        ("sizes", "starts"),
        ("checking",),
    ),
    "training": (
        ("early_stopping", "interruption"),
        (
            "arguments",
            "checkpoint",
            "checks",
            "failures",
            "packing",
            "progress",
            "row_sharing",
            "sampler",
            "sharding",
            "supported",
            "tallies",
        ),
        ("micro_batches",),
        ("diagnosis", "step"),
        ("trainer",),
        ("fit",),
        ("time_limit",),
    ),
    "pipeline": (
        ("stages", "teacher"),
        ("job",),
        ("answering", "caching", "scores", "states"),
        ("recording", "start"),
        ("rivals",),
        ("projectors",),
        ("pairing",),
        ("run",),
        ("cells", "comparison", "distill", "sharing"),
        ("search",),
        ("compare", "sizes"),
    ),
    "report": (
        ("canvas", "local_paths", "wording"),
        ("answers", "charts", "class_view", "result_tables", "rivals", "verdicts"),
        ("run_charts", "table_formats"),
        ("compare_charts", "run_view"),
        ("card", "compare_view", "size_table", "size_view"),
        ("page",),
        ("delivery",),
    ),
}


@dataclass(frozen=True)
class Module:
    """One Python file of the package."""

    name: str
    path: Path

    @property
    def part(self) -> str:
        """The file or folder right below src/flexkd that it belongs to; "" for the package's own `__init__`."""
        return self.name.partition(".")[2].partition(".")[0]

    @property
    def inner_part(self) -> str:
        """The file or folder right below that part; "" for the part itself."""
        return ".".join(self.name.split(".")[2:3])

    @property
    def where(self) -> str:
        """The path as a person would type it."""
        return self.path.relative_to(ROOT).as_posix()

    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.path.read_text(encoding="utf-8"))

    def summary(self) -> str:
        """The first paragraph of its docstring, "" without one."""
        return (ast.get_docstring(self.tree()) or "").split("\n\n")[0]


@cache
def modules() -> dict[str, Module]:
    """Every module of flexkd by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path)
    return found


def imported_names(module: Module) -> dict[str, int]:
    """Dotted names that a module imports, anywhere in it, each with its line.

    `from a import b` counts as a.b where that is a module of ours or a name of the package itself, else as a.
    """
    found: dict[str, int] = {}
    for node in ast.walk(module.tree()):
        if isinstance(node, ast.Import):
            found.update((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_name_of_root = base == "flexkd" and inner not in modules()
                found[inner if inner in modules() or is_name_of_root else base] = node.lineno
    return found


def drawn_tree() -> str:
    """The tree of src/flexkd, one line a file, with the sentence each module says about itself."""
    lines = ["src/flexkd/", *_drawn_folder(PACKAGE, depth=1)]
    width = max(len(name) for name, _ in (line.split("\t") for line in lines if "\t" in line)) + 2
    return "\n".join(_aligned(line, width) for line in lines) + "\n"


def _drawn_folder(folder: Path, depth: int) -> list[str]:
    lines = []
    for path in sorted(folder.iterdir(), key=_place):
        if path.name == "__pycache__" or (path.name == "__init__.py" and depth > 1):
            continue
        floor = f"{FLOORS[path.stem]}  " if depth == 1 and path.stem in FLOORS else "   " if depth == 1 else ""
        sentence = _sentence(path)
        name = f"{'  ' * depth}{path.name}{'/' if path.is_dir() else ''}"
        lines.append(f"{name}\t{floor}{sentence}" if sentence else name)
        if path.is_dir():
            lines += _drawn_folder(path, depth + 1)
    return lines


def _place(path: Path) -> tuple[int, int, str]:
    """Floors from the bottom up, the package's own `__init__` first; below that by name."""
    floor = -1 if path.name == "__init__.py" else FLOORS.get(path.stem, 99)
    return (floor if path.parent == PACKAGE else 0, path.is_dir(), path.name)


def _sentence(path: Path) -> str:
    source = path / "__init__.py" if path.is_dir() else path
    if source.suffix != ".py" or not source.exists():
        return ""
    return Module("", source).summary()


def _aligned(line: str, width: int) -> str:
    name, tab, rest = line.partition("\t")
    return f"{name:<{width}}{rest}" if tab else name
