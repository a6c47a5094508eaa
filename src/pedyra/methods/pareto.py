"""Theorem 3.1 and its diagnostics: Eq. (8), Fig. 5 and the effective rank of Fig. 1a."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


def two_thirds_ranks(layer_scores: Mapping[str, float], total_rank: int) -> dict[str, float]:
    """The real-valued ranks r_l proportional to G_l^(2/3) of Eq. (8) that sum to `total_rank`; equal if all G are 0."""
    weights = {name: score ** (2 / 3) for name, score in layer_scores.items()}
    total = sum(weights.values())
    if total == 0:
        return {name: total_rank / len(weights) for name in weights}
    return {name: total_rank * weight / total for name, weight in weights.items()}


def two_thirds_log_variance(layer_scores: Mapping[str, float], ranks: Mapping[str, int]) -> float | None:
    """Fig. 5: the logarithm of the variance of G_l^(2/3) / r_l over the layers; lower is nearer to Eq. (8).

    Layers of rank 0 are left out. None where it is undefined: fewer than two layers, or no variance at all.
    """
    ratios = [score ** (2 / 3) / ranks[name] for name, score in layer_scores.items() if ranks[name] > 0]
    if len(ratios) < 2:
        return None
    mean = sum(ratios) / len(ratios)
    variance = sum((ratio - mean) ** 2 for ratio in ratios) / (len(ratios) - 1)
    return math.log(variance) if variance > 0 else None


def singular_values(A: Float[Tensor, "r in"], E: Float[Tensor, " r"], B: Float[Tensor, "out r"]) -> Float[Tensor, " n"]:
    """Those of B diag(E) A, n = min(in, out, r), from r x r matrices: QR of both factors, never the dense product.

    NaN where a factor is not finite.
    """
    if len(E) == 0:
        return E.float()
    upper_A = torch.linalg.qr(A.float().mT, mode="r").R  # (min(in, r), r)
    upper_B = torch.linalg.qr(B.float(), mode="r").R  # (min(out, r), r)
    product = (upper_B * E.float()) @ upper_A.mT
    if not product.isfinite().all():  # svdvals would raise, and end a run that only has to be reported
        return product.new_full((min(product.shape),), torch.nan)
    return torch.linalg.svdvals(product)


def effective_rank(values: Float[Tensor, " n"]) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007); 0 for a zero matrix.

    The paper plots an "effective rank" (Fig. 1a) without defining it; this is the field's usual definition.
    """
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
