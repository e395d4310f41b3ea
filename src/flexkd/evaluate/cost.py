"""What a model costs: size, speed and memory, measured in a fresh process for every model."""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexkd.errors import ArtifactError, RecipeError, unknown_name
from flexkd.models.hidden import model_inputs

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STATUS: Final = Path("/proc/self/status")
_STDERR_LINES: Final = 8


@dataclass(frozen=True)
class Cost:
    """Size, speed and memory of one model; `device` names where the last two were measured."""

    parameters: int
    bytes_on_disk: int
    examples_per_second: float
    peak_memory_bytes: int
    device: str


def measure_cost(
    model_dir: str | Path,
    batches: Iterable[Mapping[str, object]],
    *,
    precision: str = "float32",
    repeats: int = 5,
) -> Cost:
    """Measure a saved model in a fresh process, so that no other model's memory or warm cache counts.

    The weights are held in the given precision. Examples a second are the median over repeats of one pass over all
    batches, after one pass to warm up. Peak memory is the highest resident memory less what was resident before the
    model was loaded; on CUDA, the most that was allocated. Tied weights count once.

    Args:
        model_dir: Folder that plain transformers can load.
        batches: Dicts of tensors; the same ones for every model that is compared. Only keys that the model's forward
            names are used, labels never.
        precision: float32, bfloat16 or float16.
        repeats: Timed passes.

    Raises:
        ArtifactError: The folder holds no weights, or the model could not be loaded or run.
    """
    if precision not in _DTYPES:
        raise RecipeError(unknown_name("precision", "precision", precision, _DTYPES))
    if repeats < 1:
        raise RecipeError(f"repeats: must be at least 1, was {repeats}. Give the number of timed passes.")
    bytes_on_disk = weight_bytes(model_dir)
    with tempfile.TemporaryDirectory(prefix="flexkd-cost-") as folder:
        inputs, result = Path(folder) / "batches.safetensors", Path(folder) / "result.json"
        save_file(_flat(batches), inputs)
        job = [str(model_dir), str(inputs), str(result), precision, str(repeats)]
        # -P: a file of the user's working folder must not stand in for a library.
        child = subprocess.run(
            [sys.executable, "-P", "-m", "flexkd.evaluate.cost", *job],
            env=_child_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if child.returncode != 0 or not result.exists():
            raise ArtifactError(_failure(model_dir, child))
        return Cost(bytes_on_disk=bytes_on_disk, **json.loads(result.read_text(encoding="utf-8")))


def weight_bytes(model_dir: str | Path) -> int:
    """Bytes of the weight files of a saved model: its safetensors, or where there are none its .bin or .gguf."""
    for pattern in ("*.safetensors", "*.bin", "*.gguf"):
        sizes = [path.stat().st_size for path in Path(model_dir).glob(pattern)]
        if sizes:
            return sum(sizes)
    raise ArtifactError(
        f"{model_dir}: holds no weight files (*.safetensors). Give a folder that save_pretrained wrote."
    )


def _flat(batches: Iterable[Mapping[str, object]]) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": value.detach().cpu().contiguous().clone()
        for index, batch in enumerate(batches)
        for key, value in batch.items()
        if isinstance(value, Tensor) and key != "labels"
    }


def _child_environment() -> dict[str, str]:
    """The parent's, quiet, and with nothing looked up in the network: the model is a folder."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **quiet}


def _failure(model_dir: str | Path, child: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in child.stderr.splitlines() if line.strip()][-_STDERR_LINES:]
    said = "".join(f"\n  {line}" for line in lines) or " nothing"
    killed = " It was killed: the machine may be out of memory." if child.returncode < 0 else ""
    return (
        f"{model_dir}: the model could not be measured, its process ended with code {child.returncode}.{killed} "
        f"Load it with plain transformers to see why; the last lines it said:{said}"
    )


def _measure(model_dir: str, inputs: str, result: str, precision: str, repeats: str) -> None:
    """The child's work: load, run, and leave the numbers in a file, since libraries may print what they like."""
    batches = _unflat(load_file(inputs))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = _model_class(model_dir)  # imports the model's code, which is none of its memory
    before, _ = _resident_bytes()
    model = kind.from_pretrained(model_dir, dtype=_DTYPES[precision]).eval()
    model.to(device)
    ready = [model_inputs(model, {key: value.to(device) for key, value in batch.items()}) for batch in batches]
    rows = sum(len(next(iter(batch.values()))) for batch in ready)
    with torch.no_grad():
        _pass_seconds(model, ready, device)
        seconds = statistics.median(_pass_seconds(model, ready, device) for _ in range(int(repeats)))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_bytes()[1] - before
    numbers = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "examples_per_second": rows / seconds,
        "peak_memory_bytes": max(peak, 0),
        "device": device.type,
    }
    Path(result).write_text(json.dumps(numbers), encoding="utf-8")


def _unflat(tensors: Mapping[str, Tensor]) -> Sequence[dict[str, Tensor]]:
    batches: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        batches.setdefault(int(index), {})[key] = value
    return [batches[index] for index in sorted(batches)]


def _model_class(model_dir: str) -> type[transformers.PreTrainedModel]:
    config = transformers.AutoConfig.from_pretrained(model_dir)
    if not config.architectures:
        raise ArtifactError(f"{model_dir}: config.json names no architecture. Save the model with save_pretrained.")
    kind: type[transformers.PreTrainedModel] = getattr(transformers, config.architectures[0])
    return kind


def _pass_seconds(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], device: torch.device) -> float:
    start = time.perf_counter()
    for batch in batches:
        model(**batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _resident_bytes() -> tuple[int, int]:
    """Resident memory now and at its highest.

    Linux counts a parent's peak into its child's `ru_maxrss` (it is kept over exec), so there the process's own
    high-water mark is read; elsewhere `ru_maxrss` stands for both.
    """
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
        now, highest = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, highest
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak, peak  # bytes on macOS, the other system with this call


if __name__ == "__main__":
    _measure(*sys.argv[1:])
