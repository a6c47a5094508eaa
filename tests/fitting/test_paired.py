"""The arithmetic of paired differences against scipy: bounds of a mean loss, and of the rows that are right."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from pedyra.fitting.paired import Increase, Pairs, paired, student
from pedyra.trainer.rows import _held_batch

ONE_SIDED = float(stats.norm.ppf(0.95))


def test_paired_differences_by_hand():
    """Differences 0.1 and 0.3 with weights 1 and 3: mean 0.25; sum of squares (0.15)^2 + (3 * 0.05)^2 = 0.045."""
    mean, error, batches, _ = paired([1.0, 1.0], [1.1, 1.3], [1.0, 3.0])
    assert mean == pytest.approx(0.25) and error == pytest.approx(math.sqrt(0.045 * 2) / 4) and batches == 2
    values = np.random.default_rng(0).exponential(size=50)
    found = paired([0.0] * 50, values.tolist(), [8.0] * 50)
    assert found.error == pytest.approx(stats.sem(values)) and found.skew == pytest.approx(
        stats.skew(values, bias=False)
    )


@pytest.mark.parametrize("freedom", [1, 11, 10_000])
@pytest.mark.parametrize("level", [0.05, 0.004])
def test_bounds_are_students(freedom: int, level: float):
    assert student(level, freedom + 1) == pytest.approx(stats.t.isf(level, freedom), rel=1e-8)
    found = Increase(0.1, 0.02, freedom + 1)
    assert found.interval() == pytest.approx(stats.t.interval(0.95, freedom, 0.1, 0.02), rel=1e-8)


def test_a_bound_knows_skewness():
    symmetric, skewed, mirrored = (Increase(0.0, 1.0, 30, skew) for skew in (0.0, 2.0, -2.0))
    assert skewed.upper() > symmetric.upper() and skewed.lower() > symmetric.lower()
    assert mirrored.lower() == pytest.approx(-skewed.upper()) and mirrored.upper() == pytest.approx(-skewed.lower())


@pytest.mark.parametrize("noise", [0.0, 2.0], ids=["alone", "with noise"])
@pytest.mark.parametrize("rows", [64, 128, 192, 384, 1024])
def test_a_rise_that_one_row_in_twenty_bears_is_seldom_below_its_bound(rows: int, noise: float):
    """In the batches that a fit makes of so many held-out rows, where the Trainer evaluates in its default of 8."""
    size = _held_batch(SimpleNamespace(args=SimpleNamespace(per_device_eval_batch_size=8)), rows)
    draw, batches = np.random.default_rng(rows), rows // size
    values = (draw.random((2000, batches, size)) < 0.05) * 20.0 + noise * draw.standard_normal((2000, batches, size))
    found = (paired([0.0] * batches, each.tolist(), [float(size)] * batches) for each in values.mean(2))
    assert sum(each.upper() < 0.999 for each in found) <= 0.05 * 2000 + 3 * math.sqrt(0.05 * 0.95 * 2000)


COUNTS = [(1, 0, 44), (12, 5, 100), (0, 7, 60), (40, 31, 2000), (3, 3, 9), (10, 2, 1000), (22, 2, 1000), (40, 0, 1000)]


def tango(lost: int, gained: int, rows: int, sign: int) -> float:
    """Tango's bound by its definition: the fall at which the score test is at its limit, with the share of gained rows
    at the maximum of their likelihood; the lower one has a row fewer that is lost."""

    def away(fall: float) -> float:
        def minus_likelihood(q: float) -> float:
            shares = (q + fall, q, 1 - 2 * q - fall)
            counts = (lost, gained, rows - lost - gained)
            return -sum(n * math.log(max(p, 1e-300)) for n, p in zip(counts, shares, strict=True) if n)

        ends = (max(0.0, -fall), (1 - fall) / 2)
        best: Any = optimize.minimize_scalar(minus_likelihood, bounds=ends, method="bounded", options={"xatol": 1e-12})
        q = best.x
        fewer = 1 if sign > 0 else 0
        return (lost - fewer - gained - rows * fall) / math.sqrt(rows * (2 * q + fall - fall**2)) - sign * ONE_SIDED

    low, high = sorted(((lost - gained) / rows, -sign * 0.95))
    found: Any = optimize.brentq(away, low, high)
    return found


@pytest.mark.parametrize(("lost", "gained", "rows"), COUNTS)
def test_the_bounds_of_a_fall_are_tangos(lost: int, gained: int, rows: int):
    pairs = Pairs(lost, gained, rows)
    assert pairs.mean == pytest.approx((lost - gained) / rows)
    assert (pairs.lower(), pairs.upper()) == pytest.approx(
        [tango(lost, gained, rows, sign) for sign in (1, -1)], abs=1e-4
    )


def test_the_bound_where_both_are_right_on_the_same_rows():
    right = [True, False] * 50
    pairs = Pairs.of(right, right)
    low, high = pairs.lower(), pairs.upper()
    assert high == pytest.approx(ONE_SIDED**2 / (100 + ONE_SIDED**2), rel=1e-6) and -2 / 100 - high < low < -high
    assert Pairs.of([True, True, False, True], [False, True, True, False]) == Pairs(2, 1, 4)


@pytest.mark.parametrize(("rows", "gained"), [(200, 0.03), (2000, 0.0), (2000, 0.1)])
def test_an_accuracy_at_the_margin_is_seldom_proved_no_worse(rows: int, gained: float):
    draw, margin, count = np.random.default_rng(1), 0.02, 2000
    shares = [gained + margin, gained, 1 - 2 * gained - margin]
    found = [Pairs(int(each[0]), int(each[1]), rows) for each in draw.multinomial(rows, shares, count)]
    accepted = sum(each.upper() <= margin for each in found)
    assert accepted <= 0.05 * count + 3 * math.sqrt(0.05 * 0.95 * count) + 0.01 * count  # a score test is not exact


@pytest.mark.parametrize("rows", [100, 300, 1000])
def test_an_accuracy_within_the_margin_is_seldom_called_worse(rows: int):
    """The probability is summed over all counts, at the worst of a grid of falls and of shares gained, in rows."""
    lost, gained = (each.ravel() for each in np.meshgrid(np.arange(30), np.arange(30)))
    lower = np.array([Pairs(int(a), int(b), rows).lower() for a, b in zip(lost, gained, strict=True)])
    for fall in np.array([0.0, 0.5, 1.0, 3.0, 6.0]) / rows:
        for q in np.array([0.1, 0.7, 1.5, 3.0]) / rows:
            counts = np.stack([lost, gained, rows - lost - gained], 1)
            chance = stats.multinomial.pmf(counts, rows, [q + fall, q, 1 - 2 * q - fall])
            assert chance[lower > fall].sum() <= 0.05
