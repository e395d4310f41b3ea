"""Seeded random inputs."""

import torch
from torch import Tensor


def normal(*shape: int, seed: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent normal numbers, drawn in float64 and then rounded, so that every dtype sees the same ones."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (mean + scale * drawn).to(dtype)


def classes(*shape: int, num_classes: int, seed: int) -> Tensor:
    """Independent labels, each class as likely."""
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


def permutation(size: int, *, seed: int) -> Tensor:
    """A random order of `size` things."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def rotation(size: int, *, seed: int) -> Tensor:
    """A random orthogonal matrix, float64."""
    return torch.linalg.qr(normal(size, size, seed=seed, dtype=torch.float64)).Q
