"""The basis in which the directions of a layer are cut: balanced truncation, from r x r sums of a backward pass.

A layer adds `s B A x` to its output. Write h = A x for the r numbers that A gives of a token, and g for the gradient
of the loss of one sample with respect to them. In a *balanced* basis of the r directions, the second moments of h and
of g are the same diagonal matrix S (Moore 1981, "Principal component analysis in linear systems"). A direction with a
small s_i either sees little or matters little: without it the loss rises by about n s_i^2 / 2, n tokens a sample. So
the first k directions of this basis are those that stay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

FLOOR = 1e-7
"""No eigenvalue of a Gramian is less than this part of their mean: every direction then has a place in the basis, and
one that saw nothing gets a value near zero instead of a division by it. Sums in float32 are no more precise."""


class Balance(NamedTuple):
    """The balanced basis of one layer has A' = T A and B' = B T^-1, which leave B A as it is."""

    T: Float[Tensor, "r r"]
    inverse: Float[Tensor, "r r"]
    values: Float[Tensor, " r"]
    """s_i stand in it, the largest first: the diagonal of both Gramians in this basis."""


def balance(P: Float[Tensor, "r r"], Q: Float[Tensor, "r r"]) -> Balance:
    """Find the basis in which both Gramians are the same diagonal: T P T^T = T^-T Q T^-1 = diag(s).

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
    """Find R with R R^T = G, but for eigenvalues below the floor, which are raised to it."""
    values, vectors = torch.linalg.eigh(G.double())
    floor = FLOOR * values.mean().clamp_min(1e-30)
    return vectors * values.clamp_min(floor).sqrt()


def in_basis(K: Float[Tensor, "steps r r"], basis: Balance) -> Float[Tensor, "steps r r"]:
    """Return K' = T K T^-1, the same sums along the balanced directions. Put a gate z_i = 1 on every direction: the
    diagonal is dL/dz_i, and the rest of K' the slopes of mixing one direction into another.

    Args:
        K: per batch the sum over tokens of h g^T, of the batch's mean loss; it is A (dL/dA)^T as well.
    """
    return basis.T @ K.double() @ basis.inverse
