"""SoRA: the gates' arithmetic by hand, their steps in any loop, and the cut to the gates that are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pedyra import adapt
from pedyra.methods.sora import (
    Gates,
    Sora,
    add_gate_steps,
    gated,
    gates_of,
    soft_threshold,
)

XI = 0.25  # exact in binary, as are the gates below


@pytest.mark.parametrize(
    ("gate", "soft"),
    [
        (1.0, 0.75),
        (-1.0, -0.75),
        (0.5, 0.25),
        (0.375, 0.125),  # in (xi, 2 xi): dead in the authors' code
        (-0.375, -0.125),
        (0.125, 0.0),
        (0.0, 0.0),
    ],
)
def test_shrinkage_by_hand(gate: float, soft: float):
    value = torch.tensor([gate])
    assert soft_threshold(value, XI).item() == soft


def test_the_update_by_slow_loops(make_net):
    layers: list[Any] = gated(make_net(trained=True, r=4, lora_alpha=8))
    for layer in layers:
        A, B, g = layer.a.A, layer.b.weight, layer.a.gate.flatten()
        delta = 8 / 4 * torch.stack([g[i] * torch.outer(B[:, i], A[i]) for i in range(4)]).sum(0)
        torch.testing.assert_close(layer.module.get_delta_weight("default"), delta)


def test_one_step_by_hand(make_net, net_batch):
    model, (x, y) = make_net(trained=True), net_batch(1)
    gates: list[Any] = gates_of(gated(model))
    # Plain gradient descent: g - 0.1 (dL/dg + lambda sign(g) / 12), then xi off.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    add_gate_steps(optimizer, gates, Sora(threshold=0.01, l1=0.6))
    (model(x) - y).square().mean().backward()
    expected = []
    for gate in gates:
        moved = gate.detach() - 0.1 * (gate.grad + 0.6 / 12 * gate.detach().sign())
        expected.append(moved.sign() * torch.relu(moved.abs() - 0.01))
    optimizer.step()
    for gate, value in zip(gates, expected, strict=True):
        torch.testing.assert_close(gate.detach(), value)


def test_a_zero_gate_can_open_again(make_net, net_batch):
    model, (x, y) = make_net(trained=True), net_batch(1)
    gates = gates_of(gated(model))
    torch.nn.init.zeros_(gates[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    add_gate_steps(optimizer, gates, Sora(threshold=3e-4, l1=10.0))
    (model(x) - y).square().mean().backward()
    optimizer.step()
    assert gates[0].any()


def test_gates_have_a_group_of_their_own_without_weight_decay(prepare):
    run = prepare("sora", training={"weight_decay": 0.1})
    groups = run.trainer.create_optimizer().param_groups
    gates = [p for name, p in run.model.named_parameters() if name.endswith("gate")]
    assert [id(p) for p in groups[-1]["params"]] == [id(p) for p in gates] and groups[-1]["weight_decay"] == 0
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert sum(p.numel() for p in grouped) == run.model.get_nb_trainable_parameters()[0]
    assert {group["weight_decay"] for group in groups[:-1]} == {0.1, 0.0}


def test_the_cut_leaves_out_zero_gates_and_nothing_else(make_net, net_batch):
    model, (x, _) = make_net(trained=True).eval(), net_batch(1)
    work = Gates(model, "default", Sora())
    gates = gates_of(work.layers)
    with torch.no_grad():
        gates[0][1] = 0
        gates[1].zero_()
        expected = model(x)
    work.end()
    torch.testing.assert_close(model(x), expected)
    kept = {name: tuple(p.shape) for name, p in model.named_parameters() if "lora_A" in name}
    assert list(kept.values()) == [(3, 8), (1, 12), (4, 6)]  # rank 0 is one zero row


def test_scaled_losses_are_refused(prepare):
    trainer = prepare("lora").trainer
    trainer.args.fp16 = True
    with pytest.raises(ValueError, match="the training has fp16=True, but SoRA's gates are shrunk .* use bf16"):
        adapt(trainer, Sora())
