"""What a few paired runs can tell: mean, standard error, a bootstrap interval, an exact sign test. Pure functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student

Key = TypeVar("Key", bound=Hashable)

EXHAUSTIVE = 50_000
"""Up to this many resamples all are taken (6 pairs: 46,656), so that the interval has no chance in it."""


@dataclass(frozen=True)
class SignTest:
    """Two-sided exact sign test: pairs above zero, below, equal (left out), and the p-value; diverged ones are none."""

    wins: int
    losses: int
    ties: int
    p: float


@dataclass(frozen=True)
class PairedDifference:
    """How much better one method is than another, over the seeds that both have."""

    pairs: int
    mean: float
    interval: tuple[float, float] | None
    """95 % by default; None for fewer than two pairs."""
    sign: SignTest

    @property
    def better(self) -> bool:
        """Whether the interval supports that the one method is better than the other."""
        return self.interval is not None and self.interval[0] > 0


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard deviation (n - 1) over sqrt(n); None for a single value."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def paired_differences(ours: Mapping[Key, float], theirs: Mapping[Key, float]) -> list[float]:
    """ours - theirs at every key that both have, in the order of `ours`."""
    return [value - theirs[key] for key, value in ours.items() if key in theirs]


def bootstrap_interval(
    differences: Sequence[float], level: float = 0.95, resamples: int = 20_000, seed: int = 0
) -> tuple[float, float] | None:
    """Bootstrap interval of the mean, calibrated for few pairs; None for fewer than two.

    The percentiles of the resampled means are stretched about the mean by sqrt(n / (n - 1)) * t_{n-1} / z. The plain
    percentile interval (Efron 1979) has neither factor and is far too narrow for the usual 3 to 10 seeds: with 3 it
    ends at the lowest and highest difference, which hold the centre in 75 % of cases, not 95. Stretched, it has
    Student's width where the differences are normal, keeps their skew, and is the plain one for many pairs.

    All n^n resamples are taken if they are at most `EXHAUSTIVE`, else `resamples` of them, drawn with `seed`.
    """
    n = len(differences)
    if n < 2:
        return None
    values = np.asarray(differences, dtype=np.float64)
    if n**n <= EXHAUSTIVE:
        means = np.array([values[list(chosen)].mean() for chosen in itertools.product(range(n), repeat=n)])
    else:
        means = values[np.random.default_rng(seed).integers(0, n, (resamples, n))].mean(axis=1)
    tail = (1 - level) / 2
    # Whole resamples, not points between them: with few pairs there are few.
    low = np.quantile(means, tail, method="inverted_cdf")
    high = -np.quantile(-means, tail, method="inverted_cdf")
    centre = values.mean()
    stretch = math.sqrt(n / (n - 1)) * student.ppf(1 - tail, n - 1) / student.ppf(1 - tail, math.inf)
    return float(centre + stretch * (low - centre)), float(centre + stretch * (high - centre))


def sign_test(differences: Sequence[float]) -> SignTest:
    """Exact two-sided sign test of "as often above zero as below"; zeros are counted as ties and left out."""
    wins, losses = (sum(sign * value > 0 for value in differences) for sign in (1, -1))
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return SignTest(wins, losses, sum(value == 0 for value in differences), p)


def compare_paired(ours: Mapping[Key, float], theirs: Mapping[Key, float]) -> PairedDifference | None:
    """The paired difference ours - theirs; None if no key is shared. A run that diverged leaves no interval."""
    differences = paired_differences(ours, theirs)
    if not differences:
        return None
    return PairedDifference(
        pairs=len(differences),
        mean=mean(differences),
        interval=bootstrap_interval(differences) if all(map(math.isfinite, differences)) else None,
        sign=sign_test(differences),
    )


@dataclass(frozen=True)
class Ranking:
    """Who is best, and who cannot be told from the best."""

    best: str
    tied: tuple[str, ...]
    """The others whose paired interval to the best includes zero, or that have too few pairs for one."""


def rank_best(values: Mapping[str, Mapping[Key, float]]) -> Ranking | None:
    """The method with the highest mean (the first of equal ones) over its seeds; None if there is none.

    A method of which a run diverged, so that it has no finite mean, takes no part.

    It is the best alone if, and only if, its paired interval to every other lies above zero: the runner-up, and also
    one whose mean is lower but varies more.
    """
    present = {name: by_key for name, by_key in values.items() if by_key and math.isfinite(mean(list(by_key.values())))}
    if not present:
        return None
    best = max(present, key=lambda name: mean(list(present[name].values())))
    tied = []
    for name, by_key in present.items():
        difference = compare_paired(present[best], by_key)
        # Where seeds are missing, the higher mean may be of easier ones, and lose wherever both have a run.
        if name != best and not (difference is not None and difference.better):
            tied.append(name)
    return Ranking(best, tuple(tied))
