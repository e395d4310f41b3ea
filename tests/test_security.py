"""What SECURITY.md promises, as far as the source shows it."""

import ast
import re
from functools import cache

from tests.source_tree import ROOT, modules

FULL_PICKLE = "models.loading.int8"
"""The one module that unpickles in full, what the same run has written."""
PICKLES = re.compile(r"^\s*(import|from) (pickle|dill|cloudpickle|joblib|shelve)\b", re.MULTILINE)
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}


@cache
def calls() -> tuple[tuple[str, str, ast.Call], ...]:
    """Every call in the source: its module, its function as it is written, and the call."""
    return tuple(
        (module.name, ast.unparse(node.func), node)
        for module in modules().values()
        for node in ast.walk(ast.parse(module.path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    )


def test_nothing_is_unpickled_that_could_run_code() -> None:
    loads = [(module, call) for module, function, call in calls() if function == "torch.load"]
    assert loads, "torch.load is called by another name"
    for module, call in loads:
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert arguments["weights_only"] == ("False" if module.endswith(FULL_PICKLE) else "True"), module
    texts = {module.name: module.path.read_text(encoding="utf-8") for module in modules().values()}
    assert not [name for name, text in texts.items() if PICKLES.search(text)]


def test_no_text_becomes_code_and_no_model_brings_its_own() -> None:
    for module, function, call in calls():
        assert function not in RUNS_TEXT, f"{module}: {function}"
        trust = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "trust_remote_code"]
        assert trust in ([], ["NO_CODE"]), module


def test_no_address_is_kept_outside_the_one_setting() -> None:
    """Of the project itself; it is empty until there is a home."""
    for name in ("CITATION.cff", "SECURITY.md", "CONTRIBUTING.md", "mkdocs.yml"):
        assert not re.search(r"https?://|[\w.]+@[\w.]+", (ROOT / name).read_text(encoding="utf-8")), name
