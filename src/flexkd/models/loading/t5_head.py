"""Output heads of T5 models: configs that describe them wrongly, made to read the same in transformers 4 and 5."""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexkd.facts.families.table import TRAITS

Model = TypeVar("Model", bound=PreTrainedModel)

_SCALE: Final = "scale_decoder_outputs"


def has_own_head(model: PreTrainedModel) -> bool:
    """Whether the output embeddings are other numbers than the input embeddings."""
    head, embeddings = _output_embeddings(model), model.get_input_embeddings()
    if head is None or head.weight is embeddings.weight:
        return False
    head_weight, embedding_weight = head.get_parameter("weight"), embeddings.get_parameter("weight")
    return head_weight.shape != embedding_weight.shape or not torch.equal(head_weight, embedding_weight)


def _output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()
    return head


def build_model(make: Callable[[Any], Model], config: PreTrainedConfig, *, own_head: bool = False) -> Model:
    """A new model of a config, its embeddings shared as the config means it.

    With `tie_word_embeddings: false` a T5 of transformers 5 would have three tables of embeddings, and the head.

    Args:
        make: Class or function that makes the model.
        config: Becomes the model's own.
        own_head: A T5 has its own head, whatever its config says.
    """
    is_own = _ties_head_alone(config) and (own_head or not config.tie_word_embeddings)
    if is_own:
        config.tie_word_embeddings = True
    model = make(config)
    if is_own:
        head = _output_embeddings(model)
        assert head is not None, config.model_type
        head.register_parameter("weight", nn.Parameter(head.get_parameter("weight").detach().clone()))
        _untie(model)
    return model


def _ties_head_alone(config: PreTrainedConfig) -> bool:
    return config.model_type in TRAITS and TRAITS[config.model_type].ties_head_alone


def _untie(model: PreTrainedModel) -> None:
    """The head is known as its own, to saving and to `tie_weights`, which would overwrite it."""
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys.pop("lm_head.weight", None)


@torch.no_grad()
def normalize_head(model: PreTrainedModel) -> None:
    """Make the config of a T5 say whether it has its own head, in a way that every version of transformers reads.

    Transformers 4 takes `tie_word_embeddings` for both: a tied head is scaled by `d_model ** -0.5`, its own head is
    not. Transformers 5 writes true for each T5, and whether it scales under a name that transformers 4 does not know:
    a T5 v1.1 or Flan-T5 that it has saved gives other logits there, without a warning. From false both read an own
    head without a scale. Where head and scale do not go together in this way, the scale moves into the weights.

    Other models stay as they are, and so do the logits of these.
    """
    config: Any = model.config
    head = _output_embeddings(model)
    if not _ties_head_alone(config) or head is None:
        return
    is_own, width = has_own_head(model), config.d_model
    # Transformers 5 knows no scale of an mT5.
    if getattr(config, _SCALE, not is_own) == is_own:
        if is_own:
            head.get_parameter("weight").mul_(width**-0.5)
        else:
            model.get_parameter("decoder.final_layer_norm.weight").mul_(width**0.5)
        config.scale_decoder_outputs = not is_own
    if is_own:
        _untie(model)
    else:
        config.tie_word_embeddings = True
