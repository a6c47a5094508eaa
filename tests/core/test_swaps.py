"""Plans that know what a new triple would gain, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pedyra.core.swaps import Gain, choose_trials, plan_along_gradient, plan_swaps

SCORES = {"wide": [5.0, 1.0], "slim": [0.5, 0.4, 9.0]}
COSTS = {"wide": 10, "slim": 5}
FREE = {"wide": 9, "slim": 9}


def sure(*values: float) -> list[Gain]:
    return [Gain(value, 0.0) for value in values]


def swaps(candidates: dict[str, list[Gain]], trials: dict[str, dict[int, Gain]], **changes: Any):
    settings: dict[str, Any] = dict(max_ranks=FREE, costs=COSTS, spare=0, certainty=2.0, margin=0.5)
    return plan_swaps(SCORES, candidates, trials, **{**settings, **changes})


def test_gain_bounds_by_hand():
    gain = Gain(3.0, 1.0)
    assert (gain.at_least(2.0), gain.at_most(1.0)) == (1.0, 4.0)
    assert (gain.at_least(4.0), Gain(-3.0, 1.0).at_most(1.0)) == (0.0, 1.0)


def test_a_candidate_must_exceed_the_margin_of_what_it_replaces():
    trials = {"slim": {0: Gain(2.0, 0.0)}}
    assert swaps({"slim": sure(1.01)}, trials).pruned == {"slim": (0,)}
    assert swaps({"slim": sure(1.01)}, trials).added == {"slim": 1}
    stay = swaps({"slim": sure(0.99)}, trials)
    assert (stay.pruned, stay.added, stay.ranks) == ({}, {}, {"wide": 2, "slim": 3})


def test_a_gain_within_its_noise_moves_nothing_even_against_a_worthless_triple():
    trials = {"slim": {0: Gain(-1.0, 0.0)}}
    assert swaps({"slim": [Gain(1.9, 1.0)]}, trials).added == {}
    assert swaps({"slim": [Gain(2.1, 1.0)]}, trials).added == {"slim": 1}


def test_noise_of_the_triple_on_trial_speaks_for_it():
    # At most 1 + 3 = 4; half of it is 2.
    assert swaps({"slim": sure(1.9)}, {"slim": {0: Gain(1.0, 3.0)}}).added == {}
    assert swaps({"slim": sure(2.1)}, {"slim": {0: Gain(1.0, 3.0)}}).added == {"slim": 1}


def test_a_dear_candidate_is_set_against_all_that_pay_for_it():
    # A wide triple costs two slim ones: sqrt(3^2 + 4^2) = 5, and half of it is 2.5.
    trials = {"slim": {0: Gain(3.0, 0.0), 1: Gain(4.0, 0.0)}}
    assert swaps({"wide": sure(2.4)}, trials).added == {}
    plan = swaps({"wide": sure(2.6)}, trials)
    assert (plan.pruned, plan.added, plan.ranks) == ({"slim": (0, 1)}, {"wide": 1}, {"wide": 3, "slim": 1})


def test_per_unit_of_cost_the_cheap_candidate_goes_first_and_what_is_left_is_kept():
    # 3^2 / 5 = 1.8 against 4^2 / 10 = 1.6: the slim one first; then nothing is left that pays for the wide one.
    plan = swaps({"wide": sure(4.0), "slim": sure(3.0)}, {"slim": {1: Gain(0.1, 0.0)}})
    assert (plan.pruned, plan.added) == ({"slim": (1,)}, {"slim": 1})


def test_what_the_spare_pays_for_replaces_nothing():
    plan = swaps({"slim": sure(0.1)}, {"slim": {0: Gain(9.0, 0.0)}}, spare=5)
    assert (plan.pruned, plan.added) == ({}, {"slim": 1})
    assert swaps({"slim": sure(0.1)}, {}, spare=4).added == {}


def test_a_layer_at_its_cap_does_not_grow():
    trials = {"wide": {0: Gain(0.0, 0.0)}}
    assert swaps({"slim": sure(5.0)}, trials, max_ranks={"wide": 9, "slim": 3}).added == {}


def test_trials_are_the_lowest_scores_per_cost_without_the_newborn():
    # Per cost: wide 0.5, 0.1; slim 0.1, 0.08, 1.8. Ties by layer: wide's second comes before slim's first.
    choose: Any = dict(min_rank=0, costs=COSTS)
    assert choose_trials(SCORES, moves=2, newborn={}, **choose) == {"slim": (1,), "wide": (1,)}
    assert choose_trials(SCORES, moves=2, newborn={"slim": {1, 2}}, **choose) == {"wide": (1,), "slim": (0,)}
    assert choose_trials(SCORES, moves=9, newborn={}, min_rank=2, costs=COSTS) == {"slim": (1,)}
    assert choose_trials(SCORES, moves=0, newborn={}, **choose) == {}


def test_trials_together_could_pay_for_the_widest_triple():
    # The lowest per cost is slim (1), 5 of the 10 that a wide one costs; with wide (1) it is 15.
    assert choose_trials(SCORES, moves=1, newborn={}, min_rank=0, costs=COSTS) == {"slim": (1,), "wide": (1,)}
    assert choose_trials(SCORES, moves=1, newborn={}, min_rank=0, costs={"wide": 5, "slim": 5}) == {"slim": (1,)}


@pytest.mark.parametrize(("moves", "added"), [(0, {}), (1, {"slim": 1}), (2, {"slim": 2}), (3, {"slim": 2, "wide": 1})])
def test_along_the_gradient_the_lowest_pay_for_the_best_candidates(moves, added):
    # Gains per cost: slim 0.6, 0.4; wide 0.35. Lowest per cost: slim (1), then wide (1) and slim (0).
    gains = {"wide": [3.5], "slim": [3.0, 2.0, 0.0]}
    plan = plan_along_gradient(SCORES, gains, moves=moves, min_rank=0, max_ranks=FREE, costs=COSTS, spare=0)
    spent = sum(COSTS[name] * rank for name, rank in plan.ranks.items())
    assert plan.added == added and spent <= 35
