"""One allocator has an adapter at a time, and what it leaves behind at its end, however that comes, is nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from windows import SCHEDULE, Forced, allocate, forced

from pedyra import RankAllocator, detach


class Blind(Forced):
    """Its scores see nothing inside a compiled model."""

    compiles: Any = False


def hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_a_second_allocator_on_the_same_adapter_is_refused(make_net):
    model = make_net()
    first = allocate(model, forced(**SCHEDULE))
    with pytest.raises(ValueError, match=r"'default' is already adapted by another RankAllocator; call its release\("):
        allocate(model, forced(**SCHEDULE))
    first.release()
    assert allocate(model, forced(**SCHEDULE)).ranks == first.ranks


def test_an_allocator_that_is_gone_holds_nothing(make_net):
    model = make_net()
    allocate(model, forced(**SCHEDULE))  # dropped at once
    assert allocate(model, forced(**SCHEDULE)).step == 0


def test_a_refused_allocator_holds_nothing_though_its_exception_is_kept(make_net, make_llama):
    """As a notebook keeps the last one, for its debugger."""
    model = make_net()
    with pytest.raises(ValueError, match="does not hold lora_A") as kept:
        allocate(model, forced(**SCHEDULE), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    assert allocate(model, forced(**SCHEDULE)).step == 0
    compiled = make_llama()
    compiled.compile(backend="eager")
    with pytest.raises(ValueError, match="train without torch.compile") as too:
        allocate(compiled, forced(Blind, **SCHEDULE))
    assert allocate(compiled, forced(**SCHEDULE, alpha=1.0)).step == 0
    assert kept.tb is not None and too.tb is not None


def test_release_takes_every_hook_off_and_keeps_the_triples(make_net, train_net):
    model = make_net()
    allocator = allocate(model, forced(**SCHEDULE))
    train_net(model, allocator.optimizer, allocator, 6)
    ranks = allocator.ranks
    allocator.release()
    assert hooks(model) == 0
    assert allocator.ranks == ranks


def test_hooks_and_ownership_end_with_a_training(make_trainer, quick, tmp_path):
    trainer, callback = make_trainer(tmp_path, quick(final_warmup=1))
    before = hooks(trainer.model)
    trainer.train()
    assert hooks(trainer.model) == before
    RankAllocator(trainer.model, callback.allocator.optimizer, **quick(), total_steps=12)  # nobody holds the adapter


class Interrupt(TrainerCallback):
    def __init__(self, event: str) -> None:
        setattr(self, event, self.raised)

    def raised(self, args, state, control, **kwargs) -> None:
        if state.global_step >= 4:
            raise KeyboardInterrupt


def test_an_interrupted_training_leaves_nothing_and_the_next_goes_on(make_trainer, make_bert, tmp_path):
    """A notebook's cell, stopped while it measures, between two epochs, with its Trainer still there, and run again."""
    model, config = make_bert(), forced(**{**SCHEDULE, "final_warmup": 3})["config"]
    stopped, _ = make_trainer(tmp_path, config, model=model)
    before = hooks(model)
    stopped.add_callback(Interrupt("on_epoch_begin"))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert hooks(model) == before
    again, taking = make_trainer(tmp_path, config, model=model)
    again.train()
    assert taking.allocator.step == 12


@pytest.mark.parametrize("end", [detach, lambda model: model.delete_adapter("default")], ids=["detach", "delete"])
def test_an_allocator_outlives_its_adapter(end, make_net, train_net):
    """Its release is no error then."""
    model = make_net()
    allocator = allocate(model, forced(**SCHEDULE))
    train_net(model, allocator.optimizer, allocator, 2)
    end(model)
    allocator.release()


def test_a_second_release_leaves_the_next_allocator_its_adapter(make_net):
    model = make_net()
    first = allocate(model, forced(**SCHEDULE))
    first.release()
    second = allocate(model, forced(**SCHEDULE))
    first.release()
    with pytest.raises(ValueError, match="already adapted by another RankAllocator"):
        allocate(model, forced(**SCHEDULE))
    second.release()
    allocate(model, forced(**SCHEDULE))
