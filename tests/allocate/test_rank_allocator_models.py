"""RankAllocator beside what else a user has: schedulers, LoRA+, other adapters, frozen layers, every kind of LoRA."""

from __future__ import annotations

import pytest
import torch
from closeness import same_bits
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from windows import SCHEDULE, STEPS, allocate, forced, inside, on_lora, take_step, trainable

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.lora.attach import attach


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attached_before", [False, True], ids=["own loop", "as Trainer does"])
def test_lora_plus_groups_keep_their_ratio(attached_before, make_net, train_net):
    model = make_net()
    if attached_before:
        attach(model)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.001, loraplus_lr_ratio=16.0)
    allocator = allocate(model, forced(**SCHEDULE), optimizer)
    train_net(model, optimizer, allocator, STEPS)
    assert any(record["added"] for record in allocator.history)
    lr = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(lr) == sum(len(group["params"]) for group in optimizer.param_groups)  # none is in two groups
    for layer in allocator.layers:
        assert lr[id(layer.a.A)] == 0.001 and lr[id(layer.b.weight)] == 0.016
        assert lr[id(layer.a.E)] == 0.016  # LoRA+ counts vectors to B's side


def test_an_adapter_beside_keeps_its_ranks_and_weights(make_net, train_net):
    model = make_net()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "2"]))
    other = {name: p.detach().clone() for name, p in model.named_parameters() if ".other." in name}
    allocator = allocate(model, forced(**SCHEDULE))
    train_net(model, allocator.optimizer, allocator, STEPS)
    now = {name: p for name, p in model.named_parameters() if ".other." in name}
    assert list(now) == list(other) and all(same_bits(now[name], other[name]) for name in other)
    assert model.peft_config["other"].rank_pattern == {}


def test_frozen_layers_keep_their_rank(make_net, train_net):
    model = make_net()
    for name, parameter in model.named_parameters():
        if "layers.1" in name:
            parameter.requires_grad_(False)
    allocator = allocate(model, forced(**SCHEDULE))
    frozen = attach(model)[1]
    before = frozen.a.A.detach().clone()
    train_net(model, allocator.optimizer, allocator, STEPS)
    assert list(allocator.ranks) == ["layers.0", "layers.2"]
    assert frozen.rank == 4 and same_bits(frozen.a.A, before) and not frozen.a.E.requires_grad


def test_modules_to_save_are_trained_as_before(make_bert, tokens):
    model = make_bert().train()
    head = model.base_model.model.classifier.modules_to_save["default"]
    before = head.weight
    allocator = allocate(model, forced(**SCHEDULE))
    for _ in range(STEPS):
        model(**tokens, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        take_step(allocator)
    assert head.weight is before and before in allocator.optimizer.state
    assert len({tuple(record["ranks"].values()) for record in allocator.history}) > 1
    assert not any("classifier" in name for name in allocator.ranks)


def test_a_model_in_float64_is_scored(make_net):
    """Eqs. (3) and (6) without E, whose missing gradient is a zero of another type than the others."""
    model = make_net(dtype=torch.float64)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    config = on_lora(interval=2, moves=2)
    allocator = RankAllocator(model, optimizer, config, 8)
    for _ in range(6):
        model(torch.randn(4, 8, dtype=torch.float64)).square().mean().backward()
        take_step(allocator)
    assert all(value > 0 for values in inside(allocator).scores.triple_scores().values() for value in values)
