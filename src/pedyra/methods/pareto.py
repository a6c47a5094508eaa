"""Theorem 3.1 and its diagnostic: Eq. (8) and Fig. 5."""

from __future__ import annotations

import math
from collections.abc import Mapping


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
