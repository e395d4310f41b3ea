"""Size, speed, latency and memory of models, each measured in a process of its own."""

import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Final

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexkd.allocator import HUGE_PAGES
from flexkd.errors import ArtifactError, RecipeError, unknown_name
from flexkd.evaluate.generation import decoder_start
from flexkd.files import writing
from flexkd.models.forward.autocast import DTYPES
from flexkd.models.forward.hidden import model_inputs
from flexkd.models.loading.int8 import int8_loader
from flexkd.processes import environment_of_one_process
from flexkd.record import LatencyRecord

_STATUS: Final = Path("/proc/self/status")
_STDERR_LINES: Final = 8
_TURN_ROWS: Final = 8
"""Rows that a model answers one by one before it is the turn of the next model."""


@dataclass(frozen=True)
class Cost:
    """Size, speed, latency and memory of one model.

    `device` is the type of device of the measurement, `dtype` the number type in which the weights are saved; `latency`
    is None where no rows were timed one by one.
    """

    parameters: int
    bytes_on_disk: int
    examples_per_second: float
    peak_memory_bytes: int
    device: str
    dtype: str = ""
    latency: LatencyRecord | None = None


def measure_costs(
    model_dirs: Sequence[str | Path],
    batches: Iterable[Mapping[str, object]],
    *,
    precision: str = "float32",
    repeats: int = 5,
    new_tokens: int = 0,
    single_rows: int = 0,
    own_batches: Mapping[int, Iterable[Mapping[str, object]]] = MappingProxyType({}),
) -> list[Cost]:
    """Measure saved models side by side, each in a process of its own, so that only its own memory counts.

    The weights have the given precision, but for copies in int8. After one pass over all batches as warm-up, the models
    take turns: a pass of each, `repeats` times; examples a second are the median. Other work on the machine thus slows
    down all models alike: on shared cores the speed of a model can change by a factor of two from one minute to the
    next. Then the models take turns with single rows without padding, whose times are the latency. Peak memory is the
    highest resident memory minus the memory before the model was loaded; on CUDA, the largest allocation. Tied weights
    count once.

    Args:
        model_dirs: Folders that plain transformers can load; all models are in memory at the same time.
        batches: Dicts of tensors. A model gets the keys that its forward names, never labels.
        precision: float32, bfloat16 or float16.
        repeats: Number of timed passes.
        new_tokens: Number of tokens that a language model generates for each prompt, without stopping early, so that
            short answers do not make a model fast; 0: a forward pass.
        single_rows: Number of rows, the first ones, that are timed one by one; 0: none.
        own_batches: The same rows in the encoding of a model that reads another one, by its place in `model_dirs`.

    Raises:
        ArtifactError: A folder holds no weights, or its model could not be loaded or run.
    """
    if precision not in DTYPES:
        raise RecipeError(unknown_name("precision", "precision", precision, DTYPES))
    if repeats < 1:
        raise RecipeError(f"repeats: must be at least 1, was {repeats}. Give the number of timed passes.")
    sizes = [weight_bytes(model_dir) for model_dir in model_dirs]
    with tempfile.TemporaryDirectory(prefix="flexkd-cost-") as folder, ExitStack() as stack:
        files = [Path(folder, f"{index}.safetensors") for index in ("batches", *own_batches)]
        for file, of_file in zip(files, (batches, *own_batches.values()), strict=True):
            with writing(file):
                save_file(_flat(of_file), file)
        inputs = dict(zip(own_batches, files[1:], strict=True))
        children = [
            stack.enter_context(_child(model_dir, inputs.get(index, files[0]), precision, new_tokens))
            for index, model_dir in enumerate(model_dirs)
        ]
        seconds = [[float(child.ask("pass")) for child in children] for _ in range(repeats)]
        row_seconds = _row_seconds(children, single_rows)
        facts = [json.loads(child.ask("end")) for child in children]
    return [
        Cost(
            parameters=fact["parameters"],
            bytes_on_disk=size,
            examples_per_second=fact["rows"] / statistics.median(turn[index] for turn in seconds),
            peak_memory_bytes=fact["peak_memory_bytes"],
            device=fact["device"],
            dtype=fact["dtype"],
            latency=_latency(row_seconds[index], new_tokens, fact.get("threads", 0)),
        )
        for index, (fact, size) in enumerate(zip(facts, sizes, strict=True))
    ]


def _row_seconds(children: Sequence["_Child"], count: int) -> list[list[float]]:
    """Seconds of each row of each model; the models take turns of a few rows."""
    seconds: list[list[float]] = [[] for _ in children]
    for start in range(0, count, _TURN_ROWS):
        for child, times in zip(children, seconds, strict=True):
            times += json.loads(child.ask(f"rows {start} {min(start + _TURN_ROWS, count)}"))
    return seconds


def _latency(seconds: Sequence[float], tokens: int, threads: int) -> LatencyRecord | None:
    if not seconds:
        return None
    median, p95 = (float(value) for value in np.percentile(np.asarray(seconds) * 1000, [50, 95]))
    return LatencyRecord(len(seconds), median, p95, tokens=tokens, threads=threads)


def weight_bytes(model_dir: str | Path) -> int:
    """Size in bytes of the weight files of a saved model: its safetensors, or else its .bin or .gguf files."""
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


