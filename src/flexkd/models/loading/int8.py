"""Copies of a model whose linear layers compute in int8 on a CPU: made, saved in one file, and loaded again."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import PreTrainedModel

from flexkd.files import writing
from flexkd.models.forward.kinds import no_linear_error

_MARK: Final = "_flexkd_int8"
_FILE: Final = "int8_model.bin"


def int8_copy(model: PreTrainedModel, *, where: str) -> PreTrainedModel:
    """A copy with int8 weights in all linear layers below the head, whose inputs are rounded to int8 as they come.

    Dynamic quantization by torch: nothing is calibrated and nothing is trained. Weights have a scale for each output,
    inputs one for the whole batch. Embeddings, norms, attention and the head of a language model stay float32.

    Torch calls these kernels deprecated in favour of torchao. On a CPU they are the fast ones: without torch.compile,
    those of torchao were slower than the float32 model (docs/log.md).

    Args:
        model: Stays as it is.
        where: The recipe key, for messages.

    Raises:
        UnsupportedModelError: The model has no linear layer, as GPT-2, whose matrices are of a kind of their own.
    """
    quantized = copy.deepcopy(model)
    nn.Module.to(quantized, "cpu").float().eval()
    head = quantized.get_output_embeddings()
    names = [name for name, module in quantized.named_modules() if type(module) is nn.Linear and module is not head]
    if not names:
        raise no_linear_error(where, type(model).__name__)
    with _without_warnings():
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        quantize_dynamic(quantized, dict.fromkeys(names, per_channel_dynamic_qconfig), inplace=True)
    setattr(quantized, _MARK, True)
    return quantized


def computes_in_int8(model: nn.Module) -> bool:
    """Whether `int8_copy` made the model; it runs without autocast, as its kernels read float32."""
    return hasattr(model, _MARK)


def save_int8(model: PreTrainedModel, folder: Path) -> None:
    """Write a model of `int8_copy`, which transformers cannot save, as one pickled file beside its config."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    with _without_warnings(), writing(folder):
        torch.save(model, folder / _FILE)


def int8_loader(folder: Path) -> Callable[[], PreTrainedModel] | None:
    """A function that loads what `save_int8` wrote; None where the folder holds no such file.

    Only for files of this process or its parent: unpickling runs code.
    """
    file = folder / _FILE
    if not file.is_file():
        return None

    def load() -> PreTrainedModel:
        with _without_warnings():
            model: PreTrainedModel = torch.load(file, weights_only=False)
        return model

    return load


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Torch warns at each step that its kernels are deprecated, which the docstring of `int8_copy` says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
