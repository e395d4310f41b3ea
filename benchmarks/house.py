"""The shape of the source in figures, of one or two checkouts: `python -m benchmarks.house [BEFORE] [AFTER]`."""

import argparse
import ast
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.reading import Reading
from benchmarks.sources import Function, House, Source, function_lines

FORBIDDEN: Final = frozenset(
    (
        "found", "one", "own", "known", "kept", "wanted", "given", "made", "some", "both", "theirs", "ours", "taken",
        "those",
    )
)  # fmt: skip
"""Pronouns and participles: as a name they say what happened to a thing, not what it is."""

FACTS: Final = ("SPLITS", "TEACHER_PREFIX", "MINIMUM_POSITIONS", "HUB_ID", "DTYPES")
"""Constants that once stood in several modules."""

FEATURE_LOSSES: Final = frozenset(("correlation", "cross_correlation", "cosine", "projector", "cka", "functional_cka"))


def local_names(function: Function) -> set[str]:
    """Parameters and all that is assigned inside, targets of comprehensions and lambdas too, not in inner functions."""
    names = set(_parameters(function.args))
    nodes: list[ast.AST] = list(function.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, Function | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if isinstance(node, ast.Lambda):
            names.update(_parameters(node.args))
        nodes.extend(ast.iter_child_nodes(node))
    return names


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    starred = [value for value in (arguments.vararg, arguments.kwarg) if value is not None]
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *starred):
        yield argument.arg


def forbidden_locals(house: House) -> dict[str, list[str]]:
    """Each function with a forbidden name, as `module:function`, and these names."""
    offenders: dict[str, list[str]] = {}
    for name, source in house.sources.items():
        for function in source.functions:
            names = sorted(local_names(function) & FORBIDDEN)
            if names:
                offenders[f"{name}:{function.lineno} {function.name}"] = names
    return offenders


def comment_share(sources: Iterable[Source]) -> float:
    """Lines that are a comment and nothing else, of all that are not empty."""
    lines = [line.strip() for source in sources for line in source.text.splitlines() if line.strip()]
    return sum(line.startswith("#") for line in lines) / len(lines)


def public_names(source: Source) -> list[str]:
    """Functions, classes and constants of a module without an underscore, imported ones left out."""
    names: list[str] = []
    for node in source.tree.body:
        if isinstance(node, Function | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.extend(target.id for target in targets if isinstance(target, ast.Name))
    return [name for name in names if not name.startswith("_") and name != "logger"]


def annotations_of(house: House, name: str) -> set[str]:
    """How a parameter, variable or attribute of that name is annotated, each way once."""
    ways: set[str] = set()
    for source in house.sources.values():
        for node in ast.walk(source.tree):
            is_parameter = isinstance(node, ast.arg) and node.arg == name
            is_variable = isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name
            annotation = getattr(node, "annotation", None)
            if (is_parameter or is_variable) and annotation is not None:
                ways.add(ast.unparse(annotation))
    return ways


def constants(house: House) -> Iterator[tuple[str, str, str]]:
    """Module, name without underscores, and value of each constant."""
    for module, source in house.sources.items():
        for node in source.tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name) and target.id.isupper():
                        yield module, target.id.strip("_"), ast.unparse(node.value)


def copies(house: House) -> dict[str, list[str]]:
    """Constants that several modules assign, by name and value, with these modules."""
    places: dict[str, list[str]] = defaultdict(list)
    for module, name, value in constants(house):
        places[f"{name} = {value}"].append(module)
    return {constant: modules for constant, modules in places.items() if len(modules) > 1}


def modules_with(house: House, names: frozenset[str]) -> list[str]:
    """Modules with two or more of the names as strings."""
    return [
        module
        for module, source in house.sources.items()
        if len(names & {node.value for node in ast.walk(source.tree) if isinstance(node, ast.Constant)}) > 1
    ]


def figures(house: House) -> dict[str, str]:
    """What is measured of a house, by the name of its row."""
    sources = list(house.sources.values())
    functions = [function_lines(node) for source in sources for node in source.functions]
    num_lines = sum(source.num_lines for source in sources)
    names = sum(len(public_names(source)) for source in sources)
    modules = Counter(source.folder for source in sources)
    folder, crowd = modules.most_common(1)[0]
    floors = sorted(house.inner_floors().items(), key=lambda item: (-item[1], item[0]))
    by_name = defaultdict(set)
    for module, name, _ in constants(house):
        by_name[name].add(module)
    reading = Reading(house)
    return {
        "files": f"{len(sources)}",
        "lines": f"{num_lines:,}",
        "lines of a file, median / p90 / max": _spread([source.num_lines for source in sources]),
        "functions": f"{len(functions):,}",
        "lines of a function, median / p90 / max": _spread(functions),
        "comment lines": f"{100 * comment_share(sources):.1f} %",
        "most modules of a folder": f"{crowd} ({folder})",
        "longest import chain inside a folder": ", ".join(f"{name} {floor}" for name, floor in floors[:6]),
        "public top-level names a 1,000 lines": f"{1000 * names / num_lines:.1f}",
        "functions with a forbidden local": f"{len(forbidden_locals(house))}",
        "annotations of `rows` / `features`": " / ".join(
            str(len(annotations_of(house, n))) for n in ("rows", "features")
        ),
        "modules that assign " + " / ".join(FACTS): " / ".join(str(len(by_name[name])) for name in FACTS),
        "constants with one name and value in several modules": f"{len(copies(house))}",
        "modules that list feature losses": f"{len(modules_with(house, FEATURE_LOSSES))}",
        "files opened from `distill` / climbs back up": f"{len(reading.files)} / {reading.climbs}",
    }


def _spread(values: Sequence[int]) -> str:
    ordered = sorted(values)
    return f"{statistics.median_low(ordered)} / {ordered[int(0.9 * (len(ordered) - 1))]} / {ordered[-1]}"


def main() -> None:
    """Print the table, and below it copies and forbidden names of the last checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("roots", nargs="*", type=Path, default=[Path()], help="Roots; this one by default.")
    roots = parser.parse_args().roots
    tables = [figures(House(root)) for root in roots]
    titles = ["before", "after"][-len(roots) :]
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(roots)}"]
    lines += [f"| {name} | {' | '.join(table[name] for table in tables)} |" for name in tables[0]]
    sys.stdout.write("\n".join(lines) + "\n")
    for constant, modules in copies(House(roots[-1])).items():
        sys.stdout.write(f"\nin {', '.join(modules)}: {constant}")
    for function, names in forbidden_locals(House(roots[-1])).items():
        sys.stdout.write(f"\n{function}: {', '.join(names)}")


if __name__ == "__main__":
    main()
