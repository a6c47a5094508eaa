"""Starts that take from the weight (PiSSA, OLoRA): what pruning removes is what training added."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from windows import trainable

from pedyra import PeDyra, RankAllocator
from pedyra.allocate.checkpoint import SideFileError, restore, save_state
from pedyra.lora.attach import attach, detach, write_ranks
from pedyra.lora.layer import adapted_layers, peft_layers
from pedyra.lora.replacement import NewTriples, put_replacements, replacements_of

STARTS = ("pissa", "pissa_niter_4", "OLoRA")  # PEFT takes the last in any case of letters


def prune(model: Any, *pruned: int, new: int = 0) -> None:
    """Prune these triples of each layer, and append `new` ones that contribute nothing yet."""
    for layer in adapted_layers(model):
        A, B = torch.randn(new, layer.a.in_features), torch.zeros(layer.b.out_features, new)
        put_replacements([(layer, replacements_of(layer, pruned, NewTriples(A, torch.ones(new), B)))])
    write_ranks(model)


def train(model: Any, std: float = 0.1) -> None:
    with torch.no_grad():
        for layer in adapted_layers(model):
            for factor in layer.factors:
                factor += std * torch.randn_like(factor)


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("start", ["lora", "svd"])
@pytest.mark.parametrize("pruned", [(1, 3), (0, 1, 2, 3)])
def test_at_learning_rate_0_pruning_changes_no_output(pruned, start, init, make_net):
    model, x = make_net(init_lora_weights=init).eval(), torch.randn(5, 8)
    before = model(x)
    attach(model, start=start)
    prune(model, *pruned, new=2)
    prune(model, 0, new=1)
    assert torch.allclose(model(x), before, rtol=0, atol=1e-6)


def test_it_does_so_for_transposed_weights_and_in_half_precision():
    from transformers.pytorch_utils import Conv1D

    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        torch.manual_seed(0)
        base, x = nn.Sequential(Conv1D(6, 8), Conv1D(4, 6)).to(dtype), torch.randn(5, 8, dtype=dtype)
        for parameter in base.parameters():
            nn.init.normal_(parameter, std=0.3)
        settings = LoraConfig(r=3, target_modules=["0", "1"], fan_in_fan_out=True, init_lora_weights="pissa")
        model: Any = get_peft_model(base, settings, autocast_adapter_dtype=False)  # type: ignore[arg-type]
        before = model(x)
        attach(model)
        prune(model, 0, 2)
        assert torch.allclose(model(x), before, rtol=0, atol=tolerance)


def test_what_pruning_removes_is_what_training_added(make_net):
    model, x = make_net(init_lora_weights="pissa").eval(), torch.randn(5, 8)
    layer = attach(model)[0]
    began = layer.b.weight[:, 1:2].detach() @ layer.a.A[1:2].detach()
    train(model)
    added = layer.b.weight[:, 1:2] @ layer.a.weight[1:2] - began
    before = layer.module(x)
    prune(model, 1)
    assert torch.allclose(layer.module(x), before - layer.scaling * x @ added.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_weight_before_the_start_is_what_the_files_are_relative_to(init, make_net, tmp_path):
    """Trained, pruned and grown twice: stock PEFT on that weight, and merging, give the same function."""
    model, x = make_net(init_lora_weights=init).eval(), torch.randn(5, 8)
    attach(model)
    for pruned in ((1, 3), (0, 2)):
        train(model)
        prune(model, *pruned, new=1)
    expected = model(x)
    model.save_pretrained(tmp_path)
    assert torch.allclose(PeftModel.from_pretrained(make_net().unload(), tmp_path).eval()(x), expected, atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(model(x), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(model(x), expected, atol=1e-5)
    again = make_net(init_lora_weights=init).eval()
    attach(again)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.allclose(again(x), expected, atol=1e-5)
    pristine = make_net().unload()
    detach(model)
    assert torch.allclose(model(x), expected, atol=1e-5)
    for ours, theirs in zip(model.unload().parameters(), pristine.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("start", ["lora", "svd"])
def test_a_resumed_run_has_the_weights_to_the_last_bit(start, make_net, train_net, tmp_path):
    config = PeDyra.as_published(interval=2, initial_warmup=1, final_warmup=1, moves=4, start=start)

    def begin() -> Any:
        model = make_net(init_lora_weights="pissa")
        attach(model, start=start)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        return model, optimizer, RankAllocator(model, optimizer, config, 9)

    model, optimizer, allocator = begin()
    train_net(model, optimizer, allocator, 6)
    model.save_pretrained(tmp_path)
    save_state(allocator, tmp_path)
    again, _, resumed = begin()
    fresh = [layer.module.base_layer.weight.clone() for layer in adapted_layers(again)]
    again.load_adapter(tmp_path, "default", is_trainable=True)
    restore(resumed, tmp_path)
    kept = zip(fresh, adapted_layers(model), strict=True)
    assert not all(same_bits(weight, layer.module.base_layer.weight) for weight, layer in kept), "nothing went back"
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert same_bits(ours, theirs)


def test_a_run_with_a_start_does_not_go_on_in_an_adapter_that_was_loaded(make_net, train_net, tmp_path):
    """Which has the whole weight and twice the rank: the saved triples would be another function there."""
    config = PeDyra.as_published(interval=2, initial_warmup=1, final_warmup=1, moves=4)

    def begin(model: Any) -> Any:
        attach(model)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        return optimizer, RankAllocator(model, optimizer, config, 9)

    model = make_net(init_lora_weights="pissa")
    optimizer, allocator = begin(model)
    train_net(model, optimizer, allocator, 6)
    model.save_pretrained(tmp_path)
    save_state(allocator, tmp_path)
    loaded = PeftModel.from_pretrained(make_net().unload(), tmp_path, is_trainable=True)
    before = copy.deepcopy(loaded.state_dict())
    _, resumed = begin(loaded)
    with pytest.raises(SideFileError, match=r"began as a part of the weights .* by get_peft_model with"):
        restore(resumed, tmp_path)
    assert all(same_bits(value, before[name]) for name, value in loaded.state_dict().items())


def test_the_weight_does_not_depend_on_the_order_in_which_triples_went(make_net):
    weights = []
    for order in ((0, 2), (2, 0)):
        model = make_net(init_lora_weights="pissa")
        layer = attach(model)[0]
        put_replacements([(layer, replacements_of(layer, (order[0],), None))])
        put_replacements([(layer, replacements_of(layer, (1 if order[0] == 0 else 0,), None))])
        weights.append(layer.module.base_layer.weight.clone())
    assert same_bits(*weights)


def test_a_whole_state_brings_the_weight_along(make_net):
    source, x = make_net(init_lora_weights="pissa").eval(), torch.randn(5, 8)
    attach(source)
    train(source)
    prune(source, 0, 3)
    model = make_net(init_lora_weights="pissa").eval()
    attach(model)
    model.load_state_dict(source.state_dict())
    assert torch.allclose(model(x), source(x), atol=1e-6)
    expected = source(x)
    detach(model)
    assert torch.allclose(model(x), expected, atol=1e-5)
    for ours, theirs in zip(model.unload().parameters(), make_net().unload().parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_another_models_start_is_refused(make_net):
    """Four triples without what they began as, as `named_parameters` has them, and those of another base."""
    model, other = make_net(init_lora_weights="pissa"), make_net(init_lora_weights="pissa")
    train(model) if attach(model) else None
    attach(other)
    by_name = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name and ".E" not in name}
    by_name = {name.replace("default.A", "default.weight"): value for name, value in by_name.items()}
    with pytest.raises(RuntimeError, match="does not end with the start"):
        other.load_state_dict(by_name, strict=False)


def test_a_quantised_weight_is_refused_before_anything_changes(make_net):
    model = make_net(init_lora_weights="pissa")
    layer = model.base_model.model.layers[1].base_layer
    layer.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1 .*quantised .*use the default start .*in float"):
        attach(model)
    assert adapted_layers(model) == []


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 32), (32, 256), (512, 128)])
def test_trained_factors_are_told_from_a_start(init, dtype, shape):
    """Their training would be taken for a part of the start, which saving takes out of the adapter."""
    for trained in (False, True):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(*shape).to(dtype))
        with torch.no_grad():  # as of a real weight, a few directions are much larger than the others
            base[0].weight += 2 * torch.randn(shape[1], 1) @ torch.randn(1, shape[0]) / sum(shape) ** 0.5
        lora = LoraConfig(r=4, lora_alpha=24, target_modules=["0"], init_lora_weights=init)
        model: Any = get_peft_model(base, lora)  # type: ignore[arg-type]
        if not trained:
            attach(model)
            continue
        for layer in peft_layers(model, "default"):
            for slot in (layer.module.lora_A, layer.module.lora_B):
                values = slot["default"].weight.data
                values += 0.1 * values.std() * torch.randn_like(values)
        with pytest.raises(ValueError, match="trained already .*path_initial_model_for_weight_conversion"):
            attach(model)
        assert not adapted_layers(model) and model.peft_config["default"].init_lora_weights == init
