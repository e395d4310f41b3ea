"""Nothing in the package is dead: it, its public names, the benchmarks or the site use every public name."""

import ast
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Final

import pytest

import flexkd
from tests.source_tree import PACKAGE, ROOT, Module, modules

ALLOWED: Final[dict[str, str]] = {}
"""Names that are used in a way which no scan by name can see, each with its reason."""

# Any other decorator registers what it decorates, such as a command, a validator or a property of a recipe.
PLAIN_DECORATORS: Final = {"cache", "cached_property", "classmethod", "contextmanager", "dataclass", "property"}

Definition = ast.FunctionDef | ast.ClassDef


@cache
def uses_everywhere() -> Counter[str]:
    """How often each name is read in the package, the benchmarks, the site and the templates of the pages."""
    beside = (path for folder in ("benchmarks", "website") for path in sorted((ROOT / folder).glob("*.py")))
    files = [*(module.path for module in modules().values()), *beside]
    counts = sum((uses(ast.parse(path.read_text(encoding="utf-8"))) for path in files), Counter[str]())
    for path in PACKAGE.rglob("*.html"):
        counts.update(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    counts.update([*flexkd.__all__, *flexkd.losses.__all__])
    return counts


def uses(tree: ast.AST) -> Counter[str]:
    """How often each name is read; an import alone is no use."""
    names = (
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute) and not isinstance(node.ctx, ast.Store)
    )
    return Counter(names)


def is_registered(node: Definition) -> bool:
    decorators = [ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list]
    return any(decorator.rpartition(".")[2] not in PLAIN_DECORATORS for decorator in decorators)


def is_override(module: Module, owner: ast.ClassDef, name: str) -> bool:
    """Whether a base class has the method, so that the code of that class may call it."""
    bases = getattr(importlib.import_module(module.name), owner.name).__mro__[1:]
    return any(hasattr(base, name) for base in bases)


def public_definitions(module: Module) -> Iterator[Definition]:
    for node in module.tree().body:
        if isinstance(node, Definition):
            yield node
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not is_override(module, node, member.name):
                    yield member


def public_constants(module: Module) -> Iterator[str]:
    for node in module.tree().body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


@cache
def unused(module: Module) -> tuple[str, ...]:
    return tuple(_unused(module))


def _unused(module: Module) -> Iterator[str]:
    for node in public_definitions(module):
        # A recursive call is no use.
        if not is_registered(node) and uses_everywhere()[node.name] <= uses(node)[node.name]:
            yield node.name
    yield from (name for name in public_constants(module) if not uses_everywhere()[name])


@pytest.mark.parametrize("module", list(modules().values()), ids=lambda module: module.name)
def test_every_public_function_class_method_and_constant_is_used(module: Module) -> None:
    dead = [name for name in unused(module) if not name.startswith("_") and name not in ALLOWED]
    assert not dead, f"{module.where}: nothing uses {dead}. Use or delete it, its tests as well."


def test_every_exception_from_the_rule_is_still_one() -> None:
    names = {name for module in modules().values() for name in unused(module)}
    assert set(ALLOWED) <= names, "these are used by now, or gone; take them off the list"
