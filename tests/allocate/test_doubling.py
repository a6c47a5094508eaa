"""A layer whose rank doubles has half the scaling and twice the B: its update stays, and its steps do not grow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import close, same_bits
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from windows import allocate, trainable

from pedyra import PeDyra, RandomMoves
from pedyra.allocate.allocation import RankPlan
from pedyra.allocate.checkpoint import restore, save_state
from pedyra.allocate.optimizer_state import move_state
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.lora.layer import AdaptedLayer, adapted_layers
from pedyra.lora.replacement import Replacement

MOVING: dict[str, Any] = {"interval": 3, "initial_warmup": 2, "final_warmup": 8, "moves": 4}


def update(layer: AdaptedLayer) -> Tensor:
    return layer.scaling * (layer.b.weight.detach() @ layer.a.weight.detach())


def begin(model: Any, config: Any = None) -> RankAllocator:
    return allocate(model, {"config": config or PeDyra(**MOVING)})


def grow(allocator: RankAllocator, num: int, pruned: tuple[int, ...] = ()) -> AdaptedLayer:
    """Give the first layer `num` new triples and take some of its own."""
    layer = allocator.layers[0]
    ranks = {**allocator.ranks, layer.name: layer.rank + num - len(pruned)}
    plan = RankPlan({layer.name: pruned} if pruned else {}, {layer.name: num} if num else {}, ranks, {})
    allocator._carry_out(plan)
    return layer


@pytest.mark.parametrize(
    ("start", "rank", "share"),
    [
        (2, 0, 1),
        (2, 1, 1),
        (2, 3, 1),
        (2, 4, 1 / 2),
        (2, 7, 1 / 2),
        (2, 8, 1 / 4),
        (3, 5, 1),
        (3, 6, 1 / 2),
        (1, 2, 1 / 2),
    ],
)
def test_each_doubling_of_the_rank_halves_the_scaling(start, rank, share, make_net):
    layer = begin(make_net(r=start)).layers[0]
    assert layer.share_at(rank) == share


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("config", [PeDyra(**MOVING), RandomMoves(**MOVING)])
def test_the_update_has_the_same_bits_before_and_after(config, init, make_net):
    model = make_net(r=2, trained=init is True, init_lora_weights=init)
    allocator = begin(model, config)
    layer = allocator.layers[0]
    scaling, A, B = layer.scaling, layer.a.weight.detach().clone(), layer.b.weight.detach().clone()
    base = layer.module.get_base_layer().weight.clone()
    grow(allocator, 6)
    assert layer.scaling == scaling / 4
    assert same_bits(layer.a.weight[:2], A) and same_bits(layer.b.weight[:, :2], 4 * B)  # a power of two is exact
    assert not layer.b.weight[:, 2:].any()
    grow(allocator, 0, (2, 3, 4, 5, 6, 7))
    assert layer.scaling == scaling and same_bits(layer.a.weight, A) and same_bits(layer.b.weight, B)
    assert same_bits(layer.module.get_base_layer().weight, base)


def test_the_published_start_keeps_its_scaling(make_net):
    allocator = begin(make_net(r=2), PeDyra.as_published(**MOVING))
    layer = grow(allocator, 6)
    assert layer.scaling == 4 and layer.share_at(layer.rank) == 1


@pytest.mark.parametrize(
    ("config", "times"), [(PeDyra(**MOVING), 1), (PeDyra.as_published(**MOVING, orth_weight=0.0), 4)]
)
def test_a_layer_with_four_times_its_rank_steps_as_far_as_it_did(config, times, make_net):
    """Adam's first steps are of the learning rate in each element, so that all triples of a layer go the same way."""
    lengths = []
    for num in (0, 6):
        allocator = begin(make_net(r=2), config)
        layer = grow(allocator, num)
        with torch.no_grad():
            for factor, value in zip(layer.factors, (1.0, 1.0, 0.0), strict=True):
                factor.fill_(value)
        layer.b.weight.grad = torch.ones_like(layer.b.weight)
        allocator.optimizer.step()
        lengths.append(float(update(layer).norm()))
    assert lengths[1] == pytest.approx(times * lengths[0], rel=1e-5)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=0.0),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, eps=0.0, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=0.0, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, eps=0.0),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_those_of_an_optimizer_that_had_always_seen_the_other_gradients(name):
    """Of B / 4 the gradient is four times as large. Powers of two change no rounding."""
    draw = torch.Generator().manual_seed(7)
    gradients = [torch.randn(3, 2, generator=draw) for _ in range(5)]
    parameter, expected = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3, 2))
    optimizer, other = OPTIMIZERS[name]([parameter]), OPTIMIZERS[name]([expected])
    for gradient in gradients:
        parameter.grad, expected.grad = gradient.clone(), 4 * gradient
        optimizer.step()
        other.step()
    new = nn.Parameter(parameter.detach() / 4)
    move_state(optimizer, [Replacement(parameter, new, 1, torch.arange(2), 0, divisor=4.0)])
    for key, value in other.state[expected].items():
        if isinstance(value, Tensor) and value.dim():
            assert close(optimizer.state[new][key], value), key


def test_weights_that_were_kept_by_name_are_the_function_that_they_were(make_net, train_net, net_batch):
    """The scaling is no Parameter, and goes by the rank of what is loaded."""
    model = make_net(r=2, trained=True)
    allocator = begin(model)
    x, _ = net_batch(99)
    train_net(model, allocator.optimizer, allocator, 2)
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    expected = model.eval()(x).detach()
    grow(allocator, 6)
    grown = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(kept, strict=False)
    assert close(model(x), expected) and allocator.layers[0].scaling == 4
    model.load_state_dict(grown, strict=False)
    assert close(model(x), expected) and allocator.layers[0].scaling == 1


def test_what_is_saved_is_the_function_and_a_run_goes_on_to_the_last_bit(make_net, train_net, net_batch, tmp_path):
    model = make_net(r=2, trained=True)
    allocator = begin(model)
    train_net(model, allocator.optimizer, allocator, 2)
    grow(allocator, 6)
    train_net(model, allocator.optimizer, allocator, 1, first=3)
    model.save_pretrained(tmp_path)
    save_state(allocator, tmp_path)
    x, _ = net_batch(99)
    loaded = PeftModel.from_pretrained(make_net().unload(), tmp_path)
    assert close(loaded.eval()(x), model.eval()(x))
    again = PeftModel.from_pretrained(make_net().unload(), tmp_path, is_trainable=True)
    resumed = begin(again)
    resumed.optimizer.load_state_dict(copy.deepcopy(allocator.optimizer.state_dict()))
    restore(resumed, tmp_path)
    assert [layer.scaling for layer in adapted_layers(again)] == [layer.scaling for layer in allocator.layers]
    for each, of in ((model, allocator), (again, resumed)):
        train_net(each, of.optimizer, of, 6, first=4)
    assert allocator.ranks == resumed.ranks
    for ours, theirs in zip(trainable(model), trainable(again), strict=True):
        assert same_bits(ours, theirs)
