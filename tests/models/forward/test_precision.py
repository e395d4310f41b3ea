"""Models that overflow in float16 are refused before they give NaN."""

import re

import pytest
import torch
from transformers import AutoConfig

from flexkd.errors import UnsupportedModelError
from flexkd.models.forward.precision import check_half_precision
from tests.tiny import tiny_batch, tiny_model


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
def test_A11_t5_in_float16_is_refused(model_type: str) -> None:
    config = AutoConfig.for_model(model_type).to_dict()
    message = f"teacher.precision: a {model_type} model overflows in float16. Use bfloat16 or float32."
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        check_half_precision(config, "float16", "teacher.precision")
    for precision in ("float32", "bfloat16", "auto"):
        check_half_precision(config, precision, "teacher.precision")


@pytest.mark.parametrize("model_type", ["bart", "llama", "bert"])
def test_A11_other_models_run_in_float16(model_type: str) -> None:
    check_half_precision(AutoConfig.for_model(model_type).to_dict(), "float16", "teacher.precision")


def test_A11_the_reason_is_real() -> None:
    """A feed-forward layer whose states pass 65504 is finite in bfloat16 and NaN or clamped in float16."""
    teacher = tiny_model("t5", "seq2seq")
    assert teacher.config.feed_forward_proj == "relu"
    for name, parameter in teacher.named_parameters():
        if name.endswith("DenseReluDense.wi.weight"):
            parameter.data *= 7e4
    batch = tiny_batch(teacher)
    with torch.no_grad():
        exact = teacher(**batch).logits
        wide = teacher.to(torch.bfloat16)(**batch).logits.float()
        narrow = teacher.to(torch.float16)(**batch).logits.float()
    assert wide.isfinite().all()
    assert (wide - exact).abs().mean() < 0.1 * exact.abs().mean()
    assert not narrow.isfinite().all() or (narrow - exact).abs().mean() > 0.1 * exact.abs().mean()
