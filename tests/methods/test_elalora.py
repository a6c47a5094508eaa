"""ElaLoRA: its candidates and exchange by hand; the optimizer and its schedule survive every adjustment."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pedyra.methods.elalora import Elastic, candidates, exchange, orthogonal_triples

SCORES = {"a": [5.0, 1.0, 4.0], "b": [2.0, 0.5], "c": [9.0, 8.0, 7.0, 6.0], "d": [0.1]}


def test_each_layer_offers_its_lowest_but_never_its_last():
    assert [(score, name) for score, _, _, name in candidates(SCORES)] == [
        (0.5, "b"),
        (1.0, "a"),
        (4.0, "a"),
        (6.0, "c"),
        (7.0, "c"),
    ]


def test_the_lowest_go_and_the_layers_of_the_highest_grow():
    ranks = {name: len(values) for name, values in SCORES.items()}
    free = dict.fromkeys(ranks, 100)
    costs = dict.fromkeys(ranks, 1)
    pruned, added = exchange(candidates(SCORES), 2, ranks, free, costs, 0)
    assert pruned == {"b": (1,), "a": (1,)} and added == {"c": 2}  # c owns both of the highest
    _, added = exchange(candidates(SCORES), 2, ranks, {**free, "c": 5}, costs, 0)
    assert added == {"c": 1, "a": 1}  # a full layer passes its turn on
    _, added = exchange(candidates(SCORES), 2, ranks, free, {"a": 1, "b": 1, "c": 3, "d": 1}, 0)
    assert added == {"a": 2}  # c costs more than what was freed


def test_b_decays_as_one_minus_p_cubed(situation: Any):
    ranks = {name: len(values) for name, values in SCORES.items()}
    policy = Elastic(moves=4)
    # p = (t - 2) / 13: round(4 (1 - p^3)) = 4, 3, 1 at t = 4, 10, 14
    moved = [sum(policy(SCORES, situation(ranks, step=t)).added.values()) for t in (4, 10, 14)]
    assert moved == [4, 3, 1]


def test_new_triples_are_unit_orthogonal_and_as_good_as_silent(prepare: Any):
    run = prepare("elalora").train()
    layer = run.allocator.layers[0]
    new = orthogonal_triples(layer, 2, torch.Generator().manual_seed(0))
    A = layer.a.A.detach()
    torch.testing.assert_close(new.A @ new.A.T, torch.eye(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(new.A @ A.T, torch.zeros(2, len(A)), rtol=0, atol=1e-5)
    assert all(0 <= value <= 1e-13 for value in new.E.tolist())


def test_it_agrees_with_one_gram_schmidt_pass_on_orthonormal_rows(prepare: Any):
    """The authors' a - A^T (A a), normalised, for the same draw."""
    layer = prepare("elalora").train().allocator.layers[0]
    rows = torch.linalg.qr(torch.randn(layer.a.in_features, layer.rank)).Q.T
    layer.a.A.data.copy_(rows)
    new = orthogonal_triples(layer, 1, torch.Generator().manual_seed(3))
    a = torch.randn(1, layer.a.in_features, generator=torch.Generator().manual_seed(3))[0]
    expected = a - rows.T @ (rows @ a)
    cosine = torch.nn.functional.cosine_similarity(new.A[0], expected, dim=0)
    assert abs(float(cosine)) == pytest.approx(1, abs=1e-5)


def test_a_run_conserves_the_ranks_and_keeps_optimizer_and_schedule(prepare: Any):
    run = prepare("elalora", training={"lr_scheduler_type": "linear"})
    run.train()
    layers = run.allocator.layers
    assert run.allocator.history and all(r["total_rank"] == 4 * len(layers) for r in run.allocator.history)
    optimizer = run.trainer.optimizer
    assert run.allocator.optimizer is getattr(optimizer, "optimizer", optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}  # the end of the schedule, not its peak
    for layer in layers:
        state = run.allocator.optimizer.state[layer.a.A]
        assert int(state["step"]) == 12 and state["exp_avg"].shape == layer.a.A.shape and state["exp_avg"].any()


def test_an_adjustment_changes_the_function_only_by_what_it_prunes(prepare: Any):
    run = prepare("elalora", rank={"moves": 1})
    run.train()
    layer = run.allocator.layers[0]
    before = run.logits()
    from pedyra.lora.resize import install, resized

    new = orthogonal_triples(layer, 2, torch.Generator().manual_seed(0))
    install([(layer, resized(layer, (), new))])
    torch.testing.assert_close(run.logits(), before, rtol=0, atol=1e-6)


def test_rank_one_is_refused(prepare: Any):
    with pytest.raises(ValueError, match="lora.r is 1, but ElaLoRA never takes a layer's last rank"):
        prepare("elalora", lora={"r": 1})
    with pytest.raises(ValueError, match="rank.moves is null, but ElaLoRA's b_0 is a number of ranks"):
        prepare("elalora", rank={"moves": None})


def test_a_least_rank_of_a_shared_recipe_is_passed_over(prepare: Any):
    run = prepare("elalora", rank={"min_rank": 0})
    run.train()
    assert run.ranks.method.min_rank == 1  # ElaLoRA never takes a layer's last
