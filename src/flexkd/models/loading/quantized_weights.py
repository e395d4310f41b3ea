"""Settings with which bitsandbytes loads a teacher in 8 or 4 bits."""

import logging
from typing import Final, Literal

import torch
from transformers import BitsAndBytesConfig

from flexkd.errors import RecipeError, unknown_name
from flexkd.packages import require_package

Quantization = Literal["8bit", "4bit"]

QUANTIZATIONS: Final = ("8bit", "4bit")


def quantization_settings(quantization: str, *, where: str = "teacher.quantization") -> BitsAndBytesConfig:
    """What `from_pretrained` takes as `quantization_config`; the head and all that is no matrix stay as they are.

    `4bit` is NF4 with block scales in 8 bits, computed in bfloat16; `8bit` keeps outlying columns in float16.

    Raises:
        RecipeError: There is no such quantization.
        MissingDependencyError: bitsandbytes is not installed.

    Source:
        Dettmers et al., LLM.int8(), 2022, arXiv:2208.07339, sec. 3; QLoRA, 2023, arXiv:2305.14314, sec. 3.
    """
    if quantization not in QUANTIZATIONS:
        raise RecipeError(unknown_name(where, "quantization", quantization, QUANTIZATIONS))
    require_package("bitsandbytes", where, f"'{quantization}'")
    if quantization == "8bit":
        # It says at every call that it computes in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
