"""How a model computes: what its answers depend on apart from weights and rows, and how far two machines may differ."""

import math
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch
import transformers
from transformers import PreTrainedModel

_ROUNDINGS: Final = 8
"""Roundings of one block in a row: norm, projection, scores, softmax, values, output, both feed-forward layers."""

_WIDENING: Final = 4
"""Width of a feed-forward layer, the longest sum of a block, as a multiple of the stream's."""


def engine_of(model: PreTrainedModel, precision: torch.dtype | None) -> dict[str, str]:
    """How a model computes its answers: part of the fingerprint of everything stored of them (caches, scores, texts).

    Args:
        model: On the device where it answers.
        precision: Autocast to this type while it runs; None: as the weights are.
    """
    quantization = _quantization(model)
    parts = {
        "precision": _precision(precision),
        "weights": ", ".join(sorted({_short(value.dtype) for value in model.parameters()})),
        "attention": _attention(model),
        "quantization": quantization,
        "device": _device(model.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if quantization == "none":
        return parts
    return {**parts, "bitsandbytes": _version("bitsandbytes")}


def rounding_noise(model: PreTrainedModel, precision: torch.dtype | None) -> float:
    """How far the states of one model may lie apart on two machines of the same precision, relative to their size.

    Every operation rounds by up to u, half the distance of two numbers. L blocks of 8 roundings, one behind the other,
    add up like a random walk to u sqrt(8 (L + 1)), and two machines walk apart: sqrt(2) times that, 4 u sqrt(L + 1).
    Products in half precision are summed in float32. Those in float32 are summed in float32 too: a sum of n terms
    rounds n times, which is sqrt(n) more, n the width of a feed-forward layer. Two attention back ends in bfloat16 lie
    a quarter of that apart, at 6 layers (BERT) as at 30 (Llama).
    """
    exact = torch.finfo(torch.float32).eps
    types = [value.dtype for value in model.parameters() if value.dtype.is_floating_point]
    coarsest = max(torch.finfo(dtype).eps for dtype in (precision or torch.float32, *types))
    if _quantization(model) != "none":
        # Its products are made of bfloat16 or of integers of 8 bits.
        coarsest = max(coarsest, torch.finfo(torch.bfloat16).eps)
    width = next(model.get_input_embeddings().parameters()).shape[-1]
    terms = _WIDENING * width if coarsest == exact else 1
    if coarsest == exact and _precision(precision) != "float32":
        # Inputs of a product have the 10 bits of TF32, of which float16 has as many.
        coarsest, terms = torch.finfo(torch.float16).eps, 1
    return math.sqrt(2 * _ROUNDINGS * (_num_layers(model) + 1) * terms) * coarsest / 2


def _precision(precision: torch.dtype | None) -> str:
    if precision is not None:
        return _short(precision)
    products = torch.get_float32_matmul_precision()
    return "float32" if products == "highest" else f"float32, products {products}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention(model: PreTrainedModel) -> str:
    """Attention implementations of a model and of the parts that have a config of their own."""
    config: Any = model.config
    configs = [config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", {}))]
    kinds = {str(kind) for part in configs if (kind := getattr(part, "_attn_implementation", None)) is not None}
    return ", ".join(sorted(kinds)) or "none"


def _quantization(model: PreTrainedModel) -> str:
    settings: Any = getattr(model.config, "quantization_config", None)
    if settings is None:
        return "none"
    plain = settings if isinstance(settings, dict) else settings.to_dict()
    if plain.get("load_in_4bit"):
        return f"4bit {plain.get('bnb_4bit_quant_type', '')}".strip()
    return "8bit" if plain.get("load_in_8bit") else str(plain.get("quant_method", "unknown"))


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _num_layers(model: PreTrainedModel) -> int:
    config: Any = model.config.get_text_config()
    decoder_keys = ("decoder_layers", "num_decoder_layers") if config.is_encoder_decoder else ()
    depths = [getattr(config, key, None) for key in ("num_hidden_layers", *decoder_keys)]
    return sum(int(depth) for depth in depths if depth is not None) or 1
