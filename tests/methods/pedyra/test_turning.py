"""Turning a layer's triples: the same function, the moments of the turned parameters, and work that is shared shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pedyra.allocate import batching
from pedyra.lora.attach import attach
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.pedyra.turning import lengths, turn_layer, turns_of


def parts(model: Any) -> tuple[list[AdaptedLayer], torch.optim.Optimizer]:
    layers = attach(model)
    for layer in layers:
        layer.a.e_fixed_at_one = True
    return layers, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def rows(layers: list[AdaptedLayer], less: int = 0) -> dict[str, int]:
    return {layer.name: layer.rank - less for layer in layers}


def test_turning_keeps_the_function_and_leaves_new_triples_alone(make_net, net_batch):
    model = make_net(trained=True)
    layers, optimizer = parts(model)
    x, _ = net_batch(0)
    before = model(x)
    turns = turns_of(layers, rows(layers, 1))
    for layer in layers:
        last = layer.a.A[-1].clone(), layer.b.weight[:, -1].clone()
        parameters = layer.a.A, layer.b.weight
        turn_layer(layer, optimizer, turns[layer.name].W)
        assert (layer.a.A, layer.b.weight) == parameters  # the very Parameters
        assert torch.equal(layer.a.A[-1], last[0]) and torch.equal(layer.b.weight[:, -1], last[1])
        A, B = layer.a.A[:-1].detach(), layer.b.weight[:, :-1].detach()
        lengths = torch.linalg.svdvals(B @ A)[: len(A)]
        torch.testing.assert_close(A.norm(dim=1) * B.norm(dim=0), lengths, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_first_moments_turn_as_gradients_do(make_net, net_batch):
    """With a gradient as the moment: after the turn it is the gradient of the turned parameters."""
    model = make_net(trained=True)
    layers, optimizer = parts(model)
    x, y = net_batch(0)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        return [p.grad.clone() for layer in layers for p in (layer.a.A, layer.b.weight) if p.grad is not None]

    for parameter, gradient in zip((p for t in layers for p in (t.a.A, t.b.weight)), gradients(), strict=True):
        optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": gradient, "exp_avg_sq": gradient.square()}
    for name, turn in turns_of(layers, rows(layers)).items():
        turn_layer(next(layer for layer in layers if layer.name == name), optimizer, turn.W)
    moments = [optimizer.state[p]["exp_avg"] for t in layers for p in (t.a.A, t.b.weight)]
    for moment, gradient in zip(moments, gradients(), strict=True):
        torch.testing.assert_close(moment, gradient, rtol=1e-3, atol=1e-5)
    assert all(bool((s["exp_avg_sq"] >= 0).all()) and float(s["step"]) == 3 for s in optimizer.state.values())


def test_second_moments_turn_as_those_of_uncorrelated_rows(make_net):
    model = make_net(trained=True)
    (layer, *_), optimizer = parts(model)
    optimizer.state[layer.a.A] = {"exp_avg_sq": torch.rand_like(layer.a.A)}
    old = optimizer.state[layer.a.A]["exp_avg_sq"].clone()
    turn = turns_of([layer], rows([layer]))[layer.name]
    turn_layer(layer, optimizer, turn.W)
    assert turn.W is not None
    inverse = torch.linalg.inv(turn.W)
    slow = torch.zeros_like(old)
    for i in range(layer.rank):  # Var(sum_j c_j g_j) = sum_j c_j^2 Var(g_j), c = row i of W^-T
        for j in range(layer.rank):
            slow[i] += inverse[j, i] ** 2 * old[j]
    torch.testing.assert_close(optimizer.state[layer.a.A]["exp_avg_sq"], slow, rtol=1e-4, atol=1e-6)


def test_layers_are_turned_together_as_each_by_itself(monkeypatch):
    torch.manual_seed(3)
    shapes = (
        (6, 5),
        (5, 6),
        (6, 5),
        (6, 5),
        (6, 5),
    )  # four of one shape, not side by side, of other values and scaling
    base = nn.ModuleList(nn.Linear(*shape) for shape in shapes)
    targets = [str(index) for index in range(len(shapes))]
    config = LoraConfig(r=3, lora_alpha=6, alpha_pattern={"2": 9, "3": 12}, target_modules=targets)
    layers, _ = parts(get_peft_model(base, config))  # type: ignore[arg-type]
    with torch.no_grad():
        for layer in layers:
            layer.b.weight.normal_()
        layers[2].a.A[1] = 0  # not usable, among others of its shape
    old = {layer.name: layer.rank - (layer.name == "3") for layer in layers}  # and one of them has a new triple
    together = turns_of(layers, old)
    assert list(together) == list(old) and sum(turn.W is None for turn in together.values()) == 1
    for layer in layers:
        alone = turns_of([layer], old)[layer.name]
        assert (alone.W is None) == (together[layer.name].W is None)
        if alone.W is not None:
            torch.testing.assert_close(together[layer.name].W, alone.W)
        assert together[layer.name].lengths == pytest.approx(alone.lengths)
        by_hand = [layer.scaling * torch.outer(b, a).norm().item()
                   for a, b in zip(layer.a.A.detach(), layer.b.weight.detach().T, strict=True)]  # fmt: skip
        assert lengths(layers)[layers.index(layer)].tolist() == pytest.approx(by_hand)
        if alone.W is None:  # not turned: its triples are as they were
            assert alone.lengths == pytest.approx(by_hand)
    whole = lengths(layers)
    monkeypatch.setattr(batching, "PIECE", 1)  # every layer is a piece of its own
    assert all(torch.equal(one, other) for one, other in zip(lengths(layers), whole, strict=True))


def test_a_layer_whose_rows_depend_on_each_other_stays_as_it_is(make_net):
    model = make_net(trained=True)
    (layer, *_), optimizer = parts(model)
    with torch.no_grad():
        layer.a.A[1] = 0
    before = layer.a.A.clone()
    turn = turns_of([layer], rows([layer]))[layer.name]
    assert turn.W is None
    turn_layer(layer, optimizer, turn.W)
    assert torch.equal(layer.a.A, before)


def test_the_largest_gradients_of_adamax_become_the_largest_they_can_be(make_net):
    layers, _ = parts(make_net(trained=True))
    layer = layers[0]
    optimizer = torch.optim.Adamax([layer.a.A, layer.b.weight])
    optimizer.state[layer.a.A]["exp_inf"] = torch.full_like(layer.a.A, 0.5)
    optimizer.state[layer.b.weight]["exp_inf"] = torch.full_like(layer.b.weight, 0.5)
    turn_layer(layer, optimizer, 2 * torch.eye(4)[[1, 0, 2, 3]] - 4 * torch.eye(4)[[3, 3, 3, 3]])
    # A gradient of B turns with A: |2| + |-4| of the sizes of two triples, |2 - 4| where they are one.
    assert optimizer.state[layer.b.weight]["exp_inf"][0].tolist() == pytest.approx([3.0, 3.0, 3.0, 1.0])


def test_moments_that_overflowed_begin_anew_and_spoil_no_other(make_net):
    layers, optimizer = parts(make_net(trained=True))
    layer = layers[0]
    A, B = layer.a.A, layer.b.weight
    W = turns_of([layer], rows([layer]))[layer.name].W
    assert W is not None
    for parameter in (A, B):
        average, squares = torch.randn_like(parameter), torch.rand_like(parameter)
        optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": average, "exp_avg_sq": squares}
    mix = torch.linalg.inv(W).T  # gradients of A turn against A
    expected = mix @ optimizer.state[A]["exp_avg"], mix.square() @ optimizer.state[A]["exp_avg_sq"]
    whole = optimizer.state[A]["exp_avg_sq"].clone()
    optimizer.state[A]["exp_avg"][2, 5] = 1e29  # as after one gradient of 1e30
    optimizer.state[A]["exp_avg_sq"][2, 5] = torch.inf
    optimizer.state[B]["exp_avg_sq"][:] = torch.inf
    weights = (B @ A).detach()
    turn_layer(layer, optimizer, W)
    ours = optimizer.state[A]
    others = [column for column in range(A.shape[1]) if column != 5]
    torch.testing.assert_close(ours["exp_avg"][:, others], expected[0][:, others])
    torch.testing.assert_close(ours["exp_avg_sq"][:, others], expected[1][:, others])
    known = torch.ones_like(whole, dtype=torch.bool)
    known[2, 5] = False
    whole[2, 5] = whole[known].mean()
    torch.testing.assert_close(ours["exp_avg_sq"], mix.square() @ whole)
    assert ours["exp_avg"].isfinite().all() and not optimizer.state[B]["exp_avg"].any()
    assert not optimizer.state[B]["exp_avg_sq"].any()
    torch.testing.assert_close((layer.b.weight @ layer.a.A).detach(), weights)


def test_the_largest_finite_moments_do_not_overflow_when_they_turn(make_net):
    layers, optimizer = parts(make_net(trained=True))
    layer = layers[0]
    for parameter in (layer.a.A, layer.b.weight):
        largest = torch.full_like(parameter, 3e38)
        optimizer.state[parameter] = {"exp_avg": largest * torch.randn_like(largest).sign(), "exp_avg_sq": largest}
    turn_layer(layer, optimizer, turns_of([layer], rows([layer]))[layer.name].W)
    for parameter in (layer.a.A, layer.b.weight):
        assert all(value.isfinite().all() for value in optimizer.state[parameter].values())
