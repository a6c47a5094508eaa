"""Repair in closed form: what stays of a cut adapter makes up for what went, without a step of training.

Near a trained adapter the loss rises by d^T F d / 2 where its parameters move by d: it is at a minimum, so the slope is
near zero, and F is the Fisher information. A cut moves the gates of the removed directions from 1 to 0. Where the kept
parameters are free to move too, the rise is least at the d_k that solves F_kk d_k = F_kr 1 (optimal brain surgeon;
Hassibi and Stork 1993, "Second order derivatives for network pruning").

F is never formed. A batch of N samples has the slopes k, of its mean loss, and F is the mean of N k k^T; with the rows
sqrt(N) k of all batches below each other in S, F is S^T S but for a factor. So d_k is the ridge regression of the
removed slopes on the kept ones, batch by batch: whatever the removed directions would have done to the loss of a batch,
the kept ones do. It has as many equations as there are batches, however many parameters move.

Two sets of parameters may move, and the slopes of both are sums that a calibration has anyway, since in the basis T of
a layer its K = sum over tokens of h g^T becomes K' = T K T^-1: *gates*, one number for each kept direction, with the
slopes K'_ii; and a *mixing* matrix M of a layer, whose B_k becomes B_k (I + M), with dL/dM = K'_kk^T. Neither changes a
rank, and both fold into B.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pedyra.fitting.worth import Balance

DAMPING = 0.01
"""Of the mean square of the singular values of the kept slopes. Few batches tell little about many parameters, and what
they do not tell stays where it is. On five cuts of three adapters anything from 0.003 to 0.1 was as good."""


def compensation(
    kept: Float[Tensor, "batches n"], removed: Float[Tensor, " batches"], damping: float = DAMPING
) -> Float[Tensor, " n"]:
    """By how much each kept parameter moves: the d that minimises |S_k d - removed|^2 + damping * mean(s^2) |d|^2,
    where s are the singular values of S_k.

    Args:
        kept: S_k, the slope along each parameter that may move, of each batch, times the root of the batch's samples.
        removed: the sum of the slopes along the gates of all removed directions, weighted alike.
    """
    fewer = min(kept.shape)
    if not fewer:
        return kept.new_zeros(kept.shape[1])
    ridge = damping * kept.square().sum() / fewer
    if not ridge > 0:
        return kept.new_zeros(kept.shape[1])  # nothing that stays changes the loss
    # (S^T S + c)^-1 S^T = S^T (S S^T + c)^-1, of which the smaller one is solved.
    if fewer == len(kept):
        return kept.T @ torch.linalg.solve(_ridged(kept @ kept.T, ridge), removed)
    return torch.linalg.solve(_ridged(kept.T @ kept, ridge), kept.T @ removed)


def _ridged(gram: Float[Tensor, "n n"], ridge: Tensor) -> Float[Tensor, "n n"]:
    return gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def in_basis(K: Float[Tensor, "batches r r"], basis: Balance) -> Float[Tensor, "batches r r"]:
    """K' = T K T^-1: the same sums of h g^T along the directions of a basis."""
    return basis.T @ K.to(basis.T) @ basis.inverse


def mixings(
    products: Mapping[str, Float[Tensor, "batches r r"]],
    samples: Float[Tensor, " batches"],
    bases: Mapping[str, Balance],
    ranks: Mapping[str, int],
    *,
    gates: bool = False,
    damping: float = DAMPING,
) -> dict[str, Float[Tensor, "k k"]]:
    """Layer -> M, by which its kept columns B_k become B_k (I + M) where `ranks` of each layer stay.

    All layers make up for all that is removed, so one that loses nothing has an M too.

    Args:
        products: layer -> of each batch the sum over tokens of h g^T, of the batch's mean loss.
        samples: of each batch.
        bases: layer -> the directions, of which the first `ranks[name]` stay.
        gates: M is diagonal: a direction changes in size alone.
    """
    root = samples.double().sqrt()[:, None]
    kept, removed = [], torch.zeros(len(samples), dtype=torch.float64)
    for name, basis in bases.items():
        K, rank = in_basis(products[name].double().cpu(), basis), ranks[name]
        removed += K.diagonal(dim1=1, dim2=2)[:, rank:].sum(1)
        K = K[:, :rank, :rank]
        kept.append(root * (K.diagonal(dim1=1, dim2=2) if gates else K.mT.flatten(1)))
    moves = compensation(torch.cat(kept, 1), root[:, 0] * removed, damping)
    parts = dict(zip(bases, moves.split([each.shape[1] for each in kept]), strict=True))
    return {name: part.diag() if gates else part.view(ranks[name], ranks[name]) for name, part in parts.items()}
