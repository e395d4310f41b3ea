"""Processes that run one recipe together, as `accelerate launch` and `torchrun` start them.

All of them run the same lines. What one alone can know (whether a file is there, how long a step takes) the first one
decides for all; what is done row by row they divide; one writes each file. They do so once they have met (`join`, which
every run of a recipe begins with): in a script whose processes have rows of their own each works for itself, and with a
single process nothing of this costs anything.
"""

import atexit
import functools
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from flexkd.errors import FlexKDError, FollowedError, ProcessError

Item = TypeVar("Item")
Result = TypeVar("Result")

_LONGEST_WAIT: Final = timedelta(days=7)
"""How long processes wait for work that the first one does alone; a launcher ends them earlier if that one fails."""
_LONGEST_COLLECTIVE: Final = timedelta(days=1)
"""How long a process waits for the others in work that they share, such as for a checkpoint on a slow disk."""
_LAST_WAIT: Final = 5.0
"""Seconds that the first process gives the others to notice that it has failed."""
_LAST_WAIT_AFTER_SUCCESS: Final = 600.0
_THREADS: Final = "OMP_NUM_THREADS"
_state: Final[set[str]] = set()
_PAUSE: Final = 0.05
_FSDP: Final = "ACCELERATE_USE_FSDP"
_MEETING: Final = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_OF_A_LAUNCHER: Final = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", *_MEETING)
_NUMBERS: Final = itertools.count()


def num_launched() -> int:
    """Processes that a launcher has started together, whether they have met or not; 1 without one."""
    return _number("WORLD_SIZE", 1)


def speaks() -> bool:
    """Whether this process speaks for all that a launcher has started."""
    return num_launched() == 1 or _number("RANK", 0) == 0


def num_processes() -> int:
    """Processes that work together: those that have met."""
    return num_launched() if _has_joined() else 1


def process_index() -> int:
    """Index of this process among those that work together, from 0."""
    return _number("RANK", 0) if num_processes() > 1 else 0


def is_first() -> bool:
    """Whether this process decides and writes for all that work together."""
    return process_index() == 0


