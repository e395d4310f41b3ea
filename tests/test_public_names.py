"""The names that users import: all there, all documented, and cheap until they are used."""

import inspect
import subprocess
import sys

import pytest

import flexkd

# Fixed in design.md: outside checks call these.
FIXED = {
    "DistillationTrainer",
    "Objective",
    "UnitScores",
    "compare",
    "distill",
    "losses",
    "score_units",
    "select_units",
    "slice_student",
    "tune",
}


def test_all_is_sorted_without_repeats() -> None:
    assert flexkd.__all__ == sorted(set(flexkd.__all__))


def test_all_is_complete() -> None:
    missing = FIXED - set(flexkd.__all__)
    assert not missing, f"flexkd.__all__ lacks {sorted(missing)}"
    program = "import flexkd, types; print([n for n in dir(flexkd) if n[0] != '_' and n not in flexkd.__all__])"
    assert python(program) == "[]"


@pytest.mark.parametrize("name", flexkd.__all__)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(flexkd, name)
    document = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    assert document, f"flexkd.{name} has no docstring"
    # A dataclass without a docstring gets its own signature as one.
    assert not document.startswith(f"{name}("), f"flexkd.{name} has no docstring"


@pytest.mark.parametrize("name", sorted(vars(flexkd.losses)["__all__"]))
def test_every_loss_resolves_and_is_documented(name: str) -> None:
    value = getattr(flexkd.losses, name)
    assert not callable(value) or inspect.getdoc(value), f"flexkd.losses.{name} has no docstring"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = flexkd.no_such_name


def test_import_flexkd_loads_neither_torch_nor_transformers() -> None:
    program = "import sys, flexkd; print([n for n in ('torch', 'transformers', 'datasets') if n in sys.modules])"
    assert python(program) == "[]"


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
