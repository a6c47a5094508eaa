"""Probes and triples on trial in the fused forward: the gradients and energies that PEFT's own forward gives."""

from __future__ import annotations

import pytest
import torch
from fused_pairs import (
    assert_as_near,
    assert_same,
    energies,
    in_float32,
    outcome,
    pair,
    sketch,
    trained,
)
from torch import Tensor, nn

from pedyra.lora import fused as fused_module
from pedyra.lora.layer import adapted_layers

pytestmark = pytest.mark.usefixtures("fuse_small_layers_too")

PROBES = [("P", ()), ("Q", ()), ("P", (0, 2))]


@pytest.mark.parametrize(("fixed", "off"), PROBES)
@pytest.mark.parametrize(("tokens", "function"), [(2, "AddedToOutput"), (40, "AddedToWeight")])
def test_probes_and_triples_on_trial(tokens, function, fixed, off, make_net, calls):
    plain, fused = pair(make_net, trained=True)
    sketch(plain, fixed, off)
    sketch(fused, fixed, off)
    x = torch.randn(tokens, 8)
    assert_same(outcome(fused, x), outcome(plain, x))
    assert calls == [function] * 3


@pytest.mark.parametrize(("fixed", "off"), PROBES)
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("grads", [(), ("A",), ("B",)], ids=lambda grads: "".join(grads) + " trained")
def test_probes_get_their_gradients_whatever_is_trained(tokens, grads, fixed, off, make_net):
    plain, fused = pair(make_net, trained=True)
    for model in (plain, fused):
        sketch(model, fixed, off)
        for layer in adapted_layers(model):
            for name, parameter in (("A", layer.a.A), ("E", layer.a.E), ("B", layer.b.weight)):
                parameter.requires_grad_(name in grads)
    x = torch.randn(tokens, 8)
    assert_same(outcome(fused, x), outcome(plain, x))


@pytest.mark.parametrize("fixed", ["P", "Q"])
@pytest.mark.parametrize("tokens", [2, 40])
def test_a_layer_of_rank_0_is_probed(tokens, fixed, make_net, calls):
    plain, fused = pair(make_net, trained=True)
    for model in (plain, fused):
        layer = adapted_layers(model)[1]
        layer.a.A, layer.a.E = nn.Parameter(layer.a.A[:0]), nn.Parameter(layer.a.E[:0])
        layer.b.weight = nn.Parameter(layer.b.weight[:, :0])
        sketch(model, fixed)
        model(torch.ones(tokens, 8)).square().sum().backward()
    torch.testing.assert_close(energies(fused), energies(plain))
    for one, other in zip(trained(fused).values(), trained(plain).values(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert len(calls) == 3


@pytest.mark.parametrize(("fixed", "off"), PROBES)
@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "bfloat16 base", "small"])
def test_probes_in_half_precision_and_in_small_layers(kind, fixed, off, monkeypatch, make_net, calls):
    if kind == "small":
        monkeypatch.setattr(fused_module, "_LEAST_ELEMENTS", (2**30, 2**30))
    plain, fused = pair(make_net, trained=True, dtype=torch.bfloat16 if "bfloat16" in kind else torch.float32)
    x = torch.randn(40, 8, dtype=torch.bfloat16 if "bfloat16" in kind else torch.float32)
    outcomes = []
    for model in (fused, plain):
        sketch(model, fixed, off)
        if kind == "bfloat16 base":
            for layer in adapted_layers(model):
                layer.module.lora_A.float()
                layer.module.lora_B.float()
        outcomes.append(outcome(model, x, torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else None))
    if kind == "small":
        assert_same(*outcomes)
    else:
        assert_as_near(*outcomes, exact=in_float32(plain, x))
    assert calls == ([] if kind == "small" else ["AddedToOutput"] * 3)


@pytest.mark.parametrize("tokens", [2, 40])
def test_gradients_of_probes_add_up_over_micro_batches(tokens, make_net):
    plain, fused = pair(make_net, trained=True)
    xs = torch.randn(3, tokens, 8)
    for model in (plain, fused):
        sketch(model, "P", (1,))
        for x in xs:
            outcome(model, x)
    gradients = [{name: tensor.grad for name, tensor in trained(model).items()} for model in (fused, plain)]
    assert_same(gradients[0], gradients[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fixed", ["P", "Q"])
def test_probes_under_gradient_checkpointing(reentrant, fixed, make_llama, tokens):
    gradients = []
    for model in pair(make_llama, init_lora_weights=False):
        model.train().enable_input_require_grads()
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": reentrant})
        sketch(model, fixed)
        model(**tokens, labels=tokens["input_ids"]).loss.backward()
        gradients.append({name: tensor.grad for name, tensor in trained(model).items()} | energies(model))
    assert_same(gradients[1], gradients[0], tolerance=1e-4)


def test_probes_that_are_no_sketchs_fall_back(make_net, calls):
    plain, fused = pair(make_net, trained=True)
    for model in (plain, fused):
        for layer in adapted_layers(model):  # both take gradients, and neither is zero: the term is not
            layer.a.probe = torch.ones(2, layer.a.in_features, requires_grad=True)
            layer.b.probe = torch.ones(layer.b.out_features, 2, requires_grad=True)
    x = torch.randn(40, 8)
    assert_same(outcome(fused, x), outcome(plain, x), tolerance=0)
    assert calls == []


@pytest.mark.parametrize("fixed", ["P", "Q"])
def test_a_sketch_saves_the_fixed_probe_and_no_activation(fixed, make_net):
    _, fused = pair(make_net, trained=True)
    sketch(fused, fixed, (1,))
    layer = adapted_layers(fused)[0]
    x = torch.randn(40, 8)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer.module(x)
    probes = {
        tensor.data_ptr()
        for tensor in (layer.a.probe, layer.b.probe)
        if tensor is not None and not tensor.requires_grad
    }
    known = {x.data_ptr(), *probes, *(p.data_ptr() for p in layer.module.parameters())}
    others = [t for t in saved if t.data_ptr() not in known]
    assert probes <= {t.data_ptr() for t in saved}
    assert all(len(t) == layer.rank for t in others)  # kept_directions, and what it leaves of A
