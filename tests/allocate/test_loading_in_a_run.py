"""Weights that are loaded in the middle of a run are trained on, at the same ranks; and runs that begin at rank 0."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from closeness import close
from transformers import Trainer
from windows import forced, on_lora, trainable

from pedyra import PeDyra, RankAllocator, attach

MOVING: dict[str, Any] = {"interval": 2, "initial_warmup": 1, "final_warmup": 3, "moves": 4}


class Idle:
    """In the place of an allocator: stock PEFT."""

    def before_step(self) -> None:
        pass

    def after_step(self) -> None:
        return None


def test_loading_at_the_same_ranks_trains_on_as_peft_does(make_net, train_net, caplog):
    caplog.set_level(logging.WARNING, "pedyra.allocate.rank_allocator")
    ended = []
    for adapts in (True, False):
        model = make_net()
        optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
        settings = on_lora(interval=10, moves=0)
        allocator = RankAllocator(model, optimizer, settings, 40) if adapts else Idle()
        train_net(model, optimizer, allocator, 5)
        saved = copy.deepcopy(model.state_dict())
        train_net(model, optimizer, allocator, 5, first=6)
        model.load_state_dict(saved)
        train_net(model, optimizer, allocator, 5, first=11)
        ended.append(model.state_dict())
    assert caplog.text == ""
    adapted, stock = ended
    assert all(close(adapted[name], value) for name, value in stock.items())  # the fused forward, and PEFT's


def test_other_weights_for_an_evaluation_and_ones_own_again_change_no_run(make_net, train_net):
    """Where E is trained, which the file has folded into A: the two are taken apart as they were."""
    ended = []
    for others in (0, 2):
        model = make_net()
        optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
        allocator = RankAllocator(
            model, optimizer, PeDyra.as_published(interval=10, moves=0, initial_warmup=1, final_warmup=3), 40
        )
        train_net(model, optimizer, allocator, 12)
        factors = [factor.detach().clone() for layer in allocator.layers for factor in layer.factors]
        own = copy.deepcopy(model.state_dict())
        for scale in (-0.5, 3.0)[:others]:
            model.load_state_dict({name: scale * value + 0.01 for name, value in own.items()})
            for layer in allocator.layers:  # it is what was loaded
                name = f"base_model.model.{layer.name}.lora_A.default.weight"
                torch.testing.assert_close(layer.a.weight, scale * own[name] + 0.01)
            model.load_state_dict(own)
        for before, now in zip(factors, (f for layer in allocator.layers for f in layer.factors), strict=True):
            torch.testing.assert_close(now.detach(), before)
        train_net(model, optimizer, allocator, 20, first=13)
        ended.append(model.state_dict())
    plain, swapped = ended
    for name, value in plain.items():
        torch.testing.assert_close(swapped[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spoilt", [float("inf"), float("nan"), 1e30, 0.0])
def test_weights_that_have_diverged_are_replaced_by_what_is_loaded(make_net, spoilt):
    model, x = make_net(trained=True), torch.randn(3, 8)
    layers = attach(model, start="svd")
    layers[0].a.A.data[1] = 0
    layers[1].a.E.data.mul_(-1)
    own, expected = copy.deepcopy(model.state_dict()), model(x)
    with torch.no_grad():
        for layer in layers:
            layer.a.A.fill_(spoilt)
    model.load_state_dict(own)
    torch.testing.assert_close(model(x), expected)


def test_zeros_for_a_while_leave_the_signs_of_e(make_net):
    """As one loads to judge the base."""
    model = make_net(trained=True)
    layers = attach(model, start="svd")
    with torch.no_grad():
        layers[0].a.E[::2] *= -1
    own, factors = copy.deepcopy(model.state_dict()), [factor.detach().clone() for factor in layers[0].factors]
    model.load_state_dict({name: 0 * value if "lora_" in name else value for name, value in own.items()})
    model.load_state_dict(own)
    for before, now in zip(factors, layers[0].factors, strict=True):
        torch.testing.assert_close(now.detach(), before)


def test_weights_of_other_ranks_are_refused_in_a_run(make_net, train_net):
    model = make_net()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    allocator = RankAllocator(model, optimizer, total_steps=12, **forced(**MOVING))
    train_net(model, optimizer, allocator, 2)
    saved, ranks = copy.deepcopy(model.state_dict()), allocator.ranks
    train_net(model, optimizer, allocator, 3, first=3)
    assert allocator.ranks != ranks, "nothing moved: the test would prove nothing"
    model.load_state_dict(saved)
    with pytest.raises(ValueError, match="loaded with other ranks before step 6.*restore"):
        train_net(model, optimizer, allocator, 1, first=6)


def test_the_users_optimizer_need_not_hold_frozen_layers(make_bert, make_trainer, quick, rows, tmp_path):
    model = make_bert()
    frozen = [p for name, p in model.named_parameters() if "layer.0.attention.self.query.lora_" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)

    class Given(Trainer):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments, optimizers=(optimizer, None))

    trainer, callback = make_trainer(tmp_path, quick(), model=model, trainer_class=Given)
    trainer.train()
    assert len(frozen) == 2 and not any("layer.0.attention.self.query" in name for name in callback.allocator.ranks)
    assert any(record["added"] for record in callback.allocator.history)


@pytest.mark.parametrize("given", [False, True], ids=["Trainer's", "the user's"])
def test_a_run_resumes_with_any_optimizer(given, make_trainer, quick, tmp_path, run_state, assert_equal):
    """An optimizer that the user made before the checkpoint was loaded holds what was there then."""
    config = quick(min_rank=0, moves=7)

    def trainer_of(folder: str) -> Any:
        trainer, callback = make_trainer(tmp_path / folder, config, save_strategy="steps", save_steps=6)
        if given:
            optimizer = torch.optim.AdamW(trainable(trainer.model), lr=0.02)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
            trainer.optimizer, trainer.lr_scheduler = optimizer, schedule
        return trainer, callback

    whole = trainer_of("whole")
    whole[0].train()
    again = trainer_of("again")
    again[0].train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert_equal(run_state(*again), run_state(*whole))
