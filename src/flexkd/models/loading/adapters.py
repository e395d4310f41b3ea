"""Adapters of PEFT: LoRA students that end as plain models, and teachers that are a base model and an adapter."""

import logging
import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from flexkd.errors import RecipeError, UnsupportedModelError
from flexkd.models.forward.hidden import is_encoder_decoder, is_generative
from flexkd.models.forward.quiet import first_line
from flexkd.models.loading.module_names import check_module_names, is_named
from flexkd.models.loading.pretrained import model_location
from flexkd.models.loading.stored_weights import (
    PEFT_PREFIX,
    adapter_error,
    adapter_misfit_error,
    adapter_unexpected_error,
)
from flexkd.packages import require_package

logger = logging.getLogger(__name__)

ALL_LINEAR: Final = "all-linear"

_ADAPTER: Final = "default"
_UP: Final = ".lora_B."


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank updates of a student's matrices: `W + (alpha / rank) * B A`, B starting at zero.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: Strength of the update.
        dropout: Of what A reads, while training.
        target_modules: Names of the linear layers that get one, as q_proj; or all of them but the head.
        modules_to_save: Names of modules that are trained whole beside them. A classifier's head always is.

    Source:
        Hu et al., LoRA, 2021, arXiv:2106.09685, sec. 4.1; all linear layers: Dettmers et al., QLoRA, 2023,
        arXiv:2305.14314, sec. 4.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] = ()


def add_lora(
    student: PreTrainedModel, settings: LoraSettings, *, new_tokens: Collection[int] = (), seed: int = 0
) -> Any:
    """The student with LoRA: a `peft.PeftModel` around it, which is changed in place; only the updates are trained.

    Args:
        student: A plain model.
        settings: Which matrices get an update, and how large.
        new_tokens: Ids that the student did not know when it was trained, as after resizing its embeddings; a warning
            where their embeddings stay frozen.
        seed: Of the updates; the caller's random numbers stay.

    Raises:
        MissingDependencyError: PEFT is not installed.
        RecipeError: No layer has such a name, or one of two tied weights would be trained without the other.
    """
    peft = _peft("student.lora")
    _check_names(student, settings)
    _check_ties(student, settings)
    embeddings = _name_of(student, student.get_input_embeddings())
    if new_tokens and not is_named(embeddings, settings.modules_to_save):
        logger.warning(
            "student.lora: %d tokens are new to the student (%s), and LoRA leaves their embeddings as they are. "
            "Add '%s' to student.lora.modules_to_save.",
            len(new_tokens),
            ", ".join(map(str, sorted(new_tokens)[:5])),
            embeddings.rpartition(".")[2],
        )
    head = () if is_generative(student) else tuple(_head_names(student))
    configured = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(settings) or ALL_LINEAR,
        modules_to_save=sorted({*settings.modules_to_save, *head}) or None,
        # A regular expression: as a list, it would leave the layers inside a head of several.
        exclude_modules=rf"({'|'.join(map(re.escape, head))})(\..*)?" if head else None,
        task_type=_task_type(student),
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", FutureWarning)  # of what PEFT still asks transformers for
        torch.manual_seed(seed)
        return peft.get_peft_model(student, configured, adapter_name=_ADAPTER)


def merge_lora(model: nn.Module) -> PreTrainedModel:
    """The plain model that computes what a `PeftModel` did, with the updates added to its weights; in eval mode.

    The wrapper must not be used afterwards. Nothing of PEFT is left in the model or in what it saves.

    Raises:
        UnsupportedModelError: No LoRA model, or the weights below it are quantised and would round the updates away.
    """
    base = unwrapped(model)
    if model is base:
        raise UnsupportedModelError(f"merge_lora: {type(model).__name__} has no adapter. Give what add_lora returned.")
    if getattr(base, "is_quantized", False):
        raise UnsupportedModelError(
            "merge_lora: the model is quantised, and its weights would round the updates away. Load it in float32 or "
            "bfloat16, and add the adapter to that."
        )
    merge: Any = model
    plain: PreTrainedModel = merge.merge_and_unload(safe_merge=True)
    vars(plain).pop("peft_config", None)  # earlier versions of PEFT leave it
    plain.disable_input_require_grads()
    plain.requires_grad_(True)
    plain.eval()
    return plain


