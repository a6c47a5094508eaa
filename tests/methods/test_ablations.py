"""The paper's ablations: prune only, expand only, and random moves; their decisions by hand and their budgets."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pedyra.methods.ablations import Expand, Prune, RandomMoves


def test_prune_removes_the_lowest_at_an_even_pace(situation: Any):
    # Six adjustments from 6 to 4 ranks a layer, two layers: budget 8 + int(4 (1 - n / 6)) = 11, 10, 10, 9, 8, 8.
    method, ranks = Prune(final_rank=4), {"a": 6, "b": 6}
    scores = {"a": [0.1, 0.9, 0.8, 0.7, 0.6, 0.5], "b": [0.2, 0.95, 0.85, 0.75, 0.65, 0.55]}
    totals = [sum(method.plan(scores, situation(ranks, step=t)).ranks.values()) for t in (4, 6, 8, 10, 12, 14)]
    assert totals == [11, 10, 10, 9, 8, 8]
    assert method.plan(scores, situation(ranks, step=6)).pruned == {"a": (0,), "b": (0,)}


def test_prune_leaves_min_rank(situation: Any):
    plan = Prune(final_rank=1).plan({"a": [0.1, 0.2], "b": [0.8, 0.9]}, situation({"a": 2, "b": 2}, step=14))
    assert plan.ranks == {"a": 1, "b": 1}


def test_expand_gives_one_triple_each_to_the_best_layers(situation: Any):
    # Six adjustments from 2 to 4 ranks a layer, three layers: 6 + int(6 n / 6) = 7 after the first, 8 after the second.
    method = Expand(final_rank=4)
    scores = {"a": [0.1, 0.3], "b": [0.9, 0.7], "c": [0.4, 0.6]}
    assert method.plan(scores, situation(dict.fromkeys(scores, 2))).added == {"b": 1}
    assert method.plan(scores, situation(dict.fromkeys(scores, 2), step=6)).added == {"b": 1, "c": 1}
    now = situation(dict.fromkeys(scores, 2), step=14, max_ranks={"a": 9, "b": 3, "c": 9})
    assert method.plan(scores, now).ranks == {"a": 4, "b": 3, "c": 5}


def test_random_moves_depend_on_seed_and_step_alone(situation: Any):
    ranks = {"a": 3, "b": 4, "c": 5}
    zero = {name: [0.0] * rank for name, rank in ranks.items()}
    high = {name: [9.0] * rank for name, rank in ranks.items()}
    now = situation(ranks, moves=3)
    plan, same = RandomMoves(seed=1).plan(zero, now), RandomMoves(seed=1).plan(high, now)
    assert plan.pruned == same.pruned and plan.added == same.added
    for seed, step in ((2, 4), (1, 6), (3, 4)):
        assert RandomMoves(seed=seed).plan(zero, situation(ranks, moves=3, step=step)).pruned != plan.pruned
    assert sum(plan.ranks.values()) == 12 and sum(map(len, plan.pruned.values())) == 3


def test_every_triple_and_every_layer_is_equally_likely(situation: Any):
    ranks = {"a": 2, "b": 6}
    scores = {name: [0.0] * rank for name, rank in ranks.items()}
    pruned = Counter(
        (name, index)
        for seed in range(4000)
        for name, indices in RandomMoves(seed=seed).plan(scores, situation(ranks, moves=1, min_rank=0)).pruned.items()
        for index in indices
    )
    assert all(abs(count - 500) < 5 * 21 for count in pruned.values()) and len(pruned) == 8  # 21: binomial deviation
    plans = [RandomMoves(seed=seed).plan(scores, situation(ranks)) for seed in range(1000)]
    grown = Counter(name for plan in plans for name in plan.added)
    assert abs(grown["a"] - 500) < 5 * 16


def test_random_moves_respect_min_rank_and_a_budget_of_parameters(situation: Any):
    ranks, costs = {"a": 2, "b": 3, "c": 1}, {"a": 10, "b": 25, "c": 40}
    scores = {name: [0.0] * rank for name, rank in ranks.items()}
    for seed in range(50):
        now = situation(ranks, moves=2, budget="parameters", parameters=costs, spare=7)
        plan = RandomMoves(seed=seed).plan(scores, now)
        assert min(plan.ranks.values()) >= 1
        assert sum((plan.ranks[name] - ranks[name]) * costs[name] for name in ranks) <= 7


@pytest.mark.parametrize(("method", "first"), [("prune", 6), ("expand", 2), ("random", 4)])
@pytest.mark.parametrize("budget", ["ranks", "parameters"])
def test_a_run_starts_and_ends_where_it_says_and_scales_as_lora(prepare: Any, method: str, first: int, budget: str):
    run = prepare(method, settings={"budget": budget})
    run.train()
    layers = run.allocator.layers
    assert run.allocator.initial_parameters == first * sum(layer.direction_parameters for layer in layers)
    ends = 4 * sum(1 if budget == "ranks" else layer.direction_parameters for layer in layers)
    used = sum(layer.rank * (1 if budget == "ranks" else layer.direction_parameters) for layer in layers)
    assert used == ends if budget == "ranks" else 0.9 * ends < used <= ends
    assert {layer.scaling for layer in layers} == {32 / 4}


def test_random_makes_as_many_moves_as_pedyra(prepare: Any):
    settings = {"settings": {"moves": 5, "interval": 2}}
    counts = []
    for method in ("pedyra", "random"):
        history = prepare(method, **settings).train().allocator.history
        counts.append([len(record["pruned"]) for record in history])
    assert counts[0] == counts[1] and counts[0][0] == 5