@contextmanager
def _child(model_dir: str | Path, inputs: Path, precision: str, new_tokens: int) -> Iterator["_Child"]:
    """A process that has loaded and warmed up the model; it is ended afterwards."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment[HUGE_PAGES] = "0"  # flexkd may use them, but users of the model do not
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            # -P: a file in the working folder must not shadow a library.
            [sys.executable, "-P", "-m", "flexkd.evaluate.cost", *map(str, (model_dir, inputs, precision, new_tokens))],
            env={**environment_of_one_process(), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        try:
            child = _Child(model_dir, process, stderr)
            child.answer()  # "ready": the next model must not load at the same time
            yield child
        finally:
            process.kill()
            process.communicate()


@dataclass(frozen=True)
class _Child:
    """A process that holds one model and answers each request with one line."""

    model_dir: str | Path
    process: subprocess.Popen[str]
    stderr: IO[bytes]

    def ask(self, request: str) -> str:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended, which `answer` reports
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return line
        code = self.process.wait()
        self.stderr.seek(0)
        text = self.stderr.read().decode("utf-8", errors="replace")
        lines = "".join([f"\n  {line}" for line in text.splitlines() if line.strip()][-_STDERR_LINES:])
        killed = " It was killed: the machine may be out of memory." if code < 0 else ""
        raise ArtifactError(
            f"{self.model_dir}: the model could not be measured, its process ended with code {code}.{killed} "
            f"Load it with plain transformers to see why; the last lines it said:{lines or ' nothing'}"
        )


def _serve(model_dir: str, inputs: str, precision: str, new_tokens: str) -> None:
    """Main function of the child process: load the model, warm up, then answer requests until they end."""
    # Libraries may print to stdout: that is redirected to stderr, so that the pipe carries answers alone.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    batches = _unflat(load_file(inputs))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Both import the code of the model, which must not count as its memory.
    model_class, load_int8 = _model_class(model_dir), int8_loader(Path(model_dir))
    before, _ = resident_bytes()
    model = load_int8() if load_int8 else model_class.from_pretrained(model_dir, dtype=DTYPES[precision]).eval()
    torch.nn.Module.to(model, device)
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    run: Callable[..., object]
    if int(new_tokens):
        run, inputs_of_model = _generation(model, batches, int(new_tokens))
    else:
        run, inputs_of_model = model, [model_inputs(model, batch) for batch in batches]
    with torch.no_grad():
        _pass_seconds(run, inputs_of_model, device)
        print("ready", file=answers)
        for line in sys.stdin:
            request, *bounds = line.split()
            if request == "rows":
                rows = _single_rows(inputs_of_model, *map(int, bounds))
                _pass_seconds(run, rows[:1], device)  # the other models have run since its last turn
                print(json.dumps([_pass_seconds(run, [row], device) for row in rows]), file=answers)
            elif request == "pass":
                print(_pass_seconds(run, inputs_of_model, device), file=answers)
            else:
                break
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()[1] - before
    facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rows": sum(len(next(iter(batch.values()))) for batch in inputs_of_model),
        "peak_memory_bytes": max(peak, 0),
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "dtype": str(transformers.AutoConfig.from_pretrained(model_dir).dtype or "").removeprefix("torch."),
    }
    print(json.dumps(facts), file=answers)


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
    model_class: type[transformers.PreTrainedModel] = getattr(transformers, config.architectures[0])
    return model_class


_Batches = Sequence[Mapping[str, Tensor]]


def _generation(
    model: transformers.PreTrainedModel, batches: _Batches, new_tokens: int
) -> tuple[Callable[..., object], _Batches]:
    """A function that generates exactly so many tokens, without stop tokens and defaults of the checkpoint."""
    pad = model.config.pad_token_id
    config = transformers.GenerationConfig(
        max_new_tokens=new_tokens,
        pad_token_id=0 if pad is None else pad,
        decoder_start_token_id=decoder_start(model) if model.config.is_encoder_decoder else None,
    )
    model.generation_config = transformers.GenerationConfig()
    prompts = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]
    generate: Any = model.generate
    return functools.partial(generate, generation_config=config), prompts


def _single_rows(batches: _Batches, start: int, stop: int) -> list[dict[str, Tensor]]:
    """Some of all rows, each as a batch of its own and without the padding that its batch gave it."""
    places = [(batch, row) for batch in batches for row in range(len(next(iter(batch.values()))))]
    return [_single_row(batch, row) for batch, row in places[start:stop]]


def _single_row(batch: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    mask = batch.get("attention_mask")
    single = {key: value[row : row + 1] for key, value in batch.items()}
    if mask is None:
        return single
    tokens = mask[row].bool()
    return {key: value[:, tokens] if batch[key].shape == mask.shape else value for key, value in single.items()}


def _pass_seconds(run: Callable[..., object], batches: _Batches, device: torch.device) -> float:
    start = time.perf_counter()
    for batch in batches:
        run(**batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def resident_bytes() -> tuple[int, int]:
    """Resident memory of this process in bytes, at present and at its peak.

    On Linux a child's `ru_maxrss` includes its parent's peak, as exec does not reset it; /proc has the peak of the
    process alone. On other systems both values are `ru_maxrss`.
    """
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
        present, highest = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return present, highest
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak, peak  # in bytes on macOS


if __name__ == "__main__":
    _serve(*sys.argv[1:])
