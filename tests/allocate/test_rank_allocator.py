"""RankAllocator in a hand-written loop: budgets, schedule, records; nothing moves but what a plan names."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from closeness import close, same_bits
from windows import SCHEDULE, STEPS, allocate, forced, take_step, trainable

from pedyra import PeDyra

BASES = ("forced", "paper")


def given(base: str, **settings: Any) -> dict[str, Any]:
    """The `config` of a run of `STEPS` in which triples move: on LoRA's start, or the paper's."""
    return (
        forced(**SCHEDULE, **settings)
        if base == "forced"
        else {"config": PeDyra.as_published(**{**SCHEDULE, "moves": 1}, **settings)}
    )


@pytest.mark.parametrize("budget", ["parameters", "ranks"])
@pytest.mark.parametrize("base", BASES)
def test_the_budget_is_kept_at_every_step(base, budget, make_net, net_batch):
    model = make_net()
    allocator = allocate(model, given(base, budget=budget))
    start_parameters, start_rank = allocator.parameters, sum(allocator.ranks.values())
    moved = set()
    for step in range(STEPS):
        x, y = net_batch(step)
        (model(x) - y).square().mean().backward()
        take_step(allocator)
        moved.add(tuple(allocator.ranks.values()))
        assert min(allocator.ranks.values()) >= 1
        if budget == "ranks":
            assert sum(allocator.ranks.values()) == start_rank
        else:
            assert allocator.parameters <= start_parameters
            assert start_parameters - allocator.parameters < 21  # what is left over buys no further triple
    assert len(moved) > 2


def test_parameters_gradients_and_moments_are_physically_those_of_the_ranks(make_net, net_batch):
    model = make_net()
    allocator = allocate(model, given("forced"))
    elements = {"parameters": 0, "gradients": 0, "moments": 0}
    for step in range(STEPS):
        x, y = net_batch(step)
        (model(x) - y).square().mean().backward()
        allocator.before_step()
        elements["gradients"] = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
        assert elements["gradients"] == allocator.parameters
        allocator.optimizer.step()
        allocator.optimizer.zero_grad()
        allocator.after_step()
        held = [p for group in allocator.optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in trainable(model)} == {id(p) for p in allocator.optimizer.state}
        elements["parameters"] = sum(p.numel() for p in held)
        states = allocator.optimizer.state.values()
        elements["moments"] = sum(v.numel() for state in states for k, v in state.items() if k != "step")
        assert elements["parameters"] == allocator.parameters <= allocator.initial_parameters
        assert elements["moments"] == 2 * allocator.parameters


def test_ranks_move_exactly_at_the_adjustments_of_the_schedule(make_net, train_net):
    model = make_net()
    allocator = allocate(model, given("forced"))
    records = train_net(model, allocator.optimizer, allocator, STEPS)
    expected = [5, 8, 11, 14, 17, 20]  # t > 2, (t - 2) % 3 == 0, t < 30 - 8
    assert [record["step"] for record in records] == expected == list(allocator.schedule.adjustments)
    assert allocator.history == records and allocator.step == STEPS


@pytest.mark.parametrize("base", BASES)
def test_a_record_tells_what_happened_and_survives_json(base, make_net, train_net):
    model = make_net()
    allocator = allocate(model, given(base))
    ranks = allocator.ranks
    for record in train_net(model, allocator.optimizer, allocator, STEPS):
        assert json.loads(json.dumps(record)) == record
        for name, rank in record["ranks"].items():
            gone = [entry for entry in record["pruned"] if entry[0] == name]
            assert rank == ranks[name] - len(gone) + record["added"].get(name, 0)
            assert len(record["scores"][name]) == ranks[name]
            assert record["layer_scores"][name] == pytest.approx(sum(record["scores"][name]) / ranks[name])
        assert all(record["scores"][name][index] == score for name, index, score in record["pruned"])
        ranks = record["ranks"]
        assert record["total_rank"] == sum(ranks.values())
    assert ranks == allocator.ranks


@pytest.mark.parametrize("base", BASES)
def test_an_adjustment_changes_the_function_by_the_pruned_triples_alone(base, make_net, net_batch):
    model = make_net(trained=True, dtype=torch.float64)
    allocator = allocate(model, given(base))
    for step in range(1, STEPS + 1):
        x, y = (value.double() for value in net_batch(step))
        (model(x) - y).square().mean().backward()
        allocator.before_step()
        allocator.optimizer.step()
        allocator.optimizer.zero_grad()
        before = {layer.name: layer.b.weight.detach() @ layer.a.weight.detach() for layer in allocator.layers}
        parts = {layer.name: _contributions(layer) for layer in allocator.layers}
        record = allocator.after_step()
        for name, index, _ in [] if record is None else record["pruned"]:
            before[name] = before[name] - parts[name][index]
        for layer in allocator.layers:
            after = layer.b.weight.detach() @ layer.a.weight.detach()
            assert close(after, before[layer.name])


def _contributions(layer: Any) -> list[torch.Tensor]:
    A, E, B = layer.a.A.detach(), layer.a.E.detach(), layer.b.weight.detach()
    return [E[i] * torch.outer(B[:, i], A[i]) for i in range(layer.rank)]


@pytest.mark.parametrize("base", BASES)
def test_two_runs_have_the_same_bits_whatever_the_global_generator(base, make_net, train_net):
    results = []
    for seed in (1, 2):
        model = make_net()
        allocator = allocate(model, given(base))
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        train_net(model, allocator.optimizer, allocator, STEPS)
        assert same_bits(torch.get_rng_state(), state)
        history = [{k: v for k, v in record.items() if k != "seconds"} for record in allocator.history]
        results.append((history, [p.detach() for p in trainable(model)]))
    assert results[0][0] == results[1][0]
    assert all(same_bits(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_a_seed_of_64_bits_is_a_seed(make_net, train_net):
    """Such as `torch.initial_seed()`: new triples are drawn with it, and with the step."""
    model = make_net()
    allocator = allocate(model, forced(**SCHEDULE, seed=2**64 - 1))
    train_net(model, allocator.optimizer, allocator, 6)
    assert allocator.history


def test_moves_zero_observes_and_moves_nothing(make_net, train_net):
    model = make_net()
    allocator = allocate(model, forced(**{**SCHEDULE, "moves": 0}))
    records = train_net(model, allocator.optimizer, allocator, STEPS)
    assert len(records) == 6 and all(not record["pruned"] and not record["added"] for record in records)
    assert set(allocator.ranks.values()) == {4}
    assert all(any(score > 0 for score in scores) for scores in records[0]["scores"].values())


def test_layers_never_outgrow_their_width_or_the_cap(make_net, train_net):
    for max_rank, bound in ((None, 6), (5, 5)):
        model = make_net()
        allocator = allocate(model, forced(**{**SCHEDULE, "moves": 8, "max_rank": max_rank}))
        train_net(model, allocator.optimizer, allocator, STEPS)
        for layer in allocator.layers:
            assert layer.rank <= min(bound if max_rank else 8, layer.a.in_features, layer.b.out_features)


def test_describe_and_snapshot_are_plain_values_and_true(make_net, train_net):
    model = make_net()
    allocator = allocate(model, given("forced"))
    setup = allocator.describe()
    assert json.loads(json.dumps(setup)) == setup
    assert setup["layers"][0] == {
        "name": "layers.0",
        "type": "layers",
        "depth": 0,
        "rank": 4,
    }
    assert setup["budget"] == {"kind": "parameters", "total_rank": 12, "parameters": 4 * (21 + 19 + 13)}
    fresh = allocator.snapshot()
    assert fresh["effective_rank"] == {"layers.0": 0.0, "layers.1": 0.0, "layers.2": 0.0} and fresh["step"] == 0
    train_net(model, allocator.optimizer, allocator, 7)
    snapshot = allocator.snapshot()
    assert json.loads(json.dumps(snapshot)) == snapshot
    assert snapshot["parameters"] == sum(p.numel() for p in trainable(model))
    for layer in allocator.layers:
        values = torch.linalg.svdvals(layer.b.weight.detach() @ layer.a.weight.detach())[: layer.rank]
        shares = values / values.sum()
        expected = torch.exp(-(shares * shares.clamp_min(1e-30).log()).sum())
        assert snapshot["effective_rank"][layer.name] == pytest.approx(float(expected), rel=1e-3)