def environment_of_one_process() -> dict[str, str]:
    """The environment without what a launcher has added, for a program that works by itself while the others wait."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    threads = environment.get(_THREADS, "")
    if threads.isdigit():
        environment[_THREADS] = str(int(threads) * _number("LOCAL_WORLD_SIZE", 1))
    return environment


def shards_weights() -> bool:
    """Whether a launcher asks for FSDP: while a model trains, each process holds a part of its weights."""
    return os.environ.get(_FSDP, "").lower() in ("true", "1")


def _settle_sharding() -> None:
    """Set what accelerate and transformers read of FSDP to what a recipe needs, before either reads it."""
    if not shards_weights():
        return
    # Accelerate takes "1" for no, and without a policy it would gather the whole model for each forward.
    os.environ[_FSDP] = "true"
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    # With it transformers would load empty weights in all processes but the first, those of the teacher too.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # A checkpoint then holds plain weights, and any number of processes continues from it.
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"


def join() -> None:
    """Meet the other processes, before the first thing is decided or divided.

    Raises:
        ProcessError: The launcher did not say which process this is, or where they meet.
    """
    _settle_sharding()
    if num_launched() == 1:
        return
    missing = [name for name in _MEETING if name not in os.environ]
    if missing:
        raise ProcessError(
            f"{', '.join(missing)}: not set, though WORLD_SIZE is {num_launched()}. Start several processes with "
            "'accelerate launch -m flexkd ...' or 'torchrun -m flexkd ...', or unset WORLD_SIZE for one."
        )
    rank = _number("RANK", 0)
    if rank >= num_launched():
        raise ProcessError(f"RANK: is {rank}, and processes count from 0 to {num_launched() - 1}.")
    _store()


def check_one_process(what: str) -> None:
    """Refuse several processes, as one does it all.

    Raises:
        ProcessError: Several were launched; they have met then, so that one of them says it.
    """
    join()
    if num_launched() > 1:
        raise ProcessError(f"{what}: {num_launched()} processes, and it runs in one. Start it without a launcher.")


def decided(decide: Callable[[], Result]) -> Result:
    """What the first process decides, in all of them; the others wait for it outside of any collective.

    Args:
        decide: Called in the first process alone. Its result is what JSON holds.

    Raises:
        FollowedError: In the others, where it failed in the first one, which says why.
    """
    if num_processes() == 1:
        return decide()
    number = next(_NUMBERS)
    if is_first():
        try:
            result = decide()
        except BaseException:
            _answer(number, {"failed": True})
            raise
        _answer(number, {"result": result})
        return result
    store, key = _store(), _key(number)
    try:
        store.wait([key], _LONGEST_WAIT)
        answer = json.loads(store.get(key))
    except RuntimeError:  # the store ends with the first process
        answer = {"failed": True}
    if "failed" in answer:
        raise FollowedError("another process failed, and says why.")
    result = answer["result"]
    return result


def follow() -> None:
    """Wait until the first process has come here, as what it has written is read next."""
    decided(lambda: None)


@contextmanager
def in_turn() -> Iterator[None]:
    """Let the first process do something before the others do the same: they find what it has fetched or converted."""
    if not is_first():
        follow()
    try:
        yield
    except BaseException:
        if is_first() and num_processes() > 1:
            _answer(next(_NUMBERS), {"failed": True})
        raise
    if is_first():
        follow()


def check_alike(what: str, value: str, *, advice: str) -> None:
    """Refuse processes that would not do the same.

    Args:
        what: Names the value in the message.
        value: Of this process.
        advice: What the user can do.

    Raises:
        ProcessError: In every process; names the first one that differs, with both values.
    """
    values = gathered(value)
    for index, other in enumerate(values):
        if other != values[0]:
            raise ProcessError(f"{what}: process 0 has {values[0]!r}, process {index} {other!r}. {advice}")


def check_shared(folder: Path) -> None:
    """Refuse processes that do not see what the first one writes into a folder.

    Raises:
        ProcessError: In every process; names the first one that does not see it.
    """

    def mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".flexkd-meeting-", dir=folder)
        os.close(descriptor)
        return Path(name).name

    name = decided(mark)
    try:
        are_seen = gathered((folder / name).is_file())
    finally:
        if is_first():
            (folder / name).unlink()
    if not all(are_seen):
        raise ProcessError(
            f"{folder}: process 0 writes there, and process {are_seen.index(False)} does not see it. Put it on a file "
            "system that all nodes share."
        )


def _key(number: int) -> str:
    return f"decision {number}"


def _answer(number: int, answer: dict[str, Any]) -> None:
    """Tell the others what the first process has decided."""
    _store().set(_key(number), json.dumps(answer))


def alone(work: Callable[[], object]) -> None:
    """Let the first process do something, while the others wait outside of any collective."""
    decided(lambda: (work(), None)[1])


def may_complain() -> bool:
    """Whether this process is the first one with something to complain of: one of them says what is wrong.

    Before they have met, any of them may be the only one.
    """
    if num_processes() == 1:
        return True
    rank = str(process_index())
    try:
        return bool(_store().compare_set("complaint", "", rank).decode() == rank)
    except RuntimeError:  # the store ended with the first process
        return False


def leave(*, failed: bool = False) -> None:
    """Part from the others at the end of a command: the first process goes last, as what they read ends with it.

    Args:
        failed: In the first process: what the others wait for will not come, and they end too.
    """
    if num_processes() == 1 or "left" in _state:
        return
    _state.add("left")
    if not is_first():
        with suppress(RuntimeError):
            _store().add("left", 1)
        _end_group(failed=failed)
        return
    if failed:
        _answer(next(_NUMBERS), {"failed": True})
    end = time.monotonic() + (_LAST_WAIT if failed else _LAST_WAIT_AFTER_SUCCESS)
    while _store().add("left", 0) < num_processes() - 1 and time.monotonic() < end:
        time.sleep(_PAUSE)
    _end_group(failed=failed)


def _end_group(*, failed: bool) -> None:
    """End the group of processes that NCCL serves, which otherwise warns at exit, and may hang there.

    Not after an error, where the others are no longer there to end it with; nor where gloo serves it alone, which ends
    with the process.
    """
    import torch.distributed as dist

    if failed or not dist.is_initialized() or "nccl" not in dist.get_backend_config():
        return
    # Whatever it waits for, the work is done, and the process ends.
    ending = threading.Thread(target=dist.destroy_process_group, daemon=True)
    ending.start()
    ending.join(_LAST_WAIT)


def divided(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """The results of some work on each item, in the order of the items, in every process.

    Each process works on every N-th item, and hands the others what came of it: a result has to be small, and on the
    CPU. What is added up from the results has the same order for any number of processes.

    Args:
        items: The same in each process.
        work: Does not meet the other processes.
    """
    if num_processes() == 1:
        yield from map(work, items)
        return
    for shared in _batched(items):
        outcome: Any = _outcome(work, shared[process_index()]) if process_index() < len(shared) else None
        for result, error in gathered(outcome)[: len(shared)]:
            if error is not None:
                raise error
            yield result


def share_of(items: Iterable[Item]) -> Iterator[Item]:
    """The items of this process: every N-th one."""
    return itertools.islice(items, process_index(), None, num_processes())


def gathered(value: Result) -> list[Result]:
    """The values of all processes in their order, in every process; sums over them are the same in each."""
    if num_processes() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * num_processes()
    try:
        dist.all_gather_object(values, value, group=_group())
    except RuntimeError as error:
        if "timed out" in str(error).lower():
            raise
        raise FollowedError(f"another process ended ({error})") from error
    return values


def _outcome(work: Callable[[Item], Result], item: Item) -> tuple[Result | None, FlexKDError | None]:
    """A result, or the error that all processes raise in its place."""
    try:
        return work(item), None
    except FlexKDError as error:
        return None, error


def _batched(items: Iterable[Item]) -> Iterator[tuple[Item, ...]]:
    """The items of each round, one for each process."""
    iterator = iter(items)
    while shared := tuple(itertools.islice(iterator, num_processes())):
        yield shared


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if text and not text.isdigit():
        raise ProcessError(f"{name}: is {text!r}, and a launcher sets it to a whole number. Unset it for one process.")
    return int(text) if text else default


def _has_joined() -> bool:
    return _store.cache_info().currsize > 0


@functools.cache
def _store() -> Any:
    """A store of keys that all processes reach, beside the one with which their group was made."""
    import torch
    import torch.distributed as dist
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.cuda.is_available(), timeout=_LONGEST_COLLECTIVE)
    host = os.environ["MASTER_ADDR"]
    make: Any = partial(dist.TCPStore, host, wait_for_workers=False, timeout=_LONGEST_WAIT)  # type: ignore[attr-defined]
    store = make(port=0, is_master=True) if speaks() else None
    port = broadcast_object_list([None if store is None else store.port])[0]
    # In a script the first process may end before the others have read what it decided last.
    atexit.register(lambda: leave(failed=hasattr(sys, "last_value")))
    return store or make(port=int(port), is_master=False)


@functools.cache
def _group() -> Any:
    """A group for what lies on the CPU, whatever device the models are on."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=_LONGEST_COLLECTIVE)
