"""What cannot work is refused when the allocator is made, with the repair; a failed adjustment moves nothing."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import nn
from windows import SCHEDULE, forced, on_lora

from pedyra import PeDyra
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.pe_dyra.scored import ScoredMethod


def trainable(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def allocate(model: Any, optimizer: Any = None, total_steps: int = 30, **settings: Any) -> RankAllocator:
    optimizer = torch.optim.AdamW(trainable(model)) if optimizer is None else optimizer
    return RankAllocator(model, optimizer, total_steps=total_steps, **forced(**{**SCHEDULE, **settings}))


def refused(match: str) -> Any:
    return pytest.raises(ValueError, match=match)


def test_a_model_without_an_adapter(make_net):
    with refused("no LoRA adapter named 'default'"):
        allocate(make_net().unload(), torch.optim.AdamW([nn.Parameter(torch.ones(1))]))


def test_warmups_longer_than_the_run(make_net):
    with refused("no rank could ever move: .*initial_warmup 25.*final_warmup 8"):
        allocate(make_net(), initial_warmup=25)


def test_ranks_that_are_all_at_the_minimum(make_net):
    with refused("every layer starts at rank 1 and min_rank is 1; raise the adapter's r, or lower min_rank"):
        allocate(make_net(r=1))


def test_observing_needs_nothing_to_move(make_net):
    assert allocate(make_net(r=1), moves=0).ranks == {"layers.0": 1, "layers.1": 1, "layers.2": 1}


def test_a_start_above_the_cap(make_net):
    with refused("max_rank is 3, but layers.0 starts at rank 4; raise max_rank"):
        allocate(make_net(), max_rank=3)


def test_a_start_wider_than_a_layer_is_no_reason_to_refuse(make_net, train_net):
    # Stock PEFT trains lora.r 8 on a layer of 6 outputs; such a layer just does not grow.
    model = make_net(r=8)
    allocator = allocate(model)
    train_net(model, allocator.optimizer, allocator, 30)
    assert max(allocator.ranks.values()) <= 8


def test_an_adapter_that_is_frozen_everywhere(make_net):
    model = make_net()
    optimizer = torch.optim.AdamW(trainable(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with refused(r"every layer of the adapter is frozen; call model\.set_adapter"):
        allocate(model, optimizer)


def test_an_optimizer_whose_state_cannot_follow(make_net):
    model = make_net()
    with refused("Adafactor .* cannot follow a rank change; use optim=.adamw_torch"):
        allocate(model, torch.optim.Adafactor(trainable(model)))
    assert not any("lora_A.default.E" in name for name, _ in model.named_parameters())  # nothing was attached


class RowAndColumn(torch.optim.SGD):
    """SGD that begins to keep a statistic nobody can slice: refused when it is met, not silently dropped."""

    steps, first = 0, 5

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups if self.steps >= self.first else ():
            for parameter in group["params"]:
                self.state[parameter]["flat"] = torch.zeros(parameter.numel() + 1)
        super().step()


def test_state_that_cannot_follow_is_refused_after_the_first_step(make_net, train_net):
    model = make_net()
    optimizer = RowAndColumn(trainable(model), lr=0.01, momentum=0.9)
    optimizer.first = 1
    with refused("RowAndColumn keeps 'flat'"):
        train_net(model, optimizer, allocate(model, optimizer), 1)


class Averaging(torch.optim.SGD):
    """SGD that keeps a copy of the weights, as schedule-free optimizers do; the first `skipped` steps are none."""

    skipped = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.skipped -= 1
        if self.skipped >= 0:
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["z"] = parameter.detach().clone()
        super().step()


@pytest.mark.parametrize("skipped", [0, 2])
@pytest.mark.parametrize("settings", [{}, {"start": "svd"}])
def test_a_copy_of_the_weights_is_refused_in_the_first_step_that_is_taken(settings, skipped, make_net, train_net):
    model = make_net()
    optimizer = Averaging(trainable(model), lr=0.01)
    optimizer.skipped = skipped
    allocator = allocate(model, optimizer, **settings)
    train_net(model, optimizer, allocator, skipped)
    with refused("Averaging keeps 'z', and what a new triple's is cannot be known; use optim=.adamw_torch"):
        train_net(model, optimizer, allocator, 1, first=skipped + 1)


class ListKeeping(torch.optim.SGD):
    """Keeps its preconditioners in a list, as SOAP does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["GG"] = [torch.zeros(size, size) for size in parameter.shape]
        super().step()


