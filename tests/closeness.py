"""Compare tensors within the tolerance of their dtype: the one table of tolerances."""

from typing import Final, NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """How far two numbers may lie apart: |actual - expected| <= absolute + relative * |expected|."""

    relative: float
    absolute: float


# A test that needs more says at its place what was measured; none goes above 5e-2.
TOLERANCES: Final = {
    # Only the order of sums differs between two derivations: some hundred units in the last place.
    torch.float64: Tolerance(1e-10, 1e-10),
    # Sums of up to some thousand terms, kernels that add in another order than the slow derivation.
    torch.float32: Tolerance(1e-5, 1e-6),
    # 8 bits of mantissa: one rounding is 4e-3, a few of them meet in every result.
    torch.bfloat16: Tolerance(2e-2, 2e-2),
    # 11 bits of mantissa: one rounding is 5e-4, again a few of them, and small values are subnormal.
    torch.float16: Tolerance(5e-3, 5e-3),
}


def assert_close(actual: object, expected: object, *, dtype: torch.dtype | None = None) -> None:
    """Fails, saying where and by how much, unless both agree in shape and within the tolerance.

    Args:
        actual: A tensor, an array, a number or a list of numbers; integers and booleans have to be equal.
        expected: The same, of any dtype: a float64 derivation may stand against a float32 result.
        dtype: The precision the computation had, where that is coarser than what its result is stored in. Left out:
            the coarser one of the two tensors given.
    """
    actual_tensor, expected_tensor = _as_tensor(actual), _as_tensor(expected)
    named = [value.dtype for value in (actual, expected) if isinstance(value, Tensor)]
    floating = [one for one in named if one.is_floating_point]
    if dtype is None and named and not floating:
        relative, absolute = 0.0, 0.0
    else:
        candidates = [dtype] if dtype is not None else floating or [torch.float64]
        relative, absolute = max((TOLERANCES[one] for one in candidates), key=lambda one: one.relative)
    torch.testing.assert_close(
        actual_tensor, expected_tensor, rtol=relative, atol=absolute, equal_nan=False, check_dtype=False
    )


def _as_tensor(value: object) -> Tensor:
    """Plain numbers become float64, so that the tolerance is not eaten by a rounding to float32."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return torch.as_tensor(value, dtype=torch.float64)
