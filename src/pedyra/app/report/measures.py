"""What the figures show, computed: plain numbers in, plain numbers out.

Per-layer values come as mappings ``layer name -> number``. ``None`` stands for "not defined here" and becomes a
gap in the curve; it is never replaced by a number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats


def importance_ranks(scores: Mapping[str, float]) -> dict[str, int]:
    """Place of each layer by importance, 1 = most important (Fig. 3b); ties go by the order of the layers."""
    order = sorted(scores, key=lambda name: -scores[name])
    place = {name: index + 1 for index, name in enumerate(order)}
    return {name: place[name] for name in scores}


def mean_by_layer(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each layer's value over the records."""
    return {name: float(np.mean([record[name] for record in records])) for name in records[0]} if records else {}


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties by mean rank (Fig. 4b); None if a side is constant or has < 3 points."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    result: Any = stats.spearmanr(x, y)  # its declared type hides the fields
    return float(result.statistic)


def utilisation(effective_rank: Mapping[str, float], ranks: Mapping[str, int]) -> float | None:
    """Sum of the layers' effective ranks over the sum of their ranks (Fig. 1a); None if no rank is left."""
    total = sum(ranks[name] for name in effective_rank)
    return sum(effective_rank.values()) / total if total else None


def quartiles(values: Iterable[float | None]) -> tuple[float | None, float | None, float | None]:
    """First quartile, median and third quartile of the finite values; all None if there is none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return None, None, None
    low, middle, high = np.percentile(finite, [25, 50, 75])
    return float(low), float(middle), float(high)


def pruned_counts(adjustment: Mapping[str, Any]) -> dict[str, int]:
    """Number of triples each layer lost in one adjustment."""
    return dict(Counter(layer for layer, *_ in adjustment["pruned"]))


def smoothed(values: Sequence[float], beta: float = 0.9) -> list[float]:
    """Exponential moving average with its start-up bias removed, so that the first value is the first input."""
    result, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = beta * average + (1 - beta) * value
        result.append(average / (1 - beta**count))
    return result


def thinned(length: int, limit: int = 600) -> list[int]:
    """Indices of at most `limit` evenly spread points of a curve, always with the first and the last."""
    if length <= limit:
        return list(range(length))
    return sorted({round(index * (length - 1) / (limit - 1)) for index in range(limit)})