def load_adapter(
    model: PreTrainedModel, source: str, *, brings: Collection[str] = (), where: str = "teacher.adapter"
) -> PreTrainedModel:
    """A model with an adapter that was trained on it, merged into its weights in memory; in eval mode.

    Over quantised weights the adapter runs beside them instead.

    Args:
        model: The base model, which is changed in place.
        source: Hub id, folder or `package:NAME/FOLDER` of the adapter.
        brings: Names of weights that the model lacks, so that the adapter has to hold them.
        where: Names the setting in errors.

    Raises:
        MissingDependencyError: PEFT is not installed.
        UnsupportedModelError: The adapter is not there, belongs to another model, lacks the head that it should bring,
            or adds tokens instead of weights.
    """
    peft = _peft(where)
    location = model_location(source, where=where)
    try:
        kind = peft.PeftConfig.from_pretrained(location)
    except Exception as error:  # what the loaders raise on a damaged file is no fixed set
        raise _adapter_failure(where, source, error) from error
    if kind.is_prompt_learning:
        raise UnsupportedModelError(
            f"{where}: '{source}' is of kind {kind.peft_type.value}, which adds positions and no weights. Give a LoRA "
            "adapter, or a merged model."
        )
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # mismatches are checked below
            wrapped = peft.PeftModel.from_pretrained(model, location)
            loaded = wrapped.load_adapter(location, _ADAPTER)
    except Exception as error:  # as above
        raise _adapter_failure(where, source, error) from error
    reported = {*loaded.missing_keys, *loaded.unexpected_keys}
    unexpected = {name.removeprefix(PEFT_PREFIX).replace(f".{_ADAPTER}.", ".") for name in reported}
    if unexpected:
        raise adapter_unexpected_error(where, source, unexpected)
    whole = _whole_modules(wrapped)
    absent = [name for name in brings if not any(name.startswith(f"{module}.") for module in whole)]
    if absent:
        raise adapter_error(where, source, absent)
    if getattr(model, "is_quantized", False):
        wrapped.requires_grad_(False)
        wrapped.eval()
        return unwrapped(wrapped)
    return merge_lora(wrapped)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, its adapters active; a transformers model is returned as it is.

    Hooks, families and signatures are read on this one; a wrapper's forward takes anything.

    Raises:
        UnsupportedModelError: Neither of the two, or an adapter that adds positions to every row.
    """
    if isinstance(model, PreTrainedModel):
        return model
    peft = _peft("model")
    wrapper: Any = model
    is_adapted = isinstance(model, peft.PeftModel) and not wrapper.active_peft_config.is_prompt_learning
    base = wrapper.get_base_model() if is_adapted else None
    if not isinstance(base, PreTrainedModel):
        raise UnsupportedModelError(
            f"model: {type(model).__name__} is neither a model of transformers nor one with an adapter of PEFT that "
            "changes weights. Give one of these."
        )
    return base


def without_gradient(model: nn.Module) -> list[str]:
    """Names of the LoRA updates that a backward did not reach, or reached with zeros alone.

    B starts at zero, so that A has a gradient only later: after the first backward only B shows it.
    """
    return [
        name
        for name, parameter in model.named_parameters()
        if _UP in name and parameter.requires_grad and (parameter.grad is None or not bool(parameter.grad.any()))
    ]


def _whole_modules(wrapped: Any) -> list[str]:
    """Paths, from the base model, of the modules that an adapter holds whole."""
    from peft.utils import ModulesToSaveWrapper

    base = wrapped.get_base_model()
    return [name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]


def _peft(where: str) -> Any:
    require_package("peft", where, "an adapter")
    import peft

    return peft


_MISFIT: Final = re.compile(
    r"size mismatch for (?:base_model\.model\.)?(\S+): .* shape torch\.Size\(\[([\d, ]*)\]\)"
    r" .* torch\.Size\(\[([\d, ]*)\]\)"
)
"""What torch says of a weight of another shape: its name, its shape in the file, its shape in the model."""


def _adapter_failure(where: str, source: str, error: Exception) -> UnsupportedModelError:
    misfit = _MISFIT.search(str(error))
    if misfit is not None:
        name = re.sub(rf"\.(modules_to_save\.)?{_ADAPTER}\b", "", misfit.group(1))
        stored, shape = ([int(size) for size in group.split(",")] for group in misfit.group(2, 3))
        return adapter_misfit_error(where, source, name, stored, shape)
    return UnsupportedModelError(
        f"{where}: cannot load the adapter '{source}': {first_line(error)}. Give its hub id, or the folder that holds "
        "adapter_config.json."
    )


def _task_type(student: PreTrainedModel) -> str:
    if not is_generative(student):
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if is_encoder_decoder(student) else "CAUSAL_LM"


def _head_names(student: PreTrainedModel) -> Iterator[str]:
    """Modules with weights outside the body: where a classifier makes its classes."""
    for name, module in student.named_children():
        if name != student.base_model_prefix and next(module.parameters(), None) is not None:
            yield name


def _targets(settings: LoraSettings) -> list[str]:
    """Names of the layers that get an update; none where all linear ones do."""
    return [] if settings.target_modules == ALL_LINEAR else list(settings.target_modules)


def _name_of(student: PreTrainedModel, target: nn.Module) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in student.named_modules()}
    return names[target]


def _check_names(student: PreTrainedModel, settings: LoraSettings) -> None:
    modules = [name for name, _ in student.named_modules() if name]
    requested = {"modules_to_save": settings.modules_to_save, "target_modules": _targets(settings)}
    weighted = [module for module in modules if "weight" in _parameter_names(student, module)]
    check_module_names(requested, modules, weighted=weighted, class_name=type(student).__name__)


def _parameter_names(student: PreTrainedModel, module: str) -> set[str]:
    return {name for name, _ in student.get_submodule(module).named_parameters(recurse=False)}


def _check_ties(student: PreTrainedModel, settings: LoraSettings) -> None:
    """A copy of one of two tied weights would be trained alone, and the tie lost in what is saved."""
    embeddings, head = student.get_input_embeddings(), student.get_output_embeddings()
    if head is None or embeddings.weight is not head.weight:
        return
    for module in (embeddings, head):
        name = _name_of(student, module)
        if is_named(name, (*settings.modules_to_save, *_targets(settings))):
            raise RecipeError(
                f"student.lora: '{name}' shares its weight between the embeddings and the head, and a copy of one "
                "would be trained without the other. Leave it out of student.lora, or untie the student first "
                "(tie_word_embeddings: false)."
            )
