"""The functional geometry of a hidden state: the Fisher form G, its leading directions and its root."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from flexkd.errors import ShapeError


def class_geometry(
    logits: Float[Tensor, "positions classes"], jacobian: Float[Tensor, "positions classes hidden"]
) -> Float64[Tensor, "hidden hidden"]:
    """Sum over positions of `sum_v p_v grad(log p_v) grad(log p_v)^T`, from d logits / d h.

    `KL(p(h) || p(h + e))` is `e^T G e / 2` to second order, G the mean of this over positions.
    """
    p = logits.double().softmax(-1)
    centred = jacobian.double() - torch.einsum("nc,nch->nh", p, jacobian.double())[:, None]
    return torch.einsum("nc,nch,nci->hi", p, centred, centred).cpu()


class LanguageModelGeometry:
    """The same sum for a linear head, without a backward: `W^T diag(sum_t p_t a_t^2) W - sum_t m_t m_t^T`.

    `m_t = W^T (p_t a_t)`. Predictions are added a few at a time, in float64; the product of two matrices of the
    vocabulary's length is taken once, at the end.

    Args:
        weight: The head's.
    """

    def __init__(self, weight: Float[Tensor, "vocab hidden"]) -> None:
        vocab, hidden = weight.shape
        self._weight = weight.detach().double()
        self._curvature = self._weight.new_zeros(vocab)
        self._means = self._weight.new_zeros(hidden, hidden)

    def add(
        self, logits: Float[Tensor, "positions vocab"], slope: Float[Tensor, "positions vocab"] | None = None
    ) -> None:
        """Add predictions.

        Args:
            logits: The model's, after scale and soft-cap.
            slope: `a_v = d z_v / d (w_v . h)`; None where it is 1.
        """
        p = logits.double().softmax(-1)
        scaled = p if slope is None else p * slope.double()
        self._curvature += (scaled if slope is None else scaled * slope.double()).sum(0)
        means = scaled @ self._weight
        self._means += means.T @ means

    def total(self) -> Float64[Tensor, "hidden hidden"]:
        """The sum over all predictions so far."""
        return ((self._weight.T * self._curvature) @ self._weight - self._means).cpu()


def tangent_basis(geometry: Float64[Tensor, "hidden hidden"], k: int) -> Float[Tensor, "hidden k"]:
    """The k leading directions of G as columns, float32.

    Raises:
        ShapeError: k is below 1 or above the width.
    """
    hidden = geometry.shape[0]
    if not 1 <= k <= hidden:
        raise ShapeError(f"tangent basis: cannot take {k} of {hidden} directions. Ask for 1 to {hidden}.")
    return leading_directions(geometry, k).float()


def leading_directions(form: Float64[Tensor, "hidden hidden"], k: int) -> Float64[Tensor, "hidden k"]:
    """The k leading eigenvectors of a symmetric form as columns; the largest entry of each is positive."""
    vectors = torch.linalg.eigh(form).eigenvectors.flip(-1)[:, :k]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    basis: Tensor = vectors * largest.sign()
    return basis


def lowest_directions(
    form: Float64[Tensor, "hidden hidden"],
) -> tuple[Float[Tensor, "hidden rank"], Float64[Tensor, " rank"]]:
    """The eigenvectors of a form as columns, the smallest eigenvalue first, and the share of the trace that they hold.

    Those whose eigenvalue is rounding are left out: the form does not reach them.
    """
    values = torch.linalg.eigvalsh(form).flip(0)
    rank = int((values > values[0] * len(values) * torch.finfo(torch.float64).eps).sum())
    basis = leading_directions(form, max(rank, 1)).flip(1)
    shares = values[: max(rank, 1)].flip(0).clamp(min=0)
    return basis.float(), shares.cumsum(0) / shares.sum()


def direction_scores(
    directions: Float64[Tensor, "hidden k"],
    variances: Float64[Tensor, " k"],
    geometry: Float64[Tensor, "hidden hidden"],
) -> Float64[Tensor, " k"]:
    """`var_i d_i^T G d_i` of each direction: twice the nats that predictions lose without it, to second order.

    Without direction i a state h becomes `h - z_i d_i`, z_i its coordinate, so that `KL ~ z_i^2 d_i^T G d_i / 2`.

    Args:
        directions: As columns, orthonormal.
        variances: Mean of `z_i^2`; a factor that all share changes no choice.
        geometry: G of the states that the directions are of.
    """
    scores: Tensor = variances * (directions * (geometry @ directions)).sum(0).clamp(min=0)
    return scores


def matrix_square_root(geometry: Float64[Tensor, "hidden hidden"]) -> Float[Tensor, "hidden hidden"]:
    """The symmetric root `G^(1/2)`, float32; eigenvalues below zero are rounding and count as zero."""
    values, vectors = torch.linalg.eigh(geometry)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root.float()


def geometry_coverage(geometry: Float64[Tensor, "hidden hidden"]) -> Float64[Tensor, " hidden"]:
    """Share of the trace of G that the 1, 2, ... leading directions hold."""
    values = torch.linalg.eigvalsh(geometry).flip(0).clamp(min=0)
    shares: Tensor = values.cumsum(0) / values.sum()
    return shares
