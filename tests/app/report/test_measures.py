"""Every number of the report against arithmetic done by hand."""

from __future__ import annotations

import math

import pytest

from pedyra.app.report.measures import (
    importance_ranks,
    mean_by_layer,
    spearman,
    utilisation,
)


def test_importance_ranks_begin_at_one_and_break_ties_by_layer_order():
    assert importance_ranks({"a": 0.2, "b": 0.9, "c": 0.2, "d": 0.5}) == {"a": 3, "b": 1, "c": 4, "d": 2}


def test_mean_by_layer():
    assert mean_by_layer([{"a": 1, "b": 4}, {"a": 3, "b": 4}]) == {"a": 2.0, "b": 4.0}
    assert mean_by_layer([]) == {}


def test_spearman_is_one_minus_six_sum_d_squared_over_n_cubed_minus_n():
    # Places 1 2 3 4 5 against 2 1 4 3 5: d^2 sums to 4, 1 - 6 * 4 / 120 = 0.8.
    assert spearman([10, 20, 30, 40, 50], [0.2, 0.1, 0.4, 0.3, 0.5]) == pytest.approx(0.8)


def test_spearman_gives_ties_their_mean_place():
    # Places 1, 2.5, 2.5, 4 against 1 2 3 4: Pearson of those is 4.5 / sqrt(4.5 * 5).
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize(("x", "y"), [([8, 8, 8], [1, 2, 3]), ([1, 2, 3], [0, 0, 0]), ([1, 2], [2, 1])])
def test_spearman_is_undefined_for_a_constant_or_two_points(x, y):
    assert spearman(x, y) is None


def test_utilisation_is_effective_rank_over_rank():
    assert utilisation({"effective_rank": {"a": 3.0, "b": 1.5}, "ranks": {"a": 4, "b": 2}}) == pytest.approx(0.75)
    assert utilisation({"effective_rank": {"a": 0.0}, "ranks": {"a": 0}}) is None
    assert utilisation({"effective_rank": {"a": math.nan}, "ranks": {"a": 2}}) is None
    assert utilisation({"ranks": {"a": 4}}) is None