def test_state_in_a_list_is_refused_after_the_first_step(make_net, train_net):
    model = make_net()
    optimizer = ListKeeping(trainable(model), lr=0.01)
    with refused("ListKeeping keeps 'GG', a list whose rows cannot be told, .*use optim=.adamw_torch"):
        train_net(model, optimizer, allocate(model, optimizer), 1)


@pytest.mark.parametrize(("kind", "key"), [(torch.optim.Adadelta, "acc_delta"), (torch.optim.Adamax, "exp_inf")])
def test_what_is_no_average_of_gradients_is_refused_after_the_first_step(kind, key, make_net, train_net):
    model = make_net()
    optimizer = kind(trainable(model))
    with refused(f"{kind.__name__} keeps '{key}', and what a new triple's is cannot be known; use optim=.adamw_torch"):
        train_net(model, optimizer, allocate(model, optimizer), 1)


def test_a_start_at_the_highest_rank_is_refused(make_net):
    with refused("no rank can change: every layer starts at max_rank, 4; raise it, or lower the adapter's r"):
        allocate(make_net(r=4), max_rank=4)
    allocate(make_net(r=4), max_rank=5)
    shrinking = ScoredMethod(**on_lora(**SCHEDULE, max_rank=4).to_dict())
    model = make_net(r=4)
    RankAllocator(model, torch.optim.AdamW(trainable(model)), shrinking, 30)
    allocate(make_net(r=4), max_rank=4, moves=0)


@pytest.mark.parametrize("config", [{"moves": 2}, None, PeDyra], ids=["settings", "none", "the class"])
def test_a_config_of_another_kind_is_refused(config, make_net):
    model = make_net()
    with refused(r"config is .*; give a method with its settings, such as PeDyra\(\)"):
        RankAllocator(model, torch.optim.SGD(trainable(model)), config, 30)


def test_steps_that_are_no_whole_number_are_refused(make_net):
    with refused("total_steps is 30.5; it is a whole number of optimizer steps"):
        allocate(make_net(), total_steps=30.5)  # type: ignore[arg-type]
    assert allocate(make_net(), total_steps=numpy.int64(30)).schedule.total_steps == 30  # type: ignore[arg-type]


def test_a_wrapper_is_refused_with_the_model_to_give(make_net):
    model = make_net()
    with refused("the model is inside a DataParallel; give the PEFT model itself, its .module"):
        RankAllocator(torch.nn.DataParallel(model), torch.optim.SGD(trainable(model)), PeDyra(), 300)


def test_a_failed_adjustment_changes_nothing(make_net, train_net):
    model = make_net()
    optimizer = RowAndColumn(trainable(model), lr=0.01)
    allocator = allocate(model, optimizer)
    train_net(model, optimizer, allocator, 4)
    parameters, ranks = trainable(model), allocator.ranks
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    with refused("RowAndColumn keeps 'flat'"):
        train_net(model, optimizer, allocator, 1, first=5)
    assert allocator.ranks == ranks and all(a is b for a, b in zip(trainable(model), parameters, strict=True))
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == held
    assert allocator.history == []


def test_an_adapter_of_which_only_b_is_trained_is_refused(make_net):
    """LoRA-FA (`create_lorafa_optimizer`) freezes A."""
    model = make_net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="only one of lora_A and lora_B is trained"):
        RankAllocator(model, optimizer, PeDyra(), 300)


def test_factors_in_shards_are_refused_before_anything_is_claimed(make_net, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make_net()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with pytest.raises(ValueError, match="cut into shards.*fully_shard.*ignored_params="):
            RankAllocator(model, optimizer, PeDyra(), 1000)
    finally:
        torch.distributed.destroy_process_group()
