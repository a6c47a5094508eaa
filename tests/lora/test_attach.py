"""attach is an identity on any LoRA, detach its inverse; what else the model holds is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from windows import trainable

from pedyra.lora.attach import attach, detach, train_e
from pedyra.lora.layer import adapted_layers

FLAVOURS = {
    "plain": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.3},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_attach_changes_no_bit_of_the_function(flavour, make_net):
    model, x = make_net(trained=flavour not in ("pissa", "olora"), **FLAVOURS[flavour]).eval(), torch.randn(4, 8)
    before = model(x)
    attach(model)
    assert same_bits(model(x), before)


def test_attach_changes_no_bit_of_a_transformers_logits(make_bert, make_llama, tokens):
    for model in (make_bert().eval(), make_llama().eval()):
        before = model(**tokens).logits
        layers = attach(model)
        assert len(layers) in (10, 14)
        assert same_bits(model(**tokens).logits, before)


@pytest.mark.parametrize("flavour", ["plain", "dora", "pissa", "rslora"])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_the_first_update_of_a_and_b_is_bit_equal_to_plain_lora(flavour, optimizer, make_net, net_batch):
    x, y = net_batch(0)
    updated = []
    for adapted in (False, True):
        model = make_net(**FLAVOURS[flavour])
        if adapted:
            attach(model)
        steps = getattr(torch.optim, optimizer)(trainable(model), lr=0.01)
        (model(x) - y).square().mean().backward()
        steps.step()
        slots = [(m.lora_A["default"], m.lora_B["default"]) for m in lora_modules(model)]
        updated.append([(a.A if adapted else a.weight, b.weight) for a, b in slots])
    for plain, ours in zip(*updated, strict=True):
        assert same_bits(plain[0], ours[0]) and same_bits(plain[1], ours[1])


def lora_modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def test_attach_twice_is_attach_once(make_net):
    model = make_net(trained=True)
    first = [(layer.a, layer.b) for layer in attach(model)]
    config = copy.deepcopy(model.peft_config["default"].to_dict())
    assert [(layer.a, layer.b) for layer in attach(model, start="svd")] == first
    assert model.peft_config["default"].to_dict() == config


def test_detach_is_the_exact_inverse(make_net):
    model = make_net(trained=True).eval()
    state, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(4, 8)
    before, modules = model(x), [(name, type(module), module.training) for name, module in model.named_modules()]
    attach(model)
    detach(model)
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
    after = model.state_dict()
    assert list(after) == list(state) and all(same_bits(after[k], state[k]) for k in state)
    assert same_bits(model(x), before)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_detach_without_attach_is_refused(make_net):
    with pytest.raises(ValueError, match="no triples are attached to adapter 'default'"):
        detach(make_net())


def test_the_users_config_object_is_never_written_to(make_net, set_ranks):
    config = LoraConfig(r=4, target_modules=["0", "1", "2"], rank_pattern={"1": 2}, use_rslora=True)
    model = get_peft_model(make_net().unload(), config)
    before = copy.deepcopy(config.to_dict())
    set_ranks(model, [1, 2, 3])
    assert config.to_dict() == before and config.rank_pattern == {"1": 2} and config.use_rslora
    assert model.peft_config["default"] is not config


def test_layers_come_in_the_models_order_under_their_base_names(make_net, make_llama):
    assert [layer.name for layer in attach(make_net())] == ["layers.0", "layers.1", "layers.2"]
    names = [layer.name for layer in attach(make_llama())]
    assert names[0] == "model.layers.0.self_attn.q_proj" and names[-1] == "model.layers.1.mlp.down_proj"


def test_the_parameters_of_a_triple_are_what_the_optimizer_holds(make_net):
    model = make_net()
    layers = attach(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sum(layer.rank * layer.direction_parameters for layer in layers) == 4 * (21 + 19 + 13)


def test_only_the_named_adapter_is_touched(make_net):
    model, x = make_net(trained=True).eval(), torch.randn(4, 8)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "2"]))
    other = {name: p for name, p in model.named_parameters() if ".other." in name}
    default_logits = model(x)
    attach(model, "other")
    assert [layer.name for layer in adapted_layers(model, "other")] == ["layers.0", "layers.2"]
    assert adapted_layers(model) == []
    assert all(type(m.lora_A["default"]) is nn.Linear for m in lora_modules(model))
    assert same_bits(model(x), default_logits)
    assert {id(p) for p in other.values()} <= {id(p) for p in model.parameters()}
    model.set_adapter("other")
    layer = adapted_layers(model, "other")[0]
    assert layer.a.A.requires_grad and layer.a.E.requires_grad and layer.b.weight.requires_grad
    model.set_adapter("default")
    assert not layer.a.E.requires_grad


@pytest.mark.parametrize("flavour", ["plain", "rslora"])
def test_the_scaling_is_constant_at_every_rank_also_by_pefts_own_arithmetic(flavour, make_net, set_ranks):
    model = make_net(lora_alpha=6, **FLAVOURS[flavour])
    before = [m.scaling["default"] for m in lora_modules(model)]
    set_ranks(model, [1, 7, 0])
    assert [m.scaling["default"] for m in lora_modules(model)] == before
    for module, scaling in zip(lora_modules(model), before, strict=True):
        module.set_scale("default", 1.0)  # PEFT recomputes it from alpha and r
        assert module.scaling["default"] == pytest.approx(scaling)
        module.unscale_layer()
        assert module.scaling["default"] == pytest.approx(scaling)


def test_the_svd_start_is_adaloras(make_net):
    model, x = make_net(r=4).eval(), torch.randn(4, 8)
    layers = attach(model, start="svd", seed=3)
    for layer in layers:
        assert torch.count_nonzero(layer.a.E) == 0
        assert 0.01 < float(layer.a.A.detach().std()) < 0.03 and 0.01 < float(layer.b.weight.detach().std()) < 0.03
    with model.disable_adapter():
        base = model(x)
    assert same_bits(model(x), base)
    again = attach(make_net(r=4), start="svd", seed=3)
    other = attach(make_net(r=4), start="svd", seed=4)
    assert same_bits(layers[0].a.A, again[0].a.A) and not same_bits(layers[0].a.A, other[0].a.A)


def test_the_svd_start_of_an_update_is_its_singular_triples(make_net):
    model, x = make_net(init_lora_weights="pissa").eval(), torch.randn(4, 8)
    before = model(x)
    for layer in attach(model, start="svd"):
        assert torch.allclose(layer.a.A @ layer.a.A.T, torch.eye(4), atol=1e-5)
        assert torch.allclose(layer.b.weight.T @ layer.b.weight, torch.eye(4), atol=1e-5)
        assert bool((layer.a.E[:-1] >= layer.a.E[1:]).all())
    assert torch.allclose(model(x), before, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_a_plan_without_numbers_takes_the_starts_that_a_run_takes(make_net, init, device):
    assert attach(make_net(init_lora_weights=init).to(device), start="svd")


def test_the_svd_start_does_not_discard_a_special_start(make_net):
    model = make_net(init_lora_weights="orthogonal")
    nn.init.zeros_(lora_modules(model)[1].lora_B["default"].weight)
    with pytest.raises(ValueError, match="discard the adapter's 'orthogonal' start; use start='lora'"):
        attach(model, start="svd")
    assert adapted_layers(model) == []


def test_an_adapter_of_one_rank_needs_no_patterns_until_ranks_differ(make_net, set_ranks, tmp_path):
    model, x = make_net(trained=True, r=4, lora_alpha=12, rank_pattern={"layers.1": 4}), torch.randn(3, 8)
    set_ranks(model, [2])
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (2, 6, {}, {})  # s stays 3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_net().unload(), tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    set_ranks(model, [2, 3, 2])
    assert config.rank_pattern == {"layers.0": 2, "layers.1": 3, "layers.2": 2}
    assert config.alpha_pattern == {"layers.0": 6, "layers.1": 9, "layers.2": 6}


def test_what_is_written_into_the_weights_is_what_runs(make_net):
    """Averages of weights, and hot-swapping, write into `lora_A.weight` and into the tensors of a state dict."""
    model, other, x = make_net(trained=True), make_net(trained=True), torch.randn(4, 8)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    expected = other(x)
    train_e(attach(model), False)
    for value, wanted in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        value.copy_(wanted)
    assert same_bits(model(x), expected)


def test_the_svd_start_of_a_layer_narrower_than_its_rank_keeps_the_function(make_net):
    model, x = make_net(r=9, trained=True).eval(), torch.randn(4, 8)  # layers of 8, 6 and 6 singular values
    before = model(x)
    for layer, count in zip(attach(model, start="svd"), (8, 6, 6), strict=True):
        assert torch.count_nonzero(layer.a.E[:count]) == count and torch.count_nonzero(layer.a.E[count:]) == 0
        assert bool(layer.a.A[count:].any()) and bool(layer.b.weight[:, count:].any())  # can learn
    assert torch.allclose(model(x), before, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_e_that_is_trained_no_longer_is_folded_into_a(value, make_net):
    """A method with E = 1 takes over what one with a trained E has left, or has only begun."""
    model, x = make_net(r=2), torch.randn(4, 8)
    layers = attach(model, start="svd")
    with torch.no_grad():
        for layer in layers:
            layer.a.E.fill_(value)
    before = model(x)
    train_e(layers, False)
    assert torch.allclose(model(x), before, atol=1e-6)
    assert all(layer.a.e_fixed_at_one and bool((layer.a.E == 1).all()) for layer in layers)
    model(x).square().mean().backward()
    assert all(layer.a.A.grad is not None and bool(layer.a.A.grad.any()) for layer in layers)


def test_triples_with_e_at_one_are_no_start_for_a_trained_e(make_net):
    model = make_net()
    train_e(attach(model), False)
    with pytest.raises(ValueError, match=r"holds triples with E = 1 already.*pedyra.detach"):
        attach(model, start="svd")
