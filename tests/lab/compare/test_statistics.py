"""Statistics of a comparison against arithmetic done by hand, and tables of Student's t."""

from __future__ import annotations

import math

import pytest

from pedyra.lab.compare.statistics import differences, interval, standard_error


def test_the_standard_error_by_hand():
    # Squared deviations 4 + 1 + 9 = 14; / 2 = 7; / 3; root.
    assert standard_error([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(7 / 3))
    assert standard_error([1.0]) is None
    assert standard_error([1.0, math.inf]) is None and standard_error([1.0, math.nan]) is None


@pytest.mark.parametrize(
    ("values", "t"),
    [([0.0, 2.0], 12.7062), ([0.1, 0.3, 0.5], 4.30265), ([0.0, 0.0, 0.0, 4.0], 3.18245)],
)
def test_the_interval_is_students(values, t):
    mean = sum(values) / len(values)
    deviations = sum((value - mean) ** 2 for value in values)
    reach = t * math.sqrt(deviations / (len(values) - 1) / len(values))
    assert interval(values) == (pytest.approx(mean - reach, rel=1e-4), pytest.approx(mean + reach, rel=1e-4))


def test_equal_values_have_no_width_and_one_has_no_interval():
    assert interval([0.25, 0.25, 0.25]) == (0.25, 0.25)
    assert interval([3.0]) is None


def test_only_shared_seeds_are_paired():
    assert differences({0: 5.0, 1: 7.0, 3: 1.0}, {1: 4.0, 0: 5.5, 2: 0.0}) == [-0.5, 3.0]
    assert differences({0: 1.0}, {1: 1.0}) == []


def test_a_run_that_diverged_leaves_no_interval():
    for lost in (math.nan, math.inf):
        result = differences({0: lost, 1: 1.0}, {0: 1.0, 1: 1.0})
        assert len(result) == 2 and interval(result) is None
