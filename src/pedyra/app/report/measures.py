"""What the figures show, computed from the records of a run.

Per-layer values come as mappings ``layer name -> number``. ``None`` stands for "not defined here" and becomes a
gap in the curve; it is never replaced by a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from scipy import stats

from pedyra.app.report.records import Record, RunRecords


def importance_ranks(scores: Mapping[str, float]) -> dict[str, int]:
    """Place of each layer by importance, 1 = most important (Fig. 3b); ties go by the order of the layers."""
    order = sorted(scores, key=lambda name: -scores[name])
    place = {name: index + 1 for index, name in enumerate(order)}
    return {name: place[name] for name in scores}


def mean_by_layer(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each layer's value over the records."""
    return {name: fmean(record[name] for record in records) for name in records[0]} if records else {}


def mean_places(run: RunRecords) -> dict[str, float]:
    """Layer -> its mean place by importance over the adjustments, 1 = most important."""
    return mean_by_layer([importance_ranks(record["layer_scores"]) for record in run.adjustments])


def mean_ranks(run: RunRecords) -> dict[str, float]:
    """Layer -> its mean rank over the adjustments."""
    return mean_by_layer([record["ranks"] for record in run.adjustments])


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties by mean rank (Fig. 4b); None if a side is constant or has < 3 points."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    result: Any = stats.spearmanr(x, y)  # its declared type hides the fields
    return float(result.statistic)


def correlation_with_importance(run: RunRecords, values: Mapping[str, float]) -> float | None:
    """Spearman's correlation of the layers' values with their mean importance: positive where important ones have more.

    Importance is a place, for scores of different adjustments are of different size.
    """
    places = mean_places(run)
    return spearman([-place for place in places.values()], [values[name] for name in places])


def effective_rank(record: Record) -> float | None:
    """Sum of the layers' effective ranks in a snapshot (Fig. 1a); None where it has none."""
    effective = [value for value in (record.get("effective_rank") or {}).values() if math.isfinite(value)]
    return sum(effective) if effective else None


def utilisation(record: Record) -> float | None:
    """That over the sum of the ranks (Fig. 1a); None if no rank is left."""
    effective, total = effective_rank(record), sum(record["ranks"].values())
    return effective / total if effective is not None and total else None
