"""Moments follow their rows: what is kept trains on as if the dropped rows had never been there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from closeness import same_bits
from torch import Tensor, nn
from torch.optim import Optimizer
from windows import on_lora, trainable

from pedyra import RankAllocator
from pedyra.allocate.optimizer_state import adopt, move_state
from pedyra.lora.attach import attach
from pedyra.lora.replacement import Replacement

LR = 0.01
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw-loop": lambda p: torch.optim.AdamW(p, lr=LR, foreach=False, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=LR, foreach=True, weight_decay=0.1),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=LR, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=LR),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=LR),
}


def replaced(old: torch.Tensor, kept: list[int], dim: int, num_new: int = 0) -> Replacement:
    index = torch.tensor(kept, dtype=torch.long)
    value = old.detach().index_select(dim, index)
    if num_new:
        shape = list(value.shape)
        shape[dim] = num_new
        value = torch.cat([value, torch.zeros(shape)], dim)
    return Replacement(old, nn.Parameter(value), dim, index, num_new)


def gradients(shape: tuple[int, ...], num: int, seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(num)]


def follow(optimizer: Optimizer, parameter: torch.Tensor, grads: list[Tensor]) -> None:
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw-loop", "adamw-foreach", "adam-amsgrad", "nadam", "adagrad"])
def test_a_new_row_moves_as_far_as_others_though_its_gradients_are_far_smaller(name):
    """B = 0 or E = 0 makes them so. From the second moments of the kept rows it would move by 0.01 of their steps."""
    parameter = nn.Parameter(torch.zeros(2, 3))
    optimizer = OPTIMIZERS[name]([parameter])
    follow(optimizer, parameter, gradients((2, 3), 200))
    before = {key: value.clone() for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
    change = replaced(parameter, [0, 1], 0, num_new=1)
    move_state(optimizer, [change])
    for key, value in optimizer.state[change.new].items():
        if isinstance(value, Tensor) and value.dim():
            assert same_bits(value[:2], before[key]) and torch.count_nonzero(value[2]) == 0
    start = change.new.detach().clone()
    noise = gradients((3, 3), 20, seed=8)
    follow(optimizer, change.new, [grad * torch.tensor([[1.0], [1.0], [0.01]]) for grad in noise])
    moved = (change.new.detach() - start).abs().mean(1)
    assert float(moved[2]) > float(moved[:2].mean())


def test_e_joins_the_group_of_its_b_once(make_net):
    layer, *_ = attach(make_net())
    A, E, B = layer.factors
    optimizer = torch.optim.AdamW([{"params": [("a", A)]}, {"params": [("b", B)], "lr": 0.5}])
    for _ in range(2):
        adopt(optimizer, layer)
    assert len(optimizer.param_groups) == 2
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(B), id(E)]
    assert optimizer.param_groups[1]["param_names"] == ["b", "layers.0.lora_A.default.E"]


def test_an_e_that_has_its_group_is_not_stepped_twice(make_net):
    layer, *_ = attach(make_net())
    A, E, B = layer.factors
    optimizer = torch.optim.AdamW([{"params": [A, E]}, {"params": [B], "lr": 0.5}])
    adopt(optimizer, layer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_an_optimizer_that_does_not_hold_a_factor_is_refused(missing, make_net):
    layer, *_ = attach(make_net())
    A, _, B = layer.factors
    with pytest.raises(ValueError, match=f"does not hold {missing} of layers.0; build one"):
        adopt(torch.optim.AdamW([B if missing == "lora_A" else A]), layer)


def test_an_optimizer_may_keep_entries_of_its_own(make_net, train_net):
    class Counting(torch.optim.AdamW):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            super().__init__(parameters, lr=1e-2)
            self.state["seen"], self.state["totals"] = 1, {"steps": torch.zeros(1)}  # type: ignore[index]

    model = make_net()
    optimizer = Counting(trainable(model))
    allocator = RankAllocator(model, optimizer, on_lora(interval=4, final_warmup=4), 20)
    train_net(model, optimizer, allocator, 6)
    saved = optimizer.state_dict()
    assert saved["state"]["seen"] == 1
    optimizer.load_state_dict(saved)
    train_net(model, optimizer, allocator, 2, first=7)
