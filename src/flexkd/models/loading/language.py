"""Language models, decoder-only or encoder-decoder, from a hub id, a folder, a package, a GGUF file or a config."""

import copy
from typing import Any, Final

import torch
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from flexkd.models.forward.kinds import encoder_error
from flexkd.models.forward.quiet import quiet
from flexkd.models.loading.loaded_weights import check_loaded
from flexkd.models.loading.places import refuse_adapter
from flexkd.models.loading.pretrained import NO_CODE, fresh_model, load_config, load_failure, model_location
from flexkd.models.loading.quantized_weights import Quantization, quantization_settings
from flexkd.models.loading.t5_head import normalize_head

_START: Final = "decoder_start_token_id"
_SPECIAL_TOKENS: Final = ("bos_token_id", "eos_token_id", "pad_token_id", _START)


def load_language_model(
    source: str,
    *,
    dtype: torch.dtype | None = torch.float32,
    quantization: Quantization | None = None,
    where: str = "model",
) -> PreTrainedModel:
    """A language model in eval mode; its config decides between decoder-only and encoder-decoder.

    Args:
        source: Hub id, folder, GGUF file, or `package:NAME/FOLDER`.
        dtype: Float32 by default: an optimizer's small steps round away in half precision. None: the checkpoint's.
        quantization: Matrices below the head in so many bits, for a teacher that would not fit otherwise.
        where: Names the setting in errors.

    Raises:
        MissingDependencyError: A package that the source or the quantization needs is not installed.
        UnsupportedModelError: The model is not there, is damaged, generates no text, or its checkpoint lacks weights.
    """
    packed = None if quantization is None else quantization_settings(quantization, where=where)
    location = model_location(source, where=where)
    refuse_adapter(where, location)
    config = load_config(source, where=where)
    builder = language_builder(where, source, config)
    try:
        with quiet():
            model, info = builder.from_pretrained(
                location,
                dtype="auto" if dtype is None else dtype,
                quantization_config=packed,
                output_loading_info=True,
                trust_remote_code=NO_CODE,
                ignore_mismatched_sizes=True,  # judged below, with names and both shapes
            )
    except Exception as error:  # what the loaders raise on a damaged file is no fixed set
        raise load_failure(where, location, error) from error
    check_loaded(model, info, source=source, where=where)
    _set_start_token(model)
    return _ready(model)


def fresh_language_model(source: str, changes: dict[str, int], *, seed: int = 0) -> PreTrainedModel:
    """A language model with random weights from a config, its sizes changed as asked.

    Raises:
        UnsupportedModelError: The config cannot be read, does not take the sizes, or is of no language model.
    """
    config = load_config(source, where="student.model")
    builder = language_builder("student.model", source, config)
    return _ready(fresh_model(builder, source, config, changes=changes, seed=seed))


def take_special_tokens(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """A student with random weights begins, ends and pads as its teacher does.

    The ids in its own config belong to the vocabulary of the model that the config was made for.
    """
    # The text part of an encoder-decoder's config renames what begins with decoder_.
    configs = (teacher.config, teacher.config.get_text_config(decoder=True))
    for key in _SPECIAL_TOKENS:
        token = next((value for config in configs if (value := getattr(config, key, None)) is not None), None)
        # Some configs lack what others name as None.
        if token is not None or hasattr(student.config, key):
            setattr(student.config, key, token)
    student.generation_config = copy.deepcopy(teacher.generation_config)


def language_builder(where: str, source: str, config: PreTrainedConfig) -> Any:
    """The Auto class that makes a language model of a config.

    Raises:
        UnsupportedModelError: It is the config of an encoder.
    """
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    # Encoders such as BERT have a causal class too; with is_decoder off each token sees the ones that it predicts.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise encoder_error(where, source, config.model_type)
    return AutoModelForCausalLM


def _set_start_token(model: PreTrainedModel) -> None:
    """Give the config, which training reads, the decoder's start token where only generation_config names one."""
    if model.config.is_encoder_decoder and getattr(model.config, _START, None) is None:
        setattr(model.config, _START, model.generation_config.decoder_start_token_id)


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    normalize_head(model)
    model.eval()
    return model
