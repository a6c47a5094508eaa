"""ElaLoRA: candidates and exchange by hand, the authors' Gram-Schmidt pass, and the optimizer after an adjustment."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pedyra.methods.elalora import ElaLora, candidates, exchange, orthogonal_rows

SCORES = {"a": [5.0, 1.0, 4.0], "b": [2.0, 0.5], "c": [9.0, 8.0, 7.0, 6.0], "d": [0.1]}


def test_each_layer_offers_its_lowest_but_never_its_last():
    expected = [(0.5, "b"), (1.0, "a"), (4.0, "a"), (6.0, "c"), (7.0, "c")]
    assert [(score, name) for score, _, _, name in candidates(SCORES)] == expected


def test_the_lowest_go_and_the_layers_of_the_highest_grow():
    ranks = {name: len(values) for name, values in SCORES.items()}
    free, costs = dict.fromkeys(ranks, 100), dict.fromkeys(ranks, 1)
    pruned, added = exchange(candidates(SCORES), 2, ranks, free, costs, 0)
    assert pruned == {"b": (1,), "a": (1,)} and added == {"c": 2}  # c owns both of the highest
    _, added = exchange(candidates(SCORES), 2, ranks, {**free, "c": 5}, costs, 0)
    assert added == {"c": 1, "a": 1}  # a full layer passes its turn on
    _, added = exchange(candidates(SCORES), 2, ranks, free, {"a": 1, "b": 1, "c": 3, "d": 1}, 0)
    assert added == {"a": 2}  # c costs more than what was freed


def test_b_decays_as_one_minus_p_cubed(situation: Any):
    ranks = {name: len(values) for name, values in SCORES.items()}
    # p = (t - 2) / 13: round(4 (1 - p^3)) = 4, 3, 1 at t = 4, 10, 14
    plans = [ElaLora(moves=4).plan(SCORES, situation(ranks, step=t)) for t in (4, 10, 14)]
    assert [sum(plan.added.values()) for plan in plans] == [4, 3, 1]


def test_new_rows_are_unit_and_orthogonal_to_the_old_ones_and_to_each_other():
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    new = orthogonal_rows(rows, 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(new @ new.T, torch.eye(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(new @ rows.T, torch.zeros(2, 3), rtol=0, atol=1e-5)


def test_it_agrees_with_one_gram_schmidt_pass_on_orthonormal_rows():
    """The authors' a - A^T (A a), normalised, for the same draw."""
    rows = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(1))).Q.T
    new = orthogonal_rows(rows, 1, torch.Generator().manual_seed(3))
    a = torch.randn(1, 8, generator=torch.Generator().manual_seed(3))[0]
    cosine = torch.nn.functional.cosine_similarity(new[0], a - rows.T @ (rows @ a), dim=0)
    assert abs(float(cosine)) == pytest.approx(1, abs=1e-5)


def test_a_run_conserves_the_ranks_and_keeps_the_optimizers_state(prepare: Any):
    run = prepare("elalora", training={"lr_scheduler_type": "linear"})
    run.train()
    layers = run.allocator.layers
    assert run.allocator.history and all(r["total_rank"] == 4 * len(layers) for r in run.allocator.history)
    assert {group["lr"] for group in run.trainer.optimizer.param_groups} == {0.0}  # the end of its schedule
    for layer in layers:
        state = run.allocator.optimizer.state[layer.a.A]
        assert state["exp_avg"].shape == layer.a.A.shape and state["exp_avg"].any()
