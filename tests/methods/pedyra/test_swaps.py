"""Plans that know what a new triple would gain, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pedyra.methods.pedyra.swaps import (
    Curvature,
    Gain,
    choose_trials,
    curvatures,
    least_gain,
    plan_swaps,
)

SCORES = {"wide": [5.0, 1.0], "slim": [0.5, 0.4, 9.0]}
COSTS = {"wide": 10, "slim": 5}
FREE = {"wide": 9, "slim": 9}


def sure(*slopes: float, energy: float = 1.0) -> list[Gain]:
    return [Gain(slope, 0.0, energy) for slope in slopes]


def tried(slope: float, length: float, error: float = 0.0) -> Gain:
    return Gain(slope, error, length=length)


def swaps(
    candidates: dict[str, list[Gain]],
    trials: dict[str, dict[int, Gain]],
    h: dict[str, float] | None = None,
    **changes: Any,
):
    settings: dict[str, Any] = dict(
        max_ranks=FREE, costs=COSTS, spare=0, certainty=2.0, chance=2.0, least=0.0, margin=0.5
    )
    curvature = {name: Curvature(by_length=1e9, by_energy=(h or {}).get(name, 1.0)) for name in SCORES}
    return plan_swaps(SCORES, candidates, trials, curvature, **{**settings, **changes})[0]


def test_what_a_triple_saves_by_hand():
    # The loss 5 - 6 c + c^2 has the slope 6 and the curvature 2, and falls by 9, to its least at c = 3.
    assert Gain(6.0, 0.0, energy=4.0).saves(0.5, certainty=0.0) == pytest.approx(9.0)
    assert tried(6.0, length=3.0).worth == pytest.approx(9.0)
    assert Gain(10.0, 4.0, energy=4.0).saves(0.5, certainty=2.0) == pytest.approx(9.0)  # 10^2 - (2 * 4)^2 = 6^2
    assert tried(5.0, length=3.0, error=1.0).worth == pytest.approx(9.0)
    # Noise, and a slope that rises.
    assert (Gain(1.9, 1.0).saves(1.0, certainty=2.0), Gain(-9.0, 1.0).saves(1.0, certainty=2.0)) == (0.0, 0.0)
    assert tried(-9.0, length=3.0, error=1.0).worth == 1.5


def test_curvature_is_a_parabolas_own():
    # Two layers of different curvature, both tried twice at different lengths; a third was never tried.
    h = {"a": 2.0, "b": 8.0}
    look = {n: {i: Gain(h[n] * c, 0.0, energy=4.0, length=c) for i, c in enumerate((1.0, 3.0))} for n in h}
    found = curvatures(["a", "b", "c"], [look] * 40)
    # All together: sum of h c^2 over the sum of c^2, at equal lengths the mean; it counts as one trial of c^2 = 5, and
    # an endless row of equal looks, each half the one after it, as two of its sums, 20.
    for name, by_length in (("a", (20 * 2 + 5 * 5) / 25), ("b", (20 * 8 + 5 * 5) / 25), ("c", 5.0)):
        assert found[name].by_length == pytest.approx(by_length)
        assert found[name].by_energy == pytest.approx(by_length / 4)


def test_curvature_forgets_by_half_and_is_one_before_the_first_trial():
    def look(h: float) -> dict[str, dict[int, Gain]]:
        return {"a": {0: tried(h, length=1.0)}}

    # Sums 0.5 * 2 + 8 and 0.5 + 1, and all layers, which are this one: the same once more.
    assert curvatures(["a"], [look(2.0), look(8.0)])["a"].by_length == pytest.approx(9 / 1.5)
    assert curvatures(["a"], [])["a"] == Curvature(1.0, 1.0)
    assert curvatures(["a"], [{"a": {0: tried(3.0, length=0.0)}}])["a"] == Curvature(1.0, 1.0)


def test_a_candidate_must_save_the_margins_square_of_what_it_replaces():
    # Worth 2 * 2 / 2 = 2; a quarter of it, 0.5, is saved at a slope of 1.
    trials = {"slim": {0: tried(2.0, length=2.0)}}
    assert swaps({"slim": sure(1.01)}, trials).pruned == {"slim": (0,)}
    assert swaps({"slim": sure(1.01)}, trials).added == {"slim": 1}
    stay = swaps({"slim": sure(0.99)}, trials)
    assert (stay.pruned, stay.added, stay.ranks) == ({}, {}, {"wide": 2, "slim": 3})


def test_the_same_slope_saves_more_where_the_loss_curves_less():
    # The candidate saves 0.9^2 / (2 h energy), what is tried is worth 2.
    trials = {"slim": {0: tried(2.0, length=2.0)}}
    assert swaps({"slim": sure(0.9)}, trials).added == {}
    assert swaps({"slim": sure(0.9)}, trials, h={"slim": 0.8}).added == {"slim": 1}
    assert swaps({"slim": sure(0.9, energy=0.8)}, trials).added == {"slim": 1}
    assert swaps({"slim": sure(0.9)}, trials, h={"wide": 0.8}).added == {}


def test_what_the_largest_of_all_reaches_by_chance_moves_nothing_though_its_own_noise_does_not_explain_it():
    trials = {"slim": {0: tried(-1.0, length=1.0)}}
    assert swaps({"slim": [Gain(5.0, 1.0), Gain(9.0, 1.0)]}, trials, chance=5.0, spare=5).added == {"slim": 1}
    assert swaps({"slim": [Gain(5.1, 1.0), Gain(9.0, 1.0)]}, trials, chance=5.0, spare=5).added == {"slim": 2}
    # Beyond chance, a gain is as large as without it: 1.5^2 - (2 * 0.5)^2 by 2 is 0.625, and 2 * 2 / 2 by 4 is 0.5.
    worth = {"slim": {0: tried(2.0, length=2.0)}}
    assert swaps({"slim": [Gain(1.5, 0.5)]}, worth, chance=2.9).added == {"slim": 1}
    assert swaps({"slim": [Gain(1.5, 0.5)]}, worth, chance=3.1).added == {}


def test_a_gain_too_small_to_matter_moves_nothing_though_what_goes_is_worth_less():
    # 0.2^2 / 2 = 0.02 for 5 units; the triple on trial is worth nothing.
    trials = {"slim": {0: tried(-1.0, length=1.0)}}
    assert swaps({"slim": sure(0.2)}, trials, least=0.0039).added == {"slim": 1}
    assert swaps({"slim": sure(0.2)}, trials, least=0.0041).added == {}
    assert swaps({"slim": sure(0.2)}, {}, least=0.0041, spare=5).added == {}  # nor where nothing has to go


def test_what_matters_is_a_part_of_what_an_average_triple_saves():
    losses = {"wide": [5.0, 3.0], "slim": [1.0, 1.0, 2.0]}  # 12 of 2 * 10 + 3 * 5
    assert least_gain(losses, COSTS) == pytest.approx(0.001 * 12 / 35)
    assert least_gain({"wide": [], "slim": []}, COSTS) == least_gain({}, COSTS) == 0.0


def test_a_gain_within_its_noise_moves_nothing_even_against_a_worthless_triple():
    trials = {"slim": {0: tried(-1.0, length=1.0)}}
    assert swaps({"slim": [Gain(1.9, 1.0)]}, trials).added == {}
    assert swaps({"slim": [Gain(2.1, 1.0)]}, trials).added == {"slim": 1}


def test_noise_of_the_triple_on_trial_speaks_for_it():
    # At most 1 + 3 = 4, so worth 8; a quarter of it is saved at a slope of 2.
    trials = {"slim": {0: tried(1.0, length=4.0, error=3.0)}}
    assert swaps({"slim": sure(1.9)}, trials).added == {}
    assert swaps({"slim": sure(2.1)}, trials).added == {"slim": 1}


def test_a_dear_candidate_is_set_against_all_that_pay_for_it():
    # A wide triple costs two slim ones, worth 3 * 3 / 2 + 4 * 4 / 2 = 12.5, and a quarter is saved at a slope of 2.5.
    trials = {"slim": {0: tried(3.0, length=3.0), 1: tried(4.0, length=4.0)}}
    assert swaps({"wide": sure(2.4)}, trials).added == {}
    plan = swaps({"wide": sure(2.6)}, trials)
    assert (plan.pruned, plan.added, plan.ranks) == ({"slim": (0, 1)}, {"wide": 1}, {"wide": 3, "slim": 1})


def test_per_unit_of_cost_the_cheap_candidate_goes_first_and_what_is_left_is_kept():
    # 3^2 / 5 = 1.8 against 4^2 / 10 = 1.6: the slim one first; then nothing is left that pays for the wide one.
    plan = swaps({"wide": sure(4.0), "slim": sure(3.0)}, {"slim": {1: tried(0.1, length=0.1)}})
    assert (plan.pruned, plan.added) == ({"slim": (1,)}, {"slim": 1})


def test_what_the_spare_pays_for_replaces_nothing():
    plan = swaps({"slim": sure(0.1)}, {"slim": {0: tried(9.0, length=9.0)}}, spare=5)
    assert (plan.pruned, plan.added) == ({}, {"slim": 1})
    assert swaps({"slim": sure(0.1)}, {}, spare=4).added == {}


def test_a_layer_at_its_cap_does_not_grow():
    trials = {"wide": {0: tried(0.0, length=1.0)}}
    assert swaps({"slim": sure(5.0)}, trials, max_ranks={"wide": 9, "slim": 3}).added == {}
    own = swaps({"slim": sure(5.0)}, {"slim": {1: tried(0.0, length=1.0)}}, max_ranks={"wide": 9, "slim": 3})
    assert (own.pruned, own.added) == ({"slim": (1,)}, {"slim": 1})  # what goes makes room


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


def test_a_plan_says_what_became_of_its_candidates():
    settings: dict[str, Any] = dict(costs=COSTS, spare=0, certainty=0.0, chance=2.0, least=0.01, margin=0.5)
    candidates = {"wide": [Gain(1.9, 1.0), Gain(9.0, 1.0)], "slim": sure(3.0, 0.1)}
    trials = {"slim": {0: tried(2.0, length=2.0)}}
    curvature = {name: Curvature(1.0, 1.0) for name in SCORES}
    _, contests = plan_swaps(SCORES, candidates, trials, curvature, max_ranks=FREE, **settings)
    told = {(each.layer, each.candidate): (each.outcome, each.bar, each.against) for each in contests}
    assert told == {
        ("wide", 0): ("noise", 0.1, ()),  # 0.01 for each of 10
        ("wide", 1): ("cannot be paid for", 0.5, (("slim", 0, 2.0),)),  # 10 of which 5 are there
        ("slim", 0): ("won", 0.5, (("slim", 0, 2.0),)),  # a quarter of 2 * 2 / 2
    }
