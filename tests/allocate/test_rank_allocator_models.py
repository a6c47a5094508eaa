"""RankAllocator beside what else a user has: schedulers, LoRA+, other adapters, frozen layers, every kind of LoRA."""

from __future__ import annotations

import pytest
import torch
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
