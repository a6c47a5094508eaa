"""Statistics of a few runs: standard error, Student's interval, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean
from typing import TypeVar

from scipy import stats

Key = TypeVar("Key", bound=Hashable)


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean; None for fewer than two values, or one that is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return float(stats.sem(values))


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's 95 % interval of the mean, which is valid for few values that are about normal (the percentile
    bootstrap of three covers the mean in 75 % of cases); None where there is no standard error."""
    error = standard_error(values)
    if error is None:
        return None
    away = reach(len(values)) * error
    return fmean(values) - away, fmean(values) + away


def reach(count: int) -> float:
    """Return how many standard errors Student's 95 % interval of `count` values reaches to each side."""
    return float(stats.t.ppf(0.975, count - 1))


def differences(ours: Mapping[Key, float], theirs: Mapping[Key, float]) -> list[float]:
    """Return ours - theirs, for the seeds that both have."""
    return [value - theirs[key] for key, value in ours.items() if key in theirs]
