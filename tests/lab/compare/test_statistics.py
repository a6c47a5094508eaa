"""Statistics of a comparison against arithmetic done by hand."""

from __future__ import annotations

import math

import pytest

from pedyra.lab.compare.statistics import (
    bootstrap_interval,
    compare_paired,
    mean,
    paired_differences,
    rank_best,
    sign_test,
    standard_error,
)


def test_mean_and_standard_error():
    assert mean([1.0, 2.0, 6.0]) == 3.0
    # Squared deviations 4 + 1 + 9 = 14; / 2 = 7; / 3; root.
    assert standard_error([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(7 / 3))
    assert standard_error([1.0]) is None


def test_only_shared_seeds_are_paired():
    assert paired_differences({0: 5.0, 1: 7.0, 3: 1.0}, {1: 4.0, 0: 5.5, 2: 0.0}) == [-0.5, 3.0]


def interval(differences: list[float]) -> tuple[float, float]:
    found = bootstrap_interval(differences)
    assert found is not None
    return found


def test_the_interval_of_two_pairs_is_the_range_stretched_to_students_width():
    # Means of the four resamples of (0, 2): 0, 1, 1, 2. t_{1, 0.975} = 12.7062, z = 1.95996, sqrt(2 / 1).
    stretch = math.sqrt(2) * 12.7062 / 1.95996
    low, high = interval([0.0, 2.0])
    assert (low, high) == (pytest.approx(1 - stretch, rel=1e-4), pytest.approx(1 + stretch, rel=1e-4))


def test_three_pairs_of_one_sign_do_not_make_a_difference_if_they_vary():
    # The plain percentile interval would be [0.1, 0.5].
    low, high = interval([0.1, 0.3, 0.5])
    assert low < 0 < high


def test_the_interval_keeps_the_skew_of_the_differences():
    low, high = interval([0.0, 0.0, 0.0, 4.0])
    # 256 resamples; k fours with chance C(4, k) 3^(4 - k) / 256: P(0) = 0.316, P(4) = 0.004, P(>= 3) = 0.051.
    stretch = math.sqrt(4 / 3) * 3.18245 / 1.95996
    assert low == pytest.approx(1 + stretch * (0 - 1), rel=1e-4)
    assert high == pytest.approx(1 + stretch * (3 - 1), rel=1e-4)


def test_many_pairs_give_the_normal_interval():
    values = [(-1.0) ** i for i in range(400)]
    low, high = interval(values)
    assert high == pytest.approx(1.96 / 20, rel=0.05) and low == pytest.approx(-1.96 / 20, rel=0.05)
    assert bootstrap_interval(values) == (low, high)  # the same draws every time


def test_equal_differences_have_no_width_and_one_pair_has_no_interval():
    assert bootstrap_interval([0.25, 0.25, 0.25]) == (0.25, 0.25)
    assert bootstrap_interval([3.0]) is None


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1, 2, 3], (3, 0, 0, 0.25)),  # 2 * 1/8
        ([1, 2, -3, 4, 5], (4, 1, 0, 0.375)),  # 2 * (1 + 5) / 32
        ([1, -1], (1, 1, 0, 1.0)),  # 2 * 3/4, capped
        ([0, 0, 5], (1, 0, 2, 1.0)),
        ([0, 0], (0, 0, 2, 1.0)),
        ([1, math.nan, 0, -1], (1, 1, 1, 1.0)),  # a run that diverged is no tie
        ([1] * 6, (6, 0, 0, 2 / 64)),
    ],
)
def test_the_sign_test_is_exact(differences, expected):
    found = sign_test(differences)
    assert (found.wins, found.losses, found.ties, found.p) == expected


def test_a_method_is_better_only_with_an_interval_above_zero():
    steady = compare_paired({0: 2.0, 1: 3.0, 2: 4.0}, {0: 1.0, 1: 2.0, 2: 2.99})
    assert steady is not None and steady.better and steady.mean == pytest.approx(1.0033, rel=1e-3)
    once = compare_paired({0: 2.0}, {0: 1.0})
    assert once is not None and once.interval is None and not once.better
    worse = compare_paired({0: 1.0, 1: 2.0, 2: 2.99}, {0: 2.0, 1: 3.0, 2: 4.0})
    assert worse is not None and worse.interval is not None and worse.interval[1] < 0 and not worse.better
    assert compare_paired({0: 1.0}, {1: 1.0}) is None


def test_the_best_is_alone_only_if_every_interval_says_so():
    a = {0: 0.90, 1: 0.80, 2: 0.70}
    just_below = {seed: value - 0.01 for seed, value in a.items()}
    far_but_wild = {0: 0.80, 1: 0.75, 2: 0.10}
    alone = rank_best({"b": just_below, "a": a})
    assert alone is not None and (alone.best, alone.tied) == ("a", ())
    wild = rank_best({"b": just_below, "a": a, "c": far_but_wild})
    assert wild is not None and (wild.best, wild.tied) == ("a", ("c",))
    same = rank_best({"a": a, "twin": dict(a), "none": {}})
    assert same is not None and (same.best, same.tied) == ("a", ("twin",))
    assert rank_best({"a": {}}) is None


def test_a_higher_mean_of_easier_seeds_is_not_best_alone():
    lost_where_both_ran = {0: 0.50, 1: 0.51, 2: 0.49, 3: 0.90, 4: 0.91}
    ranking = rank_best({"a": lost_where_both_ran, "b": {0: 0.60, 1: 0.62, 2: 0.59}})
    assert ranking is not None and (ranking.best, ranking.tied) == ("a", ("b",))


def test_a_run_that_diverged_is_neither_best_nor_tied():
    a, b = {0: 0.9, 1: 0.8, 2: 0.7}, {0: 0.5, 1: 0.4, 2: 0.3}
    for lost in (math.nan, -math.inf):
        ranking = rank_best({"lost": {0: 1.0, 1: lost, 2: 1.0}, "a": a, "b": b})
        assert ranking is not None and (ranking.best, ranking.tied) == ("a", ())
    difference = compare_paired({0: math.inf, 1: 1.0}, {0: 1.0, 1: 1.0})
    assert difference is not None and difference.interval is None and not difference.better
