"""Where answers of a model end, read of the model itself or of the checkpoint that it will be loaded from."""

import contextlib
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.answer_ends import AnswerEnds, CheckpointEnds, answer_ends, checkpoint_ends
from flexkd.models.forward.embeddings import num_embedded_tokens
from flexkd.models.forward.quiet import quiet
from flexkd.models.loading.pretrained import load_config, model_location


def model_ends(model: PreTrainedModel, *, where: str = "model") -> CheckpointEnds:
    """The ends that a model names.

    Raises:
        UnsupportedModelError: An end is no number.
    """
    return _ends(getattr(model, "generation_config", None), model.config, where)


def source_ends(source: str, *, where: str) -> CheckpointEnds:
    """The ends that a checkpoint names, before its weights are loaded.

    Raises:
        UnsupportedModelError: Nothing there that can be read, or an end is no number.
    """
    config = load_config(source, where=where)
    generation_config = None
    with contextlib.suppress(OSError), quiet():  # most checkpoints of old have none
        generation_config = GenerationConfig.from_pretrained(model_location(source, where=where))
    return _ends(generation_config, config, where)


def ends_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_token: str, *, where: str = "model"
) -> AnswerEnds:
    """All tokens that end an answer of a model.

    Args:
        model: A language model.
        tokenizer: Its own.
        stop_token: As in `answer_ends`.
        where: Names the model in notes and errors.

    Raises:
        UnsupportedModelError: As `model_ends`.
        VocabularyError: As `answer_ends`.
    """
    embedded = num_embedded_tokens(model)
    assert embedded is not None, "a language model embeds tokens"
    return answer_ends(stop_token, tokenizer, model_ends(model, where=where), num_tokens=embedded, where=where)


def _ends(generation_config: GenerationConfig | None, config: PreTrainedConfig, where: str) -> CheckpointEnds:
    said: dict[str, Any] = {}
    if generation_config is not None:
        said = {
            "eos_token_id": generation_config.eos_token_id,
            "stop_strings": generation_config.stop_strings,
            "_from_model_config": getattr(generation_config, "_from_model_config", False),
        }
    # What stands in the diff is the checkpoint's; what stands only in the whole is the default of the class.
    text_config = config.get_text_config(decoder=True)
    default = getattr(text_config, "eos_token_id", None)
    return checkpoint_ends(said, config.to_diff_dict(), default=default, where=where)
