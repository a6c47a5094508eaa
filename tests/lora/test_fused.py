"""The fused forward: the function, gradients and dtypes of PEFT's own, and PEFT's own wherever that cannot be."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from closeness import same_bits
from fused_pairs import (
    assert_as_near,
    assert_same,
    clear,
    in_float32,
    outcome,
    pair,
)
from peft.tuners.lora import Linear
from torch import Tensor, nn

from pedyra.lora import fused as fused_module
from pedyra.lora.attach import attach, detach
from pedyra.lora.fused import FusedLinear, fuse, unfuse
from pedyra.lora.layer import adapted_layers

pytestmark = pytest.mark.usefixtures("fuse_small_layers_too")


# Net has layers of up to 12 features: 2 tokens are too few to add the triples to the weight, 40 are enough.
@pytest.mark.parametrize(("shape", "function"), [((2, 8), "AddedToOutput"), ((8, 5, 8), "AddedToWeight")])
def test_output_and_gradients_are_those_of_pefts_forward(shape, function, make_net, calls):
    plain, fused = pair(make_net, trained=True)
    x = torch.randn(shape)
    assert_same(outcome(fused, x), outcome(plain, x))
    assert calls == [function] * 3


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize(
    "grads", [("A",), ("E",), ("B",), ("A", "E", "B")], ids=lambda grads: "".join(grads) + " trained"
)
def test_every_set_of_trained_factors_gets_its_gradients(tokens, grads, make_net):
    plain, fused = pair(make_net, trained=True)
    for model in (plain, fused):
        for layer in adapted_layers(model):
            for name, parameter in (("A", layer.a.A), ("E", layer.a.E), ("B", layer.b.weight)):
                parameter.requires_grad_(name in grads)
    x = torch.randn(tokens, 8)
    assert_same(outcome(fused, x), outcome(plain, x))


@pytest.mark.parametrize("tokens", [2, 40])
def test_a_layer_may_have_rank_0(tokens, make_net):
    plain, fused = pair(make_net)
    for model in (plain, fused):
        layer = adapted_layers(model)[1]
        layer.a.A, layer.a.E = nn.Parameter(layer.a.A[:0]), nn.Parameter(layer.a.E[:0])
        layer.b.weight = nn.Parameter(layer.b.weight[:, :0])
    x = torch.randn(tokens, 8)
    with torch.no_grad():
        assert torch.allclose(fused(x), plain(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens", [2, 40])
def test_under_autocast_types_and_values_are_pefts(tokens, make_net, calls):
    plain, fused = pair(make_net, trained=True)
    x = torch.randn(tokens, 8)
    exact = outcome(plain, x)
    clear(plain)
    autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    assert_as_near(outcome(fused, x, autocast()), outcome(plain, x, autocast()), exact=exact)
    assert calls == ["AddedToOutput"] * 3  # a small update would vanish in the rounding of a bfloat16 weight


def test_half_precision_throughout(make_net, calls):
    plain, fused = pair(make_net, trained=True, dtype=torch.bfloat16)
    x = torch.randn(40, 8, dtype=torch.bfloat16)
    assert_as_near(outcome(fused, x), outcome(plain, x), exact=in_float32(plain, x))
    assert calls == ["AddedToOutput"] * 3


def test_a_half_precision_base_with_float32_triples(make_net, calls):
    plain, fused = pair(make_net, trained=True, dtype=torch.bfloat16)
    for model in (plain, fused):
        for layer in adapted_layers(model):
            layer.module.lora_A.float()
            layer.module.lora_B.float()
    x = torch.randn(40, 8, dtype=torch.bfloat16)
    assert_as_near(outcome(fused, x), outcome(plain, x), exact=in_float32(plain, x))
    assert calls == ["AddedToOutput"] * 3


def test_shortened_float32_products_never_see_the_summed_weight(make_net, calls):
    _, fused = pair(make_net)
    torch.set_float32_matmul_precision("high")
    try:
        fused(torch.randn(40, 8))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert calls == ["AddedToOutput"] * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, make_llama, tokens):
    results = []
    for checkpointing in (False, True):
        _, model = pair(make_llama, init_lora_weights=False)
        model.train().enable_input_require_grads()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
        model(**tokens, labels=tokens["input_ids"]).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(results[1], results[0])


def test_disabled_and_merged_adapters_are_pefts_business(make_net, calls):
    plain, fused = pair(make_net, trained=True)
    x = torch.randn(40, 8)
    with plain.disable_adapter(), fused.disable_adapter():
        assert same_bits(plain(x), fused(x))
    expected = plain(x)
    fused.merge_adapter()
    assert torch.allclose(fused(x), expected, rtol=0, atol=1e-5)
    assert calls == []
    fused.unmerge_adapter()
    assert torch.allclose(fused(x), expected, rtol=0, atol=1e-5)
    assert len(calls) == 3


def test_two_active_adapters_and_mixed_batches_fall_back(make_net, calls):
    from peft import LoraConfig

    plain, fused = pair(make_net, trained=True)
    for model in (plain, fused):
        torch.manual_seed(4)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["0", "1", "2"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    x = torch.randn(4, 8)
    assert same_bits(plain(x), fused(x))
    for model in (plain, fused):
        model.set_adapter("default")
        model.eval()
    names = ["default", "second", "__base__", "default"]
    assert same_bits(plain(x, adapter_names=names), fused(x, adapter_names=names))
    assert calls == []


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}, {"bias": "all"}], ids=lambda s: [*s][0]
)
def test_what_is_not_plain_falls_back(settings, make_net, calls):
    plain, fused = pair(make_net, trained=True, **settings)
    results = []
    for model in (plain, fused):
        torch.manual_seed(9)
        results.append(outcome(model, torch.ones(40, 8)))
    assert_same(*results, tolerance=0)
    assert calls == []


def test_dropout_does_not_matter_in_evaluation(make_net, calls):
    plain, fused = pair(make_net, trained=True, lora_dropout=0.1)
    x = torch.randn(40, 8)
    assert torch.allclose(fused.eval()(x), plain.eval()(x), rtol=0, atol=1e-6)
    assert len(calls) == 3


@pytest.mark.parametrize("slot", ["base_layer", "lora_A", "lora_B"])
def test_a_hook_on_a_part_is_still_called(slot, make_net):
    _, fused = pair(make_net)
    module = adapted_layers(fused)[0].module
    part = module.base_layer if slot == "base_layer" else getattr(module, slot)["default"]
    called = []
    part.register_forward_hook(lambda *args: called.append(True))
    fused(torch.randn(40, 8))
    assert called


def test_only_the_class_of_the_instance_changes_and_detach_gives_it_back(make_net):
    _, fused = pair(make_net, trained=True)
    modules = [layer.module for layer in adapted_layers(fused)]
    assert all(type(module) is FusedLinear for module in modules)
    x = torch.randn(40, 8)
    expected = fused(x)
    clone = copy.deepcopy(fused)
    assert same_bits(clone(x), expected)
    assert all(type(layer.module) is FusedLinear for layer in adapted_layers(clone))
    assert type(pickle.loads(pickle.dumps(modules[0]))) is FusedLinear
    detach(fused)
    assert all(type(module) is Linear for module in modules)
    assert torch.allclose(fused(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 2, 40])
def test_layers_too_small_for_a_function_are_composed_of_autograds_own(tokens, dtype, monkeypatch, make_net, calls):
    monkeypatch.setattr(fused_module, "_LEAST_ELEMENTS", (2**30, 2**30))
    plain, fused = pair(make_net, trained=True, dtype=dtype)
    x = torch.randn(tokens, 8, dtype=dtype)
    if dtype == torch.bfloat16 and tokens:
        assert_as_near(outcome(fused, x), outcome(plain, x), exact=in_float32(plain, x))
    elif tokens:
        assert_same(outcome(fused, x), outcome(plain, x))
    else:
        assert same_bits(fused(x), plain(x))
    assert calls == []
    assert torch.allclose(fused(x[None]), plain(x[None]), atol=0.1) and fused(x[None]).shape == (1, tokens, 6)


def test_small_layers_of_mixed_types_are_not_composed(monkeypatch, make_net, calls):
    monkeypatch.setattr(fused_module, "_LEAST_ELEMENTS", (2**30, 2**30))
    plain, fused = pair(make_net, trained=True)
    x = torch.randn(40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        fused(x)
    assert len(calls) == 3


def test_fuse_says_whether_it_can_help(make_net):
    plain, dora = make_net(), make_net(use_dora=True)
    assert all([fuse(layer.module) for layer in attach(plain)])
    assert not any([fuse(layer.module) for layer in attach(dora)])
    assert not fuse(nn.Linear(2, 2))
    unfuse(nn.Linear(2, 2))


def test_saves_no_activation_but_the_input(make_net):
    _, fused = pair(make_net, trained=True)
    module = adapted_layers(fused)[0].module
    x = torch.randn(40, 8)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        module(x)
    parameters = {p.data_ptr() for p in module.parameters()}
    assert {t.data_ptr() for t in saved} - parameters == {x.data_ptr()}
