"""Names and shapes of stored weights, from the headers of safetensors files, and the errors for what is wrong."""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from safetensors import SafetensorError, safe_open

from flexkd.errors import UnsupportedModelError
from flexkd.facts.names import CONFIG_FILE, INDEX_ENDING, MODEL_STEM, PICKLED_WEIGHTS
from flexkd.files import is_pointer

_NAMED: Final = 3

PEFT_PREFIX: Final = "base_model.model."
"""What PEFT puts before the names of its base."""

_PREFIXES: Final = {
    "_orig_mod.": ("torch.compile", "model._orig_mod"),
    "module.": ("DataParallel, DistributedDataParallel or DeepSpeed", "model.module"),
    "_fsdp_wrapped_module.": ("FSDP", "the whole state"),
    "_checkpoint_wrapped_module.": ("activation checkpointing", "the model inside"),
    PEFT_PREFIX: ("PEFT", "model.merge_and_unload()"),
}
"""What wrappers put before the names of the weights, who does so, and what holds them without it."""

_INSIDE: Final = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Prefixes that may also be in the middle of a name, where blocks were wrapped one by one."""

_BLOCK: Final = re.compile(r"(?:^|(.*?)\.)(\d+)\.")


def brief(names: Collection[str]) -> str:
    """The first few names, for messages."""
    ordered = sorted(names)
    return ", ".join(ordered[:_NAMED]) + (", ..." if len(ordered) > _NAMED else "")


def stored_shapes(folder: Path, *, where: str, stem: str = MODEL_STEM) -> dict[str, tuple[int, ...]] | None:
    """Shape of every weight of a folder by its name, as transformers finds them; None where only loading shows it.

    Args:
        folder: A saved model or adapter.
        where: Names the setting in errors.
        stem: Name of the file without its ending; `ADAPTER_STEM` for an adapter of PEFT.

    Raises:
        UnsupportedModelError: A file is damaged, or one that the index names is not there.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors{INDEX_ENDING}"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = _shards(folder, index, where)
    else:
        pickled = folder / f"{PICKLED_WEIGHTS}{INDEX_ENDING}"
        if stem == MODEL_STEM and pickled.is_file() and not (folder / PICKLED_WEIGHTS).is_file():
            _shards(folder, pickled, where)
        return None
    stored: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        stored.update(_header(file, where))
    if stem == MODEL_STEM:
        _refuse_integers(folder, stored, where)
    shapes = {name: shape for name, (shape, _) in stored.items()}
    if single not in files:
        absent = _listed(index, where).keys() - shapes.keys()
        if absent:
            raise UnsupportedModelError(
                f"{where}: the files of '{folder}' lack {len(absent)} weights that {index.name} names "
                f"({brief(absent)}). Fetch or copy them again."
            )
    return shapes


def _refuse_integers(folder: Path, stored: Mapping[str, tuple[tuple[int, ...], str]], where: str) -> None:
    """Refuse quantized matrices that no config tells how to read: they would be taken as the numbers they are."""
    integers = [
        name for name, (shape, dtype) in stored.items()
        if name.endswith(".weight") and len(shape) > 1 and dtype.startswith(("I", "U"))
    ]  # fmt: skip
    if integers and not _is_quantized(folder):
        raise UnsupportedModelError(
            f"{where}: '{folder}' stores {len(integers)} weights as whole numbers ({brief(integers)}), and its config "
            "has no quantization_config that tells how to read them. Give the model as it was before."
        )


def _is_quantized(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("quantization_config"))


def _listed(index: Path, where: str) -> dict[str, str]:
    """File of each weight that an index names."""
    try:
        files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UnsupportedModelError(f"{where}: {index} names no files of weights. Save the model again.") from None
    return files


