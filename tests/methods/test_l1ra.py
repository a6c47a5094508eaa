"""L1RA: gates under their own step, closed ones move to the layers whose lowest gate is highest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import same_bits
from transformers import TrainerCallback

from pedyra.methods.l1ra import MoveClosed, closed_gates, gated_triples, shrink_gates


def test_closed_gates_go_but_never_the_most_open():
    scores = {"a": [0.0, 1e-7, 0.5], "b": [0.0, 1e-7], "c": [1e-6, 1.0]}
    assert closed_gates(scores) == {"a": (0, 1), "b": (0,)}


def test_a_layer_whose_only_gate_is_closed_does_not_grow(situation: Any):
    scores = {"a": [0.0], "b": [0.0, 0.9], "c": [0.7, 0.8]}
    plan = MoveClosed(rank=2)(scores, situation({"a": 1, "b": 2, "c": 2}))
    assert plan.pruned == {"b": (0,)} and plan.added == {"c": 2}


def test_ranks_go_round_robin_to_the_layers_that_lost_none(situation: Any):
    scores = {"a": [0.0, 0.0, 0.0, 0.9], "b": [0.4, 0.8], "c": [0.7, 0.5], "d": [0.3, 0.2]}
    ranks = {name: len(gates) for name, gates in scores.items()}
    policy = MoveClosed(rank=2)  # budget 8, 10 in use: 3 closed leave room for 1
    assert policy(scores, situation(ranks)).added == {"c": 1}
    # With room for 5: by the lowest gate c (0.5), b (0.4), d (0.2), c, b; never a, which was pruned.
    assert MoveClosed(rank=3)(scores, situation(ranks)).added == {"c": 2, "b": 2, "d": 1}


def test_ranks_wait_when_every_layer_lost_one(situation: Any):
    plan = MoveClosed(rank=2)({"a": [0.0, 1.0], "b": [0.0, 1.0]}, situation({"a": 2, "b": 2}))
    assert plan.ranks == {"a": 1, "b": 1} and not plan.added
    later = MoveClosed(rank=2)({"a": [1.0], "b": [0.9]}, situation(plan.ranks))
    assert later.ranks == {"a": 2, "b": 2}


def test_the_gate_step_by_hand():
    gates = torch.tensor([1.3, 0.5, 1e-6, 0.0, -0.2])
    shrink_gates(gates, 1e-3)
    torch.testing.assert_close(gates, torch.tensor([1.0, 0.49999, 0.0, 0.0, 0.0]), rtol=0, atol=1e-7)


def test_gates_have_a_constant_rate_and_stay_in_zero_one(prepare: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pedyra.methods.l1ra.GATE_RATE", 0.3)
    run = prepare("l1ra", training={"lr_scheduler_type": "linear"})
    seen: list[tuple[list[float], float]] = []

    class Look(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gates = torch.cat([layer.a.E.detach() for layer in run.allocator.layers])
            seen.append(([group["lr"] for group in kwargs["optimizer"].param_groups], float(gates.min())))
            assert 0 <= float(gates.min()) and float(gates.max()) <= 1

    run.trainer.add_callback(Look())
    run.train()
    assert {rates[-1] for rates, _ in seen} == {0.3}
    assert seen[-1][0][0] < seen[0][0][0] == 1e-2
    assert any(record["pruned"] for record in run.allocator.history)  # so high a rate closes some
    total = [record["total_rank"] for record in run.allocator.history]
    assert max(total) <= 4 * len(run.allocator.layers)


def test_a_step_that_is_skipped_shrinks_no_gate(prepare: Any):
    run = prepare("l1ra")
    hooks, gates = run.adaptation.hooks, run.model.get_base_model()
    before = [E.detach().clone() for name, E in gates.named_parameters() if name.endswith(".E")]
    for skipped, same in ((True, True), (False, False)):
        hooks.stepped(1, skipped=skipped)
        now = [E.detach() for name, E in gates.named_parameters() if name.endswith(".E")]
        assert before and all(same_bits(a, b) for a, b in zip(now, before, strict=True)) == same


def test_every_parameter_is_in_one_group_and_gates_are_not_decayed(prepare: Any):
    run = prepare("l1ra", training={"weight_decay": 0.1})
    groups = run.trainer.optimizer.param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in run.model.parameters() if p.requires_grad}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]


def test_b_learns_at_the_first_step_and_new_triples_are_silent(prepare: Any):
    run = prepare("l1ra")
    gradients = run.gradients()
    assert all(bool(g.any()) == ("lora_B" in name) for name, g in gradients.items())
    run.train()
    layer = run.allocator.layers[0]
    new = gated_triples(layer, 200, torch.Generator().manual_seed(0), rank=4)
    assert not new.B.any() and new.E.tolist() == [1] * 200
    assert float(new.A.std()) == pytest.approx(1 / 4, rel=0.05)
