"""An import hook that checks the shapes of tensors in the functions of flexkd whose annotations name them."""

import ast
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, Final, TypeVar, cast, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped

Subject = TypeVar("Subject", bound=Callable[..., Any])

_BEARTYPE: Final = beartype(conf=BeartypeConf(violation_type=TypeCheckError))
_DECORATOR: Final = "__import__('tests.shape_checks').shape_checks.checked"


def install(modules: Sequence[str]) -> None:
    """Check these modules, none of which may have been imported before."""
    sys.meta_path.insert(0, _Finder(frozenset(modules)))


def checked(subject: Subject) -> Subject:
    """A function or dataclass with a check at every call if one of its annotations has a shape, else as it is.

    It takes milliseconds to make a check, also of a function inside another one, and long to carry it out; types that
    have no shape are left to mypy.
    """
    if any(_has_shape(annotation) for annotation in getattr(subject, "__annotations__", {}).values()):
        return jaxtyped(subject, typechecker=beartype) if isinstance(subject, type) else _checked_once(subject)
    return subject


def _checked_once(function: Subject) -> Subject:
    """Arguments before the call and the result after it; `jaxtyped` would check the arguments again with the result."""
    checking = _BEARTYPE(function)

    @wraps(function)
    def within_sizes_of_this_call(*arguments: Any, **options: Any) -> Any:
        with jaxtyped("context"):
            return checking(*arguments, **options)

    return cast(Subject, within_sizes_of_this_call)


def _has_shape(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    parts = annotation if isinstance(annotation, list) else get_args(annotation)
    return any(_has_shape(part) for part in parts)


class _Finder(MetaPathFinder):
    def __init__(self, modules: frozenset[str]) -> None:
        self.modules = modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self.modules else None
        if spec is not None:
            assert spec.origin is not None
            spec.loader = _Loader(fullname, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    """Decorates what is defined in a module; its bytecode is not that of the module, and is stored beside it."""

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:
        tree = ast.parse(data, path)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                decorator = ast.copy_location(ast.parse(_DECORATOR, mode="eval").body, node)
                # First to a function, as the annotations may be gone later; last to a class, which is a dataclass then.
                node.decorator_list.insert(0 if isinstance(node, ast.ClassDef) else len(node.decorator_list), decorator)
        code: CodeType = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)
        return code

    def get_data(self, path: str) -> bytes:
        return super().get_data(_apart(path))

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        super().set_data(_apart(path), data, _mode=_mode)  # type: ignore[call-arg]


def _apart(path: str) -> str:
    return f"{path.removesuffix('.pyc')}.shapes.pyc" if path.endswith(".pyc") else path