def _shards(folder: Path, index: Path, where: str) -> list[Path]:
    names = sorted(set(_listed(index, where).values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UnsupportedModelError(
            f"{where}: '{folder}' lacks {len(absent)} of the {len(names)} files that {index.name} names "
            f"({brief(absent)}). Fetch or copy them again."
        )
    return [folder / name for name in names]


def _header(file: Path, where: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each weight of a file."""
    try:
        with safe_open(file, framework="numpy") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        reason = "it is a pointer of Git LFS and holds no weights: run git lfs pull" if is_pointer(file) else str(error)
        raise UnsupportedModelError(f"{where}: cannot read '{file}': {reason}. Fetch or save the file again.") from None


def foreign_prefix(stored: Collection[str], lacking: Iterable[str]) -> str | None:
    """What a wrapper put before, or into, the stored names of most of the weights that are lacking.

    Args:
        stored: Names that the file has and the model does not know.
        lacking: Names that the model has and the file does not, each also without the name of the body before it.
    """
    names, lacking_names = set(stored), list(lacking)
    candidates = [prefix for prefix in _INSIDE if any(prefix in name for name in names)]
    # The last part of any missing weight shows what may be before it.
    candidates += sorted(
        {name[: -len(lacking_names[0])] for name in names if lacking_names and name.endswith(f".{lacking_names[0]}")}
    )
    for prefix in candidates:
        if 2 * len({without_prefix(name, prefix) for name in names} & set(lacking_names)) > len(names):
            return prefix
    return None


def without_prefix(name: str, prefix: str) -> str:
    """A stored name as its model knows it."""
    return name.replace(prefix, "") if prefix in _INSIDE else name.removeprefix(prefix)


def obvious_prefix(names: Collection[str], model_type: str) -> str | None:
    """What a wrapper put before or into all names, as far as names alone tell."""
    for prefix in _PREFIXES:
        if all(prefix in name if prefix in _INSIDE else name.startswith(prefix) for name in names):
            return prefix
    # Many bodies are called `model`, but none of them holds a body that is called by its architecture.
    inner = f"model.{model_type.partition('-')[0]}."
    return "model." if all(name.startswith("model.") for name in names) and _starts(names, inner) else None


def _starts(names: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def prefix_error(where: str, source: str, lacking: Collection[str], prefix: str) -> UnsupportedModelError:
    """The error of a checkpoint whose weights have a wrapper's prefix."""
    maker, inner = _PREFIXES.get(prefix, ("a wrapper", "the model inside"))
    rename = f"replace('{prefix}', '')" if prefix in _INSIDE else f"removeprefix('{prefix}')"
    return UnsupportedModelError(
        f"{where}: '{source}' lacks {len(lacking)} weights ({brief(lacking)}), and random ones would take their place: "
        f"its own are behind '{prefix}', as {maker} leaves them. Save {inner} with save_pretrained, or rename them "
        "in each file: from safetensors.torch import load_file, save_file; "
        f"save_file({{name.{rename}: value for name, value in load_file(FILE).items()}}, FILE, {{'format': 'pt'}})"
    )


def stack_of(name: str) -> tuple[str, int] | None:
    """Path of the list of blocks that a weight belongs to, and the number of its block; None outside of blocks."""
    match = _BLOCK.match(name)
    return None if match is None else (match.group(1) or "", int(match.group(2)))


def stacks(names: Iterable[str]) -> dict[str, dict[int, list[str]]]:
    """Names of weights by the path of their list of blocks and the number of their block."""
    sorted_in: defaultdict[str, defaultdict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        place = stack_of(name)
        if place is not None:
            sorted_in[place[0]][place[1]].append(name)
    return {path: dict(blocks) for path, blocks in sorted_in.items()}


def blocks_error(
    where: str,
    source: str,
    config: Mapping[str, Any],
    key: str,
    *,
    configured: int,
    stored: int,
    names: Collection[str],
) -> UnsupportedModelError:
    """The error of a config that says another number of blocks than the weights have.

    Args:
        where: Names the setting.
        source: The model as the user named it.
        config: Content of its config.
        key: Config key of the number of blocks.
        configured: That number.
        stored: Blocks that have weights.
        names: Weights that are lacking, or that nothing would read.
    """
    lists = [name for name, value in config.items() if isinstance(value, list) and len(value) == configured]
    entries = f" and give {' and '.join(lists)} {stored} entries" if lists else ""
    what = f"lacks {len(names)} weights" if configured > stored else f"has {len(names)} weights too many"
    then = "random ones would take their place" if configured > stored else "it would compute without them"
    return UnsupportedModelError(
        f"{where}: '{source}' {what} ({brief(names)}), and {then}: {key} of its config is {configured}, its weights "
        f"have {stored} blocks. Set {key}: {stored}{entries} in config.json, or give the model whose config it is."
    )


def misfit_error(
    where: str, source: str, misfits: Sequence[tuple[str, Sequence[int], Sequence[int]]]
) -> UnsupportedModelError:
    """The error of weights whose shape is not that of the config, as (name, shape in the file, shape by the config)."""
    name, stored, shape = misfits[0]
    return UnsupportedModelError(
        f"{where}: {len(misfits)} weights of '{source}' do not fit its config: {name} is {list(stored)} in the "
        f"file and {list(shape)} by the config. Correct config.json, or save the model again with it."
    )


def head_error(
    where: str, source: str, lacking: Collection[str], kind: Literal["classification", "language"]
) -> UnsupportedModelError:
    """The error of a checkpoint without the head that the task needs."""
    what_to_do = f"Give a model that was saved with its {kind} head."
    if where == "teacher.model" and kind == "classification":
        what_to_do = "Add teacher.fine_tune: {} to train one first, or give a model that was saved with its head."
    return UnsupportedModelError(
        f"{where}: '{source}' lacks {len(lacking)} weights of its head ({brief(lacking)}), and random ones would take "
        f"their place. {what_to_do}"
    )


def head_misfit_error(
    where: str, source: str, name: str, stored: tuple[int, ...], shape: tuple[int, ...]
) -> UnsupportedModelError:
    """The error of a head that has another number of outputs than the config says."""
    return UnsupportedModelError(
        f"{where}: the head of '{source}' does not fit its config: {name} is {list(stored)} in the file and "
        f"{list(shape)} by the config. Correct id2label in config.json."
    )


def adapter_error(where: str, source: str, absent: Collection[str]) -> UnsupportedModelError:
    """The error of an adapter that does not hold the head that its base lacks."""
    return UnsupportedModelError(
        f"{where}: '{source}' does not bring {len(absent)} weights of the head that teacher.model lacks "
        f"({brief(absent)}), and random ones would take their place. Train the adapter again with their modules in "
        "modules_to_save, give the model that it was trained on, or add teacher.fine_tune: {}."
    )


def adapter_unexpected_error(where: str, source: str, names: Collection[str]) -> UnsupportedModelError:
    """The error of an adapter with weights for modules that the model lacks, or without those for modules it has."""
    return UnsupportedModelError(
        f"{where}: '{source}' was trained on another model, or is not whole: {len(names)} weights do not fit "
        f"teacher.model ({brief(names)}). Give the model that adapter_config.json names."
    )


def adapter_misfit_error(
    where: str, source: str, name: str, stored: Sequence[int], shape: Sequence[int]
) -> UnsupportedModelError:
    """The error of an adapter with a weight of another shape than the model."""
    return UnsupportedModelError(
        f"{where}: '{source}' does not fit teacher.model: {name} is {list(stored)} in the adapter and {list(shape)} in "
        "the model. Give the model that adapter_config.json names; a head has one output for each label of the data "
        "(data.label_names)."
    )
