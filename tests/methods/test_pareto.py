"""Eq. (8) and the diagnostic of Fig. 5, by hand."""

from __future__ import annotations

import math

import pytest

from pedyra.methods.paper import two_thirds_log_variance, two_thirds_ranks


def test_eq8_by_hand():
    # G^(2/3) = 1, 4, 9: the ranks share 28 in that proportion.
    assert two_thirds_ranks({"a": 1.0, "b": 8.0, "c": 27.0}, 28) == pytest.approx({"a": 2.0, "b": 8.0, "c": 18.0})


def test_eq8_solves_the_budgeted_minimum():
    # Theorem 3.1: among ranks of equal sum, these minimise sum of G / sqrt(r); moving any rank makes it worse.
    scores = {"a": 0.3, "b": 2.0, "c": 5.0}
    best = two_thirds_ranks(scores, 24)
    loss = lambda ranks: sum(scores[name] / math.sqrt(ranks[name]) for name in scores)  # noqa: E731
    for giver in scores:
        for taker in scores:
            if giver != taker:
                moved = {**best, giver: best[giver] - 0.1, taker: best[taker] + 0.1}
                assert loss(moved) > loss(best)


def test_eq8_without_any_importance_is_uniform():
    assert two_thirds_ranks({"a": 0.0, "b": 0.0}, 6) == {"a": 3.0, "b": 3.0}


def test_fig5_by_hand_and_lower_nearer_to_eq8():
    scores = {"a": 1.0, "b": 8.0}
    assert two_thirds_log_variance(scores, {"a": 1, "b": 1}) == pytest.approx(math.log(4.5))  # 1 and 4 around 2.5
    assert two_thirds_log_variance(scores, {"a": 1, "b": 2}) == pytest.approx(math.log(0.5))


def test_fig5_is_undefined_at_the_optimum_and_for_one_layer():
    assert two_thirds_log_variance({"a": 2.0, "b": 2.0}, {"a": 3, "b": 3}) is None
    assert two_thirds_log_variance({"a": 1.0, "b": 8.0}, {"a": 1, "b": 0}) is None
