"""Saving models: whether transformers will write them, checked before training, and in which number type."""

import copy
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from flexkd.errors import DiskError, UnsupportedModelError
from flexkd.files import writing
from flexkd.models.forward.quiet import quiet

logger = logging.getLogger(__name__)

_SAMPLING: Final = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
_BEAMS: Final = ("early_stopping", "length_penalty")
_LONGEST: Final = 400
_CACHE: Final = ("cache_implementation", "cache_config")


def make_savable(model: PreTrainedModel, *, where: str, weights: bool = True) -> list[str]:
    """Check, before training, that transformers will save a model, without writing its weights.

    A `generation_config` is refused at saving when it was changed and holds a setting that counts for nothing, as a
    temperature without sampling. Such settings are taken out, which changes no answer, and named.

    Args:
        model: Of transformers; its generation_config may be replaced.
        where: Names the model in errors and notes.
        weights: Also check that the weights can be written; not for those that are spread over processes.

    Returns:
        What was taken out, as it was logged.

    Raises:
        UnsupportedModelError: The config, the generation_config or the weights cannot be saved; says why.
    """
    notes = []
    with tempfile.TemporaryDirectory(prefix="flexkd-save-") as folder, quiet():
        _write_or_refuse(
            where, "its config", "Change model.config", lambda: copy.deepcopy(model.config).save_pretrained(folder)
        )
        if model.can_generate():
            if model.generation_config is None:
                raise UnsupportedModelError(
                    f"{where}: its generation_config is None, and transformers will not save it. Give it one: "
                    "GenerationConfig.from_model_config(model.config)."
                )
            notes = _repair_generation_config(model, folder, where)
            write = model.generation_config.save_pretrained
            _write_or_refuse(where, "its generation_config", "Change model.generation_config", lambda: write(folder))
    if weights and not getattr(model, "is_quantized", False):
        unsaved = model._keys_to_ignore_on_save or ()
        state = {name: value for name, value in model.state_dict().items() if name not in unsaved}
        advice = "Give each module weights of its own"
        _write_or_refuse(where, "its weights", advice, lambda: remove_tied_weights_from_state_dict(state, model))
    for note in notes:
        logger.warning("%s", note)
    return notes


def save_model(model: PreTrainedModel, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """`save_pretrained`, with the weights and the config's `dtype` in a number type.

    Args:
        model: Has its own number type again afterwards; its weights are then those that were saved.
        folder: May be new.
        dtype: None: the model's own.
    """
    before = {name: value.dtype for name, value in _weights(model)}
    try:
        cast_weights(model, dtype)
        with quiet(), writing(folder):
            model.save_pretrained(folder)
    finally:
        for name, value in _weights(model):
            value.data = value.data.to(before[name])
        model.config.dtype = model.dtype


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round a model's weights to the values that they have once saved in a number type, and keep its own type."""
    for _, value in _weights(model):
        value.data = value.data.to(dtype).to(value.dtype)


def cast_weights(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Cast what is saved of a model, and nothing else: tables that its code computes keep their precision."""
    if dtype is not None:
        for _, value in _weights(model):
            value.data = value.data.to(dtype)


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict().keys()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name in saved and value.is_floating_point():
            yield name, value


def _write_or_refuse(where: str, what: str, advice: str, write: Any) -> None:
    """One error for whatever transformers raises when it will not write."""
    try:
        with writing(Path(tempfile.gettempdir())):
            write()
    except DiskError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).removesuffix("Fix these issues to save the configuration.").rstrip(". ")
        reason = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]} ..."
        raise UnsupportedModelError(
            f"{where}: transformers will not save {what}: {reason}. {advice} before training."
        ) from error


def _repair_generation_config(model: PreTrainedModel, folder: str, where: str) -> list[str]:
    """Remove settings without effect where transformers would refuse them; returns a note that names them."""
    config = model.generation_config
    try:
        copy.deepcopy(config).save_pretrained(folder)
    except Exception:
        changed = copy.deepcopy(config)
    else:
        return []
    unused = {key: getattr(config, key, None) for key in _unused_settings(config)}
    dropped = {key: value for key, value in unused.items() if value not in (None, False)}
    for key in dropped:
        setattr(changed, key, None)
    try:
        copy.deepcopy(changed).save_pretrained(folder)
    except Exception:
        # The caller asks again, and reports what is wrong with the config as it was.
        return []
    model.generation_config = changed
    named = ", ".join(f"{key} {value}" for key, value in dropped.items())
    return [
        f"{where}: its generation_config holds settings that count for nothing ({named}), with which transformers "
        "would not save it: they are taken out. Set do_sample, num_beams or return_dict_in_generate to keep them."
    ]


def _unused_settings(config: GenerationConfig) -> Iterator[str]:
    """Settings that `generate` does not read, given the others."""
    if config.do_sample is not True:
        yield from _SAMPLING
    if config.num_beams in (None, 1):
        yield from _BEAMS
    if config.use_cache is False:
        yield from _CACHE
    if config.return_dict_in_generate is not True:
        yield from config.extra_output_flags
    if isinstance(config.pad_token_id, int) and config.pad_token_id < 0:
        yield "pad_token_id"
