"""What a model costs: size, speed and memory, measured in a fresh process for every model."""

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
from typing import IO, Any, Final

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexkd.allocator import HUGE_PAGES
from flexkd.errors import ArtifactError, RecipeError, unknown_name
from flexkd.evaluate.generation import decoder_start
from flexkd.models.forward.autocast import DTYPES
from flexkd.models.forward.hidden import model_inputs

_STATUS: Final = Path("/proc/self/status")
_STDERR_LINES: Final = 8


@dataclass(frozen=True)
class Cost:
    """Size, speed and memory of one model.

    `device` names where the last two were measured, `dtype` the number type that its weights are saved in.
    """

    parameters: int
    bytes_on_disk: int
    examples_per_second: float
    peak_memory_bytes: int
    device: str
    dtype: str = ""


def measure_cost(
    model_dir: str | Path,
    batches: Iterable[Mapping[str, object]],
    *,
    precision: str = "float32",
    repeats: int = 5,
    new_tokens: int = 0,
) -> Cost:
    """Measure one saved model as `measure_costs` does; models that are to be compared belong into one call of that."""
    return measure_costs([model_dir], batches, precision=precision, repeats=repeats, new_tokens=new_tokens)[0]


def measure_costs(
    model_dirs: Sequence[str | Path],
    batches: Iterable[Mapping[str, object]],
    *,
    precision: str = "float32",
    repeats: int = 5,
    new_tokens: int = 0,
) -> list[Cost]:
    """Measure saved models side by side, each in a fresh process, so that no other model's memory or cache counts.

    The weights are held in the given precision. After one pass over all batches to warm up, the models take turns: a
    pass of each, `repeats` times; examples a second are the median. Other work on the machine thus slows all of them
    alike: on shared cores the speed of one model was seen to change by a factor of two from one minute to the next.
    Peak memory is the highest resident memory less what was resident before the model was loaded; on CUDA, the most
    that was allocated. Tied weights count once.

    Args:
        model_dirs: Folders that plain transformers can load; all are in memory at the same time.
        batches: Dicts of tensors. Only keys that a model's forward names are used, labels never.
        precision: float32, bfloat16 or float16.
        repeats: Timed passes.
        new_tokens: Language models answer each prompt with so many tokens, whatever they would say, so that a model is
            not fast because it is brief; 0 is a forward, as classifiers need it.

    Raises:
        ArtifactError: A folder holds no weights, or its model could not be loaded or run.
    """
    if precision not in DTYPES:
        raise RecipeError(unknown_name("precision", "precision", precision, DTYPES))
    if repeats < 1:
        raise RecipeError(f"repeats: must be at least 1, was {repeats}. Give the number of timed passes.")
    sizes = [weight_bytes(model_dir) for model_dir in model_dirs]
    with tempfile.TemporaryDirectory(prefix="flexkd-cost-") as folder, ExitStack() as stack:
        inputs = Path(folder, "batches.safetensors")
        save_file(_flat(batches), inputs)
        children = [stack.enter_context(_child(model_dir, inputs, precision, new_tokens)) for model_dir in model_dirs]
        seconds = [[float(child.ask("pass")) for child in children] for _ in range(repeats)]
        facts = [json.loads(child.ask("end")) for child in children]
    return [
        Cost(
            parameters=fact["parameters"],
            bytes_on_disk=size,
            examples_per_second=fact["rows"] / statistics.median(turn[index] for turn in seconds),
            peak_memory_bytes=fact["peak_memory_bytes"],
            device=fact["device"],
            dtype=fact["dtype"],
        )
        for index, (fact, size) in enumerate(zip(facts, sizes, strict=True))
    ]


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


@contextmanager
def _child(model_dir: str | Path, inputs: Path, precision: str, new_tokens: int) -> Iterator["_Child"]:
    """A process with the model loaded and warm; it is gone afterwards."""
    plain = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    plain[HUGE_PAGES] = "0"  # this process may have them; models are measured as others run them
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            # -P: a file of the user's working folder must not stand in for a library.
            [sys.executable, "-P", "-m", "flexkd.evaluate.cost", *map(str, (model_dir, inputs, precision, new_tokens))],
            env={**os.environ, **plain},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        try:
            child = _Child(model_dir, process, said)
            child.answer()  # "ready": the next one must not load beside it
            yield child
        finally:
            process.kill()
            process.communicate()


@dataclass(frozen=True)
class _Child:
    """A process that holds one model and answers questions with one line each."""

    model_dir: str | Path
    process: subprocess.Popen[str]
    said: IO[bytes]

    def ask(self, question: str) -> str:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: there will be no answer
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return line
        code = self.process.wait()
        self.said.seek(0)
        text = self.said.read().decode("utf-8", errors="replace")
        lines = "".join([f"\n  {line}" for line in text.splitlines() if line.strip()][-_STDERR_LINES:])
        killed = " It was killed: the machine may be out of memory." if code < 0 else ""
        raise ArtifactError(
            f"{self.model_dir}: the model could not be measured, its process ended with code {code}.{killed} "
            f"Load it with plain transformers to see why; the last lines it said:{lines or ' nothing'}"
        )


def _serve(model_dir: str, inputs: str, precision: str, new_tokens: str) -> None:
    """The child's work: load, warm up, then answer until nobody asks any more."""
    # Libraries may print what they like: it goes where the errors go, answers keep the pipe for themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    batches = _unflat(load_file(inputs))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = _model_class(model_dir)  # imports the model's code, which is none of its memory
    before, _ = resident_bytes()
    model = kind.from_pretrained(model_dir, dtype=DTYPES[precision]).eval()
    model.to(device)
    placed = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    run, ready = _answering(model, placed, int(new_tokens)) if int(new_tokens) else _reading(model, placed)
    with torch.no_grad():
        _pass_seconds(run, ready, device)
        print("ready", file=answers)
        for line in sys.stdin:
            if line.strip() != "pass":
                break
            print(_pass_seconds(run, ready, device), file=answers)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()[1] - before
    facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rows": sum(len(next(iter(batch.values()))) for batch in ready),
        "peak_memory_bytes": max(peak, 0),
        "device": device.type,
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
    kind: type[transformers.PreTrainedModel] = getattr(transformers, config.architectures[0])
    return kind


_Batches = Sequence[Mapping[str, Tensor]]


def _reading(model: transformers.PreTrainedModel, batches: _Batches) -> tuple[Callable[..., object], _Batches]:
    return model, [model_inputs(model, batch) for batch in batches]


def _answering(
    model: transformers.PreTrainedModel, batches: _Batches, new_tokens: int
) -> tuple[Callable[..., object], _Batches]:
    """Answers of exactly so many tokens: without a stop token, and without any default of the checkpoint."""
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


def _pass_seconds(run: Callable[..., object], batches: _Batches, device: torch.device) -> float:
    start = time.perf_counter()
    for batch in batches:
        run(**batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def resident_bytes() -> tuple[int, int]:
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
    _serve(*sys.argv[1:])
