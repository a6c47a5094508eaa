"""What cannot work is refused when the allocator is made, with the repair; a failed adjustment moves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from windows import SCHEDULE, forced, trainable
from windows import allocate as allocate_given

from pedyra import PeDyra
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.lora.attach import attach
from pedyra.methods.ablations import Prune


def allocate(model: Any, optimizer: Any = None, total_steps: Any = 30, **settings: Any) -> RankAllocator:
    return allocate_given(model, forced(**{**SCHEDULE, **settings}), optimizer, total_steps=total_steps)


def with_method(model: Any, method: Any) -> RankAllocator:
    inner = getattr(model, "module", model)
    return RankAllocator(model, torch.optim.SGD(trainable(inner), lr=0.1), method, 300)


def training(model: Any, part: str) -> RankAllocator:
    """With an optimizer of all, of which only what has `part` in its name is trained."""
    optimizer = torch.optim.AdamW(trainable(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    return allocate(model, optimizer)


def on_two_devices(model: Any) -> RankAllocator:
    layer = attach(model)[1]
    layer.a.replace(nn.Parameter(layer.a.A.detach().to("meta")), layer.a.E)
    return allocate(model)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no adapter": (
        lambda net: allocate(net().unload(), torch.optim.AdamW([nn.Parameter(torch.ones(1))])),
        "no LoRA adapter named 'default'",
    ),
    "warm-ups longer than the run": (
        lambda net: allocate(net(), initial_warmup=25),
        r"no rank could ever move: .*initial_warmup 25.*last 8 steps \(final_warmup\)",
    ),
    "a last phase longer than the run": (
        lambda net: allocate(net(), final_warmup=50),
        r"none follows in the last 50 steps \(final_warmup\) of a run of \d+; shorten",
    ),
    "all at the minimum": (
        lambda net: allocate(net(r=1)),
        "every layer starts at rank 1 and min_rank is 1; raise the adapter's r, or lower min_rank",
    ),
    "all at the cap": (
        lambda net: allocate(net(r=4), max_rank=4),
        "no rank can change: every layer starts at max_rank, 4; raise it, or lower the adapter's r",
    ),
    "above the cap": (
        lambda net: allocate(net(), max_rank=3),
        "max_rank is 3, but layers.0 starts at rank 4; raise max_rank",
    ),
    "frozen everywhere": (
        lambda net: training(net(), "nothing"),
        r"no layer of the adapter trains both.* call model\.set_adapter",
    ),
    "LoRA-FA, which freezes A": (
        lambda net: training(net(), "lora_B"),
        "no layer of the adapter trains both lora_A and lora_B",
    ),
    "on two devices": (lambda net: on_two_devices(net()), r"lie on cpu, meta.*one device"),
    "a wrapper": (
        lambda net: with_method(torch.nn.DataParallel(net()), PeDyra.as_published()),
        "the model is inside a DataParallel; give the PEFT model itself, its .module",
    ),
    **{
        f"{config} for a method": (
            lambda net, config=config: with_method(net(), config),
            r"is no method with its settings; give one, such as PeDyra\(\)",
        )
        for config in ({"moves": 2}, None, PeDyra)
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case, make_net):
    make, told = REFUSED[case]
    with pytest.raises(ValueError, match=told):
        make(make_net)


TAKEN: dict[str, Callable[[Any], RankAllocator]] = {
    "observing needs nothing to move": lambda net: allocate(net(r=1), moves=0),
    "nor room to grow": lambda net: allocate(net(r=4), max_rank=4, moves=0),
    "one rank of room": lambda net: allocate(net(r=4), max_rank=5),
    "a method that only shrinks, at the cap": lambda net: with_method(
        net(r=4), Prune(final_rank=2, max_rank=4, interval=3, initial_warmup=2, final_warmup=8)
    ),
    "a whole number of numpy": lambda net: allocate(net(), total_steps=numpy.int64(30)),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_near_to_it_is_taken(case, make_net):
    assert TAKEN[case](make_net).step == 0


class Keeping(torch.optim.SGD):
    """SGD that keeps something of each parameter from a step on; before that it has no state, as where a GradScaler
    skips steps."""

    keeps: Callable[[Tensor], dict[str, Any]]
    first, steps = 1, 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for parameter in self.param_groups[0]["params"] if self.steps >= self.first else ():
            self.state[parameter].update(self.keeps(parameter))
        super().step()


KEPT: dict[str, tuple[Callable[[Tensor], dict[str, Any]], str]] = {
    "a shape of its own": (
        lambda p: {"flat": torch.zeros(p.numel() + 1)},
        r"keeps 'flat' of shape \(\d+,\) .*use optim=.adamw_torch",
    ),
    "a copy of the weights, as schedule-free": (
        lambda p: {"z": p.detach().clone()},
        "keeps 'z', and what a new triple's is cannot be known; use optim=.adamw_torch",
    ),
    "a list, as SOAP": (
        lambda p: {"GG": [torch.zeros(size, size) for size in p.shape]},
        "keeps 'GG', a list whose rows are unknown, .*use optim=.adamw_torch",
    ),
}


def keeping(model: Any, case: str, first: int) -> Keeping:
    optimizer = Keeping(trainable(model), lr=0.01)
    optimizer.keeps, optimizer.first = KEPT[case][0], first
    return optimizer


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("start", ["lora", "svd"])
@pytest.mark.parametrize("case", KEPT)
def test_state_that_cannot_follow_is_refused_in_the_first_step_that_leaves_it(case, start, first, make_net, train_net):
    model = make_net()
    optimizer = keeping(model, case, first)
    allocator = allocate(model, optimizer, start=start)
    train_net(model, optimizer, allocator, first - 1)
    with pytest.raises(ValueError, match=f"Keeping {KEPT[case][1]}"):
        train_net(model, optimizer, allocator, 1, first=first)


@pytest.mark.parametrize(("kind", "key"), [(torch.optim.Adadelta, "acc_delta"), (torch.optim.Adamax, "exp_inf")])
def test_what_is_no_average_of_gradients_is_refused_after_the_first_step(kind, key, make_net, train_net):
    model = make_net()
    optimizer = kind(trainable(model))
    told = f"{kind.__name__} keeps '{key}', and what a new triple's is cannot be known; use optim=.adamw_torch"
    with pytest.raises(ValueError, match=told):
        train_net(model, optimizer, allocate(model, optimizer), 1)


def test_a_failed_adjustment_changes_nothing(make_net, train_net):
    model = make_net()
    optimizer = keeping(model, "a shape of its own", 5)
    allocator = allocate(model, optimizer)
    train_net(model, optimizer, allocator, 4)
    parameters, ranks = trainable(model), allocator.ranks
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    with pytest.raises(ValueError, match="Keeping keeps 'flat'"):
        train_net(model, optimizer, allocator, 1, first=5)
    assert allocator.ranks == ranks and all(a is b for a, b in zip(trainable(model), parameters, strict=True))
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == held
    assert allocator.history == []


def test_factors_in_shards_are_refused_before_anything_is_claimed(make_net, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make_net()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="is sharded.*fully_shard.*ignored_params="):
            with_method(model, PeDyra.as_published())
    finally:
        torch.distributed.destroy_process_group()
