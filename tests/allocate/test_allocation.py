"""Algorithm 2 by hand; tests/allocate/test_allocation_properties.py has what holds in every situation."""

from __future__ import annotations

import pytest

from pedyra.pe_dyra.equations import plan_adjustment


def unlimited(scores) -> dict[str, int]:
    return dict.fromkeys(scores, 10**6)


def test_by_hand():
    scores = {"q": [0.1, 0.9, 0.2], "k": [0.3, 0.4], "v": [2.0]}
    plan = plan_adjustment(scores, moves=2, min_rank=1, max_ranks=unlimited(scores))
    assert plan.pruned == {"q": (0, 2)}
    assert plan.layer_scores == {"q": pytest.approx(0.4), "k": pytest.approx(0.35), "v": 2.0}
    assert plan.added == {"v": 1, "q": 1}  # q is ranked on the snapshot before it was pruned
    assert plan.ranks == {"q": 2, "k": 2, "v": 2}


def test_more_moves_than_layers_walk_the_ranking_again():
    scores = {"a": [0.0] * 6, "b": [1.0] * 6}
    plan = plan_adjustment(scores, moves=5, min_rank=1, max_ranks=unlimited(scores))
    assert plan.pruned == {"a": (0, 1, 2, 3, 4)}
    assert plan.added == {"b": 3, "a": 2}  # b, a, b, a, b


def test_ties_fall_by_layer_order_then_triple_index():
    scores = {"b": [1.0, 1.0, 1.0], "a": [1.0, 1.0, 1.0]}
    plan = plan_adjustment(scores, moves=3, min_rank=1, max_ranks=unlimited(scores))
    assert plan.pruned == {"b": (0, 1), "a": (0,)}
    one = plan_adjustment(scores, moves=1, min_rank=1, max_ranks=unlimited(scores))
    assert one.added == {"b": 1}


def test_parameters_by_hand_a_move_is_ranked_by_its_score_per_parameter():
    scores = {"wide": [4.0, 8.0], "slim": [1.0, 3.0]}
    sizes = {"wide": 10, "slim": 2}
    # Per parameter: wide 0.4, 0.8; slim 0.5, 1.5. The first wide triple goes, though its score is not the lowest.
    plan = plan_adjustment(scores, moves=1, min_rank=1, max_ranks=unlimited(scores), parameters=sizes, spare=0)
    assert plan.pruned == {"wide": (0,)}
    assert plan.added == {"slim": 5}  # layer scores per parameter: wide 0.6, slim 1.0; the 10 freed buy five
    assert plan.ranks == {"wide": 1, "slim": 7}
