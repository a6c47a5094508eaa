"""Turning a layer's triples: the same function, the moments of the turned parameters, and work that is shared shows."""

from __future__ import annotations

from typing import Any

import torch

from pedyra.lora.attach import attach
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.wide import turn_layer


def parts(model: Any) -> tuple[list[AdaptedLayer], torch.optim.Optimizer]:
    layers = attach(model)
    for layer in layers:
        layer.a.e_fixed_at_one = True
    return layers, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def other_directions(layer: AdaptedLayer) -> torch.Tensor:
    return torch.eye(layer.rank) + 0.3 * torch.randn(layer.rank, layer.rank)


def test_turning_keeps_the_function_and_the_parameters(make_net, net_batch):
    model = make_net(trained=True)
    layers, optimizer = parts(model)
    x, _ = net_batch(0)
    before = model(x)
    for layer in layers:
        parameters, W, A = (layer.a.A, layer.b.weight), other_directions(layer), layer.a.A.detach().clone()
        turn_layer(layer, optimizer, W)
        assert (layer.a.A, layer.b.weight) == parameters  # the very Parameters
        torch.testing.assert_close(layer.a.A.detach(), W @ A)
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
    for layer in layers:
        turn_layer(layer, optimizer, other_directions(layer))
    moments = [optimizer.state[p]["exp_avg"] for t in layers for p in (t.a.A, t.b.weight)]
    for moment, gradient in zip(moments, gradients(), strict=True):
        torch.testing.assert_close(moment, gradient, rtol=1e-3, atol=1e-5)
    assert all(bool((s["exp_avg_sq"] >= 0).all()) and float(s["step"]) == 3 for s in optimizer.state.values())


def test_second_moments_turn_as_those_of_uncorrelated_rows(make_net):
    model = make_net(trained=True)
    (layer, *_), optimizer = parts(model)
    optimizer.state[layer.a.A] = {"exp_avg_sq": torch.rand_like(layer.a.A)}
    old = optimizer.state[layer.a.A]["exp_avg_sq"].clone()
    W = other_directions(layer)
    turn_layer(layer, optimizer, W)
    inverse = torch.linalg.inv(W)
    slow = torch.zeros_like(old)
    for i in range(layer.rank):  # Var(sum_j c_j g_j) = sum_j c_j^2 Var(g_j), c = row i of W^-T
        for j in range(layer.rank):
            slow[i] += inverse[j, i] ** 2 * old[j]
    torch.testing.assert_close(optimizer.state[layer.a.A]["exp_avg_sq"], slow, rtol=1e-4, atol=1e-6)


def test_moments_that_overflowed_begin_anew_and_spoil_no_other(make_net):
    layers, optimizer = parts(make_net(trained=True))
    layer = layers[0]
    A, B = layer.a.A, layer.b.weight
    W = other_directions(layer)
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
    turn_layer(layer, optimizer, other_directions(layer))
    for parameter in (layer.a.A, layer.b.weight):
        assert all(value.isfinite().all() for value in optimizer.state[parameter].values())
