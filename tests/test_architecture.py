"""The rules of the house that code alone cannot hold: floors, no cycles, a light core, small files, a true tree."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions

import pytest

from benchmarks.house import forbidden_locals
from benchmarks.sources import House, function_lines
from tests.source_tree import FLOORS, INNER_FLOORS, PACKAGE, ROOT, Module, drawn_tree, imported_names, modules

MAXIMUM_FILE_LINES = 400
MAXIMUM_FUNCTION_LINES = 50
MAXIMUM_MODULES_OF_A_FOLDER = 20
MAXIMUM_README_LINES = 170
MAXIMUM_FORBIDDEN_LOCALS = 5
ALLOWED_IN_CORE = {"torch", "jaxtyping", "scipy.optimize", "flexkd"}
# What `import flexkd`, `flexkd --help` and `flexkd check` go through: they have to answer at once.
LIGHT_MODULES = [
    "flexkd",
    "flexkd.cli",
    "flexkd.data.sources.rows",
    "flexkd.data.examples.classification",
    "flexkd.errors",
    "flexkd.record",
]
LIGHT_PARTS = ["preflight", "recipe", "reference"]
# They are used by themselves, from Python: what they need is an argument, never a key of a recipe.
PARTS_WITHOUT_RECIPES = {"core", "models", "data", "teacher", "scoring", "evaluate", "training"}
# The one name of the package itself that a module inside it may use: it imports nothing.
NAMES_OF_ROOT = {"flexkd.__version__"}
# Distributions that another one pins exactly and documents as its own.
PART_OF = {"pydantic_core": "pydantic"}

ALL = list(modules().values())
INNER = [module for module in ALL if module.part]


def name_of(module: Module) -> str:
    return module.name


def inner_imports(module: Module) -> dict[str, int]:
    return {
        name: line
        for name, line in imported_names(module).items()
        if name.partition(".")[0] == "flexkd" and name not in NAMES_OF_ROOT
    }


def test_every_part_of_the_package_has_a_floor() -> None:
    homeless = sorted({module.part for module in INNER} - FLOORS.keys())
    assert not homeless, f"no floor for {homeless}: give it one in tests/source_tree.py and in the README tree"


@pytest.mark.parametrize("module", INNER, ids=name_of)
def test_imports_point_down_or_stay_in_their_folder(module: Module) -> None:
    wrong = []
    for target, line in inner_imports(module).items():
        part = target.partition(".")[2].partition(".")[0]
        if part == module.part:
            continue
        # Single files on one floor share the folder src/flexkd.
        both_files = modules()[module.name].path.parent == modules().get(target, module).path.parent
        highest = FLOORS[module.part] if both_files else FLOORS[module.part] - 1
        if FLOORS.get(part, 99) > highest:
            wrong.append(f"{module.where}:{line} (floor {FLOORS[module.part]}) imports {target} ({FLOORS.get(part)})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", [module for module in INNER if module.part in INNER_FLOORS], ids=name_of)
def test_imports_point_down_inside_a_folder_with_floors(module: Module) -> None:
    floors = {name: floor for floor, names in enumerate(INNER_FLOORS[module.part]) for name in names}
    if module.inner_part == "":
        return
    assert module.inner_part in floors, f"{module.where}: give {module.inner_part} a place in INNER_FLOORS"
    wrong = [
        f"{module.where}:{line} imports {target}, which is not below it"
        for target, line in inner_imports(module).items()
        if (other := modules().get(target)) is not None and other.part == module.part
        if other.inner_part not in ("", module.inner_part) and floors[other.inner_part] >= floors[module.inner_part]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", [module for module in INNER if module.part in PARTS_WITHOUT_RECIPES], ids=name_of)
def test_what_is_used_without_a_recipe_knows_none(module: Module) -> None:
    recipes = [name for name in inner_imports(module) if f"{name}.".startswith("flexkd.recipe.")]
    assert not recipes, f"{module.where} imports {recipes}"


def test_every_inner_floor_names_what_is_there() -> None:
    drawn = {(part, name) for part, floors in INNER_FLOORS.items() for names in floors for name in names}
    gone = sorted(drawn - {(module.part, module.inner_part) for module in INNER})
    assert not gone, f"INNER_FLOORS names what is not there: {gone}"


def test_no_folder_holds_more_modules_than_a_reader_keeps_apart() -> None:
    folders = [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]
    sizes = {folder.relative_to(ROOT).as_posix(): len(list(folder.glob("*.py"))) for folder in folders}
    crowded = {folder: size for folder, size in sizes.items() if size > MAXIMUM_MODULES_OF_A_FOLDER}
    assert not crowded, crowded


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module.name: set(inner_imports(module)) & modules().keys() - {module.name} for module in ALL}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


@pytest.mark.parametrize("module", [one for one in INNER if one.part == "core"], ids=name_of)
def test_the_core_knows_tensors_and_nothing_else(module: Module) -> None:
    allowed = ALLOWED_IN_CORE | sys.stdlib_module_names
    foreign = [
        f"{module.where}:{line} imports {name}"
        for name, line in imported_names(module).items()
        if not any(name == one or name.startswith(f"{one}.") for one in allowed)
    ]
    assert not foreign, "\n".join(foreign)


def test_every_imported_package_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    declared = [*project["dependencies"], *(one for extra in extras for one in extra)]
    names = {normalized(re.split(r"[<>=!~\[; ]", one)[0]) for one in declared}
    providers = packages_distributions()
    undeclared = set()
    for module in ALL:
        for imported, line in imported_names(module).items():
            top = imported.partition(".")[0]
            if top in sys.stdlib_module_names or top == "flexkd":
                continue
            if not {PART_OF.get(one, normalized(one)) for one in providers.get(top, [top])} & names:
                undeclared.add(f"{module.where}:{line} imports {top}")
    assert not undeclared, "not in pyproject.toml:\n" + "\n".join(sorted(undeclared))


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize("module", ALL, ids=name_of)
def test_files_and_functions_stay_small(module: Module) -> None:
    num_lines = len(module.path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAXIMUM_FILE_LINES, f"{module.where}: {num_lines} lines. Split it at its seam."
    long = [
        f"{module.where}:{node.lineno} {node.name}: {function_lines(node)} lines without its docstring"
        for node in ast.walk(module.tree())
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if function_lines(node) > MAXIMUM_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_names_say_what_things_are_and_not_what_happened_to_them() -> None:
    """Functions with a local, argument or inner function called `found`, `one`, `own` and the like."""
    offenders = [f"{function}: {', '.join(names)}" for function, names in forbidden_locals(House(ROOT)).items()]
    assert len(offenders) <= MAXIMUM_FORBIDDEN_LOCALS, "\n".join(offenders)


@pytest.mark.parametrize("module", ALL, ids=name_of)
def test_every_module_says_in_one_sentence_what_it_is_about(module: Module) -> None:
    summary = module.summary()
    assert summary, f"{module.where} has no docstring"
    assert "\n" not in summary, f"{module.where}: the first sentence takes more than a line"
    assert summary.endswith("."), f"{module.where}: {summary!r} is no sentence"
    assert not re.search(r"[.!?] [A-Z]", summary), f"{module.where}: {summary!r} is more than one sentence"


@pytest.mark.parametrize("module", ALL, ids=name_of)
def test_sources_are_plain_ascii_with_checked_shapes(module: Module) -> None:
    text = module.path.read_text(encoding="utf-8")
    odd = [f"{module.where}:{n}" for n, line in enumerate(text.splitlines(), 1) if not line.isascii()]
    assert not odd, f"not ASCII: {odd}"
    assert "from __future__ import annotations" not in text, f"{module.where}: jaxtyping cannot check its shapes then"


def test_the_tree_of_the_house_is_the_real_tree() -> None:
    house = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    drawn = re.search(r"^src/flexkd/\n.*?(?=^```)", house, re.MULTILINE | re.DOTALL)
    assert drawn, "docs/house.md draws no tree: a code block that begins with src/flexkd/"
    assert drawn.group() == drawn_tree(), "the tree in docs/house.md should read:\n\n" + drawn_tree()


def test_the_readme_stays_short() -> None:
    num_lines = len((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAXIMUM_README_LINES, f"README.md: {num_lines} lines"


def test_the_floors_of_the_readme_are_the_real_ones() -> None:
    """Every folder and file above the ground floor, but for the command line that a reader meets first."""
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    drawn = {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", names)}
    lowest_and_highest = {name for name, floor in FLOORS.items() if floor in (0, FLOORS["cli"], FLOORS["__main__"])}
    assert drawn == {name: floor for name, floor in FLOORS.items() if name not in {*lowest_and_highest, "demos"}}


def test_light_modules_import_neither_torch_nor_transformers() -> None:
    names = sorted({*LIGHT_MODULES, *(module.name for module in INNER if module.part in LIGHT_PARTS)})
    # One process for all: the first that loads anything heavy is named, and everything after it is not looked at.
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = [one for one in ('torch', 'transformers', 'datasets') if one in sys.modules]\n"
        "    if heavy: sys.exit(f'importing {name} loads {heavy}')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
