"""Which number type a model computes in."""

from pathlib import Path

import pytest
import torch

from flexkd.models.forward import autocast
from flexkd.models.forward.autocast import autocast_dtype, resolve_precision, scoring_dtype


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu sse avx512_bf16", "bfloat16"), ("fpu amx_bf16", "bfloat16"), ("fpu avx2", "float32")],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, expected: str
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n", encoding="utf-8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(autocast, "Path", lambda _: tmp_path / "cpuinfo")
    assert resolve_precision("auto") == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_on_a_card_without_bfloat16_is_float32(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # PyTorch says yes to a card that only emulates it, slowly.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert resolve_precision("auto") == expected


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("float32", None), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_a_given_precision_is_taken_and_scores_are_never_made_in_float16(
    precision: str, expected: torch.dtype | None
) -> None:
    assert resolve_precision(precision) == precision
    assert autocast_dtype(precision) == expected
    assert scoring_dtype(precision) == (None if precision == "float16" else expected)
