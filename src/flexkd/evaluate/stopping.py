"""The tokens that end answers of a model, read from the model itself or from its checkpoint before it is loaded."""

import contextlib
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.answer_ends import AnswerEnds, CheckpointEnds, answer_ends, checkpoint_ends
from flexkd.models.forward.embeddings import num_embedded_tokens
from flexkd.models.forward.quiet import quiet
from flexkd.models.loading.pretrained import load_config, model_location


def model_ends(model: PreTrainedModel, *, where: str = "model") -> CheckpointEnds:
    """The end tokens that the configs of a model name.

    Raises:
        UnsupportedModelError: The id of an end token is not a number.
    """
    return _ends(getattr(model, "generation_config", None), model.config, where)


def source_ends(source: str, *, where: str) -> CheckpointEnds:
    """The end tokens that the configs of a checkpoint name, before its weights are loaded.

    Raises:
        UnsupportedModelError: The config cannot be read, or the id of an end token is not a number.
    """
    config = load_config(source, where=where)
    generation_config = None
    with contextlib.suppress(OSError), quiet():  # most old checkpoints have none
        generation_config = GenerationConfig.from_pretrained(model_location(source, where=where))
    return _ends(generation_config, config, where)


def ends_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_token: str, *, where: str = "model"
) -> AnswerEnds:
    """All tokens that end an answer of a language model.

    Args:
        model: A language model.
        tokenizer: The model's own.
        stop_token: As in `answer_ends`.
        where: Name of the model in notes and errors.

    Raises:
        UnsupportedModelError: As in `model_ends`.
        VocabularyError: As in `answer_ends`.
    """
    embedded = num_embedded_tokens(model)
    assert embedded is not None, "a language model embeds tokens"
    return answer_ends(stop_token, tokenizer, model_ends(model, where=where), num_tokens=embedded, where=where)


def _ends(generation_config: GenerationConfig | None, config: PreTrainedConfig, where: str) -> CheckpointEnds:
    settings: dict[str, Any] = {}
    if generation_config is not None:
        settings = {
            "eos_token_id": generation_config.eos_token_id,
            "stop_strings": generation_config.stop_strings,
            "_from_model_config": getattr(generation_config, "_from_model_config", False),
        }
    # An entry of the diff was set by the checkpoint; one of the whole config alone is the default of its class.
    text_config = config.get_text_config(decoder=True)
    default = getattr(text_config, "eos_token_id", None)
    return checkpoint_ends(settings, config.to_diff_dict(), default=default, where=where)
