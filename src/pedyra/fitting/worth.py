"""What the directions of a LoRA are worth: balanced truncation, from r x r sums that a backward pass has anyway.

A layer adds `s B A x` to its output. Write h = A x for the r numbers that A gives of a token, and g for the gradient
of the loss of one sample with respect to them. In a *balanced* basis of the r directions, the second moments of h and
of g are the same diagonal matrix S (Moore 1981, "Principal component analysis in linear systems"). A direction with a
small s_i either sees little or matters little: without it the loss rises by about n s_i^2 / 2, n tokens a sample.

By how much the loss rises without a *set* of directions is measured, not assumed: put a gate z = 1 on every direction.
The slope of the loss along each gate is known in every batch, and the loss without the set follows to second order,
with the empirical Fisher information as curvature. Directions that work together are so counted together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

FLOOR = 1e-7
"""Least eigenvalue of a Gramian, as a part of their mean: every direction then has a place in the basis, and one that
saw nothing gets a value near zero instead of a division by it. Sums in float32 are no more precise."""


class Balance(NamedTuple):
    """The balanced basis of one layer: A' = T A and B' = B T^-1 leave B A as it is."""

    T: Float[Tensor, "r r"]
    inverse: Float[Tensor, "r r"]
    values: Float[Tensor, " r"]
    """s_i, the largest first: the diagonal of both Gramians in this basis."""


def balance(P: Float[Tensor, "r r"], Q: Float[Tensor, "r r"]) -> Balance:
    """The basis in which both Gramians are the same diagonal: T P T^T = T^-T Q T^-1 = diag(s).

    With P = L L^T and Q = M M^T, and the singular values M^T L = U S V^T: T = S^-1/2 U^T M^T, T^-1 = L V S^-1/2. In
    double precision, since Gramians square the condition of what they are made of.

    Args:
        P: E[h h^T], over tokens.
        Q: E[g g^T], over the same tokens.
    """
    L, M = _root(P), _root(Q)
    U, S, Vh = torch.linalg.svd(M.T @ L)
    scale = S.clamp_min(torch.finfo(S.dtype).tiny).rsqrt()
    return Balance(scale[:, None] * (U.T @ M.T), (L @ Vh.T) * scale, S)


def _root(G: Float[Tensor, "r r"]) -> Float[Tensor, "r r"]:
    """R with R R^T = G, but for eigenvalues below the floor, which are raised to it."""
    values, vectors = torch.linalg.eigh(G.double())
    floor = FLOOR * values.mean().clamp_min(1e-30)
    return vectors * values.clamp_min(floor).sqrt()


def in_basis(K: Float[Tensor, "steps r r"], basis: Balance) -> Float[Tensor, "steps r r"]:
    """K' = T K T^-1, the same sums along the balanced directions. Its diagonal is dL/dz_i of every direction's gate.

    Args:
        K: per batch the sum over tokens of h g^T, of the batch's mean loss; it is A (dL/dA)^T as well.
    """
    return basis.T @ K.double() @ basis.inverse


def removal_increases(values: Float[Tensor, " r"], tokens_per_sample: float) -> Float[Tensor, " r"]:
    """n s_i^2 / 2: by how much the loss of a sample rises, about, without each direction alone."""
    return tokens_per_sample * values.square() / 2


def predicted_increases(
    slopes: Float[Tensor, "steps sets"], samples: Float[Tensor, " steps"]
) -> Float[Tensor, " sets"]:
    """By how much the loss rises without each set of directions, to second order at z = 1: N/2 Var(c) - mean(c);
    negative where the set does harm, NaN for less than two batches.

    c is the sum of a set's slopes in one batch. A batch of N samples shows the variance of a sample's slope divided
    by N, and that variance is the empirical Fisher information: the curvature along the set's common gate.

    Args:
        slopes: c of every batch.
        samples: N of every batch.
    """
    mean = (samples[:, None] * slopes).sum(0) / samples.sum()
    variance = (samples[:, None] * (slopes - mean).square()).sum(0) / (len(samples) - 1)  # of one sample
    return variance / 2 - mean
