"""Once, early, all ranks are assigned anew by what the triples save of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from windows import inside, pedyra

from pedyra import RankAllocator, RankConfig
from pedyra.allocate.checkpoint import run_record
from pedyra.allocate.optimizer_checks import has_second_moments
from pedyra.allocate.schedule import moves_at
from pedyra.methods.new_triples import triples_along
from pedyra.methods.pedyra.reassignment import proportional_ranks, reassign, removal_losses

SCHEDULE: dict[str, Any] = dict(interval=5, final_warmup=4, reassignment=11, certainty=0.0)
"""Adjustments of 24 steps after 5, 10 and 15; 10 is the nearest to 11. Whatever gains anything would be moved."""


def allocate(model: Any, config: RankConfig | dict[str, Any], steps: int = 24) -> RankAllocator:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    given: dict[str, Any] = config if isinstance(config, dict) else {"config": config}
    return RankAllocator(model, optimizer, total_steps=steps, **given)


def saliencies(allocator: RankAllocator) -> dict[str, list[float]]:
    """w^2 v / 2 of every row of A, in a loop."""
    result = {}
    for layer in allocator.layers:
        v = allocator.optimizer.state[layer.a.A]["exp_avg_sq"]
        result[layer.name] = [
            sum(w**2 * second / 2 for w, second in zip(row, moments, strict=True))
            for row, moments in zip(layer.a.A.tolist(), v.tolist(), strict=True)
        ]
    return result


def test_ranks_are_dealt_once_at_the_nearest_adjustment(make_net, train_net):
    model = make_net()
    allocator = allocate(model, pedyra(**SCHEDULE))
    train_net(model, allocator.optimizer, allocator, 9)
    before = allocator.ranks
    # The tenth step, without what the allocator does after it.
    seen: dict[str, list[float]] = {}
    after_step = allocator.after_step

    def spy() -> Any:
        seen.update(saliencies(allocator))
        return after_step()

    allocator.after_step = spy  # type: ignore[method-assign]
    (record,) = train_net(model, allocator.optimizer, allocator, 1, first=10)
    allocator.after_step = after_step  # type: ignore[method-assign]
    costs = {layer.name: layer.cost for layer in allocator.layers}
    widths = {layer.name: min(layer.a.in_features, layer.b.out_features) for layer in allocator.layers}
    expected = proportional_ranks(seen, min_rank=0, max_ranks=widths, costs=costs, spare=0)
    assert record["reassigned"] and record["ranks"] == expected.ranks == allocator.ranks != before
    assert {name for name, _, _ in record["pruned"]} == set(expected.pruned)
    assert allocator.parameters <= allocator.initial_parameters
    train_net(model, allocator.optimizer, allocator, 14, first=11)
    assert [record["reassigned"] for record in allocator.history] == [False, True, False]


def test_nothing_is_dealt_while_one_layer_would_get_nearly_all(make_net, train_net):
    model = make_net()
    allocator = allocate(model, pedyra(**SCHEDULE))
    train_net(model, allocator.optimizer, allocator, 9)
    allocator.optimizer.state[allocator.layers[1].a.A]["exp_avg_sq"].mul_(1000)
    before = {layer.name: (layer.a.A, layer.b.weight) for layer in allocator.layers}
    (record,) = train_net(model, allocator.optimizer, allocator, 1, first=10)
    assert not record["reassigned"] and not record["pruned"] and not record["added"]
    assert all((layer.a.A, layer.b.weight) == before[layer.name] for layer in allocator.layers)


def test_nothing_is_on_trial_when_ranks_are_dealt_and_swaps_begin_small_after(make_net, train_net):
    model = make_net()
    allocator = allocate(model, pedyra(**SCHEDULE, moves=8))
    for step in range(1, 11):
        train_net(model, allocator.optimizer, allocator, 1, first=step)
        assert all(layer.a.kept_directions is None for layer in allocator.layers)
    assert sum(allocator.history[-1]["added"].values()) > 1, "the test would prove nothing"
    assert moves_at(allocator.moves, inside(allocator).last.moved) == 2  # a quarter of 8, not twice what was dealt


@pytest.mark.parametrize("config", [pedyra(reassignment=0), RankConfig(moves=0), RankConfig.paper()])
def test_nothing_is_dealt_where_it_is_not_asked_for(config, make_net):
    assert allocate(make_net(), config, 200).describe()["schedule"]["reassignment"] is None
    assert inside(allocate(make_net(), RankConfig(), 200)).reassign_at == 27  # a tenth is 20, the first adjustment 27


def test_what_triples_hold_at_the_start_is_not_given_away(make_net):
    assert inside(allocate(make_net(trained=True), pedyra(**SCHEDULE))).reassign_at is None
    assert inside(allocate(make_net(), pedyra(**SCHEDULE))).reassign_at == 10


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adamax])
def test_without_second_moments_nothing_is_dealt_and_a_deal_that_is_asked_for_is_refused(kind, make_net, train_net):
    def allocator(model: Any, **settings: Any) -> RankAllocator:
        optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.1)
        return RankAllocator(model, optimizer, total_steps=100, **pedyra(**settings))

    model = make_net()
    with pytest.raises(ValueError, match=rf"reassignment is 0.1, .*{kind.__name__} keeps none; .*or leave it out"):
        asked = allocator(model, reassignment=0.1)  # refused here, or once the optimizer has stepped
        train_net(model, asked.optimizer, asked, 1)
    other = make_net()
    usual = allocator(other)
    train_net(other, usual.optimizer, usual, 1)
    assert inside(usual).reassign_at is None


def test_a_refused_allocator_leaves_the_adapter_free(make_net):
    model = make_net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    try:
        RankAllocator(model, optimizer, total_steps=100, **pedyra(reassignment=0.1))
    except ValueError:  # while it is handled, as in a notebook
        RankAllocator(model, optimizer, RankConfig(), 100)


def test_moments_of_bitsandbytes_count(make_net):
    allocator = allocate(make_net(), pedyra(**SCHEDULE))
    parameter = allocator.layers[0].a.A
    allocator.optimizer.state[parameter] = {"state1": parameter.clone(), "state2": torch.full_like(parameter, 2.0)}
    assert has_second_moments(allocator.optimizer, [parameter])
    losses = removal_losses(allocator.layers, allocator.optimizer)
    assert losses[allocator.layers[0].name] == pytest.approx(parameter.detach().square().sum(1).tolist())


def test_the_weakest_directions_go_not_the_shortest_rows(make_net, train_net):
    model = make_net()
    allocator = allocate(model, pedyra(**SCHEDULE))
    train_net(model, allocator.optimizer, allocator, 9)
    last = allocator.layers[-1]
    with torch.no_grad():  # two long rows that nearly cancel, and other directions of different lengths
        last.b.weight[:, 1] = -last.b.weight[:, 0] * 1.001
        last.a.A[1] = last.a.A[0]
    products: dict[str, torch.Tensor] = {}
    after_step = allocator.after_step

    def spy() -> Any:
        products.update({layer.name: (layer.b.weight @ layer.a.A).detach() for layer in allocator.layers})
        return after_step()

    allocator.after_step = spy  # type: ignore[method-assign]
    (record,) = train_net(model, allocator.optimizer, allocator, 1, first=10)
    pruned = {name for name, _, _ in record["pruned"]}
    assert pruned, "the test would prove nothing"
    for layer in allocator.layers:
        if layer.name in pruned:
            U, S, Vh = torch.linalg.svd(products[layer.name])
            best = U[:, : layer.rank] * S[: layer.rank] @ Vh[: layer.rank]
            torch.testing.assert_close((layer.b.weight @ layer.a.A).detach(), best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", ["ranks", "parameters"])
def test_a_deal_keeps_the_budget_in_force(budget, make_net, train_net):
    model = make_net()
    allocator = allocate(model, pedyra(**SCHEDULE, budget=budget))
    total, costs = sum(allocator.ranks.values()), {layer.name: layer.cost for layer in allocator.layers}
    train_net(model, allocator.optimizer, allocator, 10)
    left = allocator.initial_parameters - allocator.parameters
    assert allocator.history[-1]["reassigned"]
    if budget == "ranks":
        assert sum(allocator.ranks.values()) == total
    else:
        assert 0 <= left < max(costs.values())


def test_quiet_looks_before_the_deal_do_not_end_the_run(make_net, train_net):
    model = make_net()
    allocator = allocate(model, pedyra(interval=4, final_warmup=4, reassignment=16, patience=2, certainty=4.0))
    train_net(model, allocator.optimizer, allocator, 24)
    assert [record["step"] for record in allocator.history if record["reassigned"]] == [16]


def test_a_run_that_is_made_longer_deals_at_an_adjustment_of_its_own(make_net, train_net):
    model = make_net()
    one = allocate(model, pedyra(**{**SCHEDULE, "reassignment": 0.45, "interval": 0.2}))
    train_net(model, one.optimizer, one, 7)
    state = run_record(one), one.run.tensors()
    one.release()
    longer = RankAllocator(model, one.optimizer, one.config, 100, method=one.method)
    longer.load_state(*state)
    assert (
        inside(one).reassign_at in one.schedule.adjustments
        and inside(longer).reassign_at in longer.schedule.adjustments
    )
    assert inside(longer).reassign_at == 48  # 45 of 100; every 24


def test_a_layer_that_gains_more_than_there_are_directions_gets_others(make_net):
    (layer, *_) = allocate(make_net(trained=True), pedyra(**SCHEDULE)).layers
    u, v = torch.zeros(1, layer.b.out_features), torch.zeros(1, layer.a.in_features)
    u[0, 0] = v[0, 1] = 1.0
    new = triples_along((u, v), layer, (0,), 3, start="lora", generator=torch.Generator().manual_seed(0))
    length = float(layer.a.A.detach()[1:].norm(dim=1).mean())
    torch.testing.assert_close(new.A[0], v[0] * length)
    torch.testing.assert_close(new.A.norm(dim=1), torch.full((3,), length))
    # Orthogonal to each other, and what is not along v to the rows that stay.
    torch.testing.assert_close(new.A @ new.A.T, torch.eye(3) * length**2, atol=1e-5, rtol=0)
    torch.testing.assert_close(new.A[1:] @ layer.a.A.detach()[1:].T, torch.zeros(2, layer.rank - 1), atol=1e-5, rtol=0)
    assert not new.B.any()


def test_a_run_taken_up_again_still_knows_when_it_deals(make_net, train_net):
    first, second = make_net(), make_net()
    one = allocate(first, pedyra(**SCHEDULE))
    train_net(first, one.optimizer, one, 7)
    record, tensors = run_record(one), one.run.tensors()
    # As in a loop of one's own, which loads the weights before it makes the allocator.
    second.load_state_dict(first.state_dict(), strict=False)
    two = allocate(second, pedyra(**SCHEDULE))
    assert inside(two).reassign_at is None
    two.load_state(record, tensors)
    assert inside(two).reassign_at == inside(one).reassign_at == 10


@pytest.mark.parametrize(
    ("shares", "reassigned"),  # what each layer's triples save; all layers have rank 4 and one size
    [
        ((1.95, 0.05), False),  # of two layers one would get 1.95 times its rank: more than (2 + 1) / 2
        ((1.45, 0.55), True),
        ((2.1, 0.5, 0.4), False),  # of three, 2 at most
        ((1.9, 0.6, 0.5), True),
        ((2.6, 0.6, 0.6, 0.6, 0.6), False),  # of many, 2.5
        ((2.4, 0.6, 0.7, 0.7, 0.6), True),
    ],
)
def test_how_much_of_the_budget_one_layer_may_get(shares, reassigned):
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(8, 8) for _ in shares))
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=[str(i) for i in range(len(shares))]))  # type: ignore[arg-type]
    allocator = allocate(model, pedyra(**SCHEDULE))
    for layer, share in zip(allocator.layers, shares, strict=True):
        moment = share / (2 * layer.a.A.detach().square().sum())  # w^2 v / 2, summed
        allocator.optimizer.state[layer.a.A] = {"exp_avg_sq": moment.expand_as(layer.a.A).clone()}
    inside(allocator).sketching.forget()  # a deal asks for none
    _, plan = reassign(allocator.layers, allocator.optimizer, allocator._situation())
    assert bool(plan.added) == reassigned
