"""AdaLoRA's budget by hand; ranks that are pruned are gone. test_triple_scores.py compares the scores with PEFT's."""

from __future__ import annotations

from typing import Any

import pytest

from pedyra.lora.attach import attach
from pedyra.methods.adalora import AdaLora


def test_the_lowest_triples_of_all_layers_go_and_a_layer_may_lose_all(situation: Any):
    # Step 4: 2 of 13 steps are over; b = int(4 + 4 (11/13)^3) = 6 of 8 ranks, so the two lowest go.
    method, begun = AdaLora(final_rank=2), {"a": 4, "b": 4}
    scores = {"a": [0.5, 0.1, 0.7, 0.9], "b": [0.3, 0.2, 0.8, 0.6]}
    plan = method.plan(scores, situation({"a": 4, "b": 4}, min_rank=0))
    assert plan.pruned == {"a": (1,), "b": (1,)} and plan.ranks == {"a": 3, "b": 3} and not plan.added
    # The last adjustment, step 14, reaches b_T = 4 exactly.
    last = method.plan(
        {"a": [0.5, 0.7, 0.9], "b": [0.1, 0.2]}, situation({"a": 3, "b": 2}, initial_ranks=begun, step=14, min_rank=0)
    )
    assert last.ranks == {"a": 3, "b": 1}
    now = situation({"a": 4, "b": 2}, initial_ranks=begun, step=14, min_rank=0)
    emptied = method.plan({"a": [5.0, 7.0, 9.0, 8.0], "b": [0.1, 0.2]}, now)
    assert emptied.ranks == {"a": 4, "b": 0}


def test_a_budget_of_parameters_prunes_by_score_per_parameter(situation: Any):
    # Triples cost 10 and 30; final 2: 80 parameters. The costly triples are worth least per parameter.
    now = situation(
        {"a": 2, "b": 3},
        initial_ranks={"a": 3, "b": 3},
        step=14,
        min_rank=0,
        budget="parameters",
        parameters={"a": 10, "b": 30},
    )
    plan = AdaLora(final_rank=2).plan({"a": [0.3, 0.4], "b": [0.6, 0.9, 1.2]}, now)
    assert plan.ranks == {"a": 2, "b": 2}


def test_a_run_ends_at_the_budget_and_its_moments_have_shrunk(prepare: Any):
    run = prepare("adalora-svd").train()
    layers = len(run.allocator.layers)
    totals = [record["total_rank"] for record in run.allocator.history]
    assert totals == sorted(totals, reverse=True) and totals[-1] == 4 * layers
    # steps 4, 6, 8 of the window 2..9, and b_T at the last
    assert totals == [int(4 * layers + 2 * layers * (1 - part) ** 3) for part in (2 / 7, 4 / 7, 1)]
    state = run.allocator.optimizer.state
    for layer in run.allocator.layers:
        assert state[layer.a.A]["exp_avg"].shape == layer.a.A.shape
        assert layer.scaling == 32 / 6


@pytest.mark.parametrize("method", ["adalora-svd", "prune"])
def test_a_run_may_start_at_the_budget_and_end_below_it(prepare: Any, method: str):
    run = prepare(method, settings={"final_rank": 2, "budget": "ranks"})
    assert {layer.rank for layer in attach(run.model)} == {4}
    run.train()
    assert sum(run.allocator.ranks.values()) == 2 * len(run.allocator.layers)


def test_at_the_first_step_only_e_has_a_gradient(prepare: Any):
    gradients = prepare("adalora-svd").gradients()
    for name, gradient in gradients.items():
        assert bool(gradient.any()) == name.endswith(".E"), name
