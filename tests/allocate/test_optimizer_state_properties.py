"""Drawn plans carried out on drawn layers under drawn optimizers, against a walk over every row of their state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from closeness import same_bits
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop
from windows import trainable

from pedyra.allocate.allocation import RankPlan
from pedyra.allocate.optimizer_state import adopt
from pedyra.allocate.rank_allocator import resize_layers
from pedyra.lora.attach import attach, train_e
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.replacement import NewTriples, Replacement

Draw = Callable[[st.SearchStrategy], Any]

OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any], bool]] = {
    # name: (class, settings, whether it has a fused form on a CPU)
    "sgd": (SGD, {"momentum": 0.9}, True),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, True),
    "adam": (Adam, {}, True),
    "amsgrad": (Adam, {"amsgrad": True}, True),
    "adamw": (AdamW, {"weight_decay": 0.1}, True),
    "rmsprop": (RMSprop, {"momentum": 0.9, "centered": True}, False),
    "adagrad": (Adagrad, {"initial_accumulator_value": 0.1}, True),
    "nadam": (NAdam, {}, False),
    "radam": (RAdam, {}, False),
}


def rows(tensor: Tensor, dim: int) -> list[Tensor]:
    """Copies of the rows of A and E, or the columns of B."""
    return [tensor.detach().select(dim, i).clone() for i in range(tensor.shape[dim])]


class Situation:
    """A model with adapted layers, its optimizer, and a few steps of random gradients behind it."""

    def __init__(self, draw: Draw) -> None:
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
        widths = [draw(st.integers(1, 6)) for _ in range(draw(st.integers(2, 4)))]
        base = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)), nn.LayerNorm(2))
        names = [str(i) for i in range(len(widths) - 1)]
        config = LoraConfig(r=draw(st.integers(1, 4)), target_modules=names)
        model: Any = get_peft_model(base.to(dtype), config, autocast_adapter_dtype=False)
        model.base_model.model[-1].requires_grad_(True)  # trained beside the adapter
        self.layers = attach(model)
        train_e(self.layers, draw(st.booleans()))

        kind, settings, fused = OPTIMIZERS[draw(st.sampled_from(sorted(OPTIMIZERS)))]
        form = draw(st.sampled_from([{"foreach": False}, {"foreach": True}, *([{"fused": True}] if fused else [])]))
        trained = trainable(model)
        where = [draw(st.integers(0, 1)) for _ in trained]
        groups = [{"params": [p for p, at in zip(trained, where, strict=True) if at == g]} for g in range(2)]
        groups = [{**group, "lr": 0.01 * (g + 1)} for g, group in enumerate(groups) if group["params"]]
        self.optimizer = kind(groups, **settings, **form)
        for layer in self.layers:
            adopt(self.optimizer, layer)
        for _ in range(draw(st.integers(0, 3))):
            self.step()

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=self.generator).to(parameter)
        self.optimizer.step()

    @property
    def ranks(self) -> dict[str, int]:
        return {layer.name: layer.rank for layer in self.layers}

    def born(self, layer: AdaptedLayer, num_new: int, _: torch.Generator) -> NewTriples:
        shapes = (num_new, layer.a.in_features), (num_new,), (layer.b.out_features, num_new)
        A, E, B = (torch.randn(shape, generator=self.generator) for shape in shapes)
        return NewTriples(A, torch.ones_like(E), B)

    def carry_out(self, plan: RankPlan) -> Mapping[str, list[Replacement]]:
        return resize_layers(plan, self.born, self.layers, self.optimizer, self.generator)


def drawn_plan(draw: Draw, ranks: dict[str, int]) -> RankPlan:
    """Not a strategy: checking its types takes random numbers."""
    pruned = {name: tuple(i for i in range(rank) if draw(st.booleans())) for name, rank in ranks.items()}
    added = {name: draw(st.integers(0, 3)) for name in ranks}
    ranks = {name: rank - len(pruned[name]) + added[name] for name, rank in ranks.items()}
    some_pruned = {name: indices for name, indices in pruned.items() if indices}
    return RankPlan(some_pruned, {name: count for name, count in added.items() if count}, ranks, {})


def expected_rows(old: Tensor, dim: int, pruned: tuple[int, ...], num_new: int) -> list[Tensor]:
    """The rows that stay, in their order, then those of new triples."""
    kept = [row for i, row in enumerate(rows(old, dim)) if i not in pruned]
    return [*kept, *[old.new_zeros([size for i, size in enumerate(old.shape) if i != dim])] * num_new]


@given(st.data())
def test_state_follows_its_rows_through_a_chain_of_plans_and_nothing_else_changes(data):
    now = Situation(data.draw)
    optimizer, layers = now.optimizer, now.layers
    for _ in range(data.draw(st.integers(1, 2))):
        plan = drawn_plan(data.draw, now.ranks)
        groups = list(optimizer.param_groups)
        lists = [group["params"] for group in groups]
        contents = [list(params) for params in lists]
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        before = {p: dict(optimizer.state[p]) for p in optimizer.state}  # the very tensors
        copies = {p: {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)} for p, state in before.items()}
        factors = {layer.name: layer.factors for layer in layers}
        values = {
            layer.name: [rows(f, dim) for f, dim in zip(layer.factors, (0, 0, 1), strict=True)] for layer in layers
        }

        changes = now.carry_out(plan)

        assert changes.keys() == plan.pruned.keys() | plan.added.keys()
        successors: dict[Tensor, Tensor] = {}
        for layer in layers:
            name, gone, num_new = layer.name, plan.pruned.get(layer.name, ()), plan.added.get(layer.name, 0)
            assert layer.rank == plan.ranks[name]
            for old, new, value, dim in zip(factors[name], layer.factors, values[name], (0, 0, 1), strict=True):
                assert (new is old) == (name not in changes)
                kept = [row for i, row in enumerate(value) if i not in gone]
                assert all(same_bits(a, b) for a, b in zip(rows(new, dim), kept, strict=False))
                successors[old] = new
                if old not in before:
                    assert new not in optimizer.state
                    continue
                state = optimizer.state[new]
                assert state.keys() == before[old].keys()
                for key, was in before[old].items():
                    if not isinstance(was, Tensor) or not was.dim():
                        assert state[key] is was  # a count of steps, a product of rates
                        continue
                    wanted = expected_rows(copies[old][key], dim, gone, num_new)
                    assert state[key].shape == new.shape and state[key].dtype == was.dtype
                    assert all(same_bits(a, b) for a, b in zip(rows(state[key], dim), wanted, strict=True))

        # Groups are patched in place: the same lists, the same order, every other entry the same object.
        assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
        for group, params, content, setting in zip(groups, lists, contents, settings, strict=True):
            assert group["params"] is params
            assert all(a is successors.get(b, b) for a, b in zip(params, content, strict=True))
            assert {key: value for key, value in group.items() if key != "params"} == setting
        # The state is that of what is held, and what no plan named is untouched to the last bit.
        assert {*optimizer.state} == {successors.get(p, p) for p in before}
        for parameter, state in before.items():
            if successors.get(parameter, parameter) is parameter:
                assert all(optimizer.state[parameter][key] is value for key, value in state.items())
                assert all(same_bits(state[key], copy) for key, copy in copies[parameter].items())
        now.step()
        assert all(bool(p.isfinite().all()) for p in lists[0])


@given(st.data())
def test_kept_rows_train_on_as_if_each_had_always_been_alone(data):
    """A parameter of its own for every row, from the first step on, under the same optimizer: the slow answer."""
    now = Situation(data.draw)
    factor = data.draw(st.sampled_from([0, 2]))
    dim = {0: 0, 2: 1}[factor]
    layer = now.layers[0]
    optimizer, whole = now.optimizer, layer.factors[factor]
    kind, defaults = type(optimizer), optimizer.defaults
    # torch's own: fused, its SGD rounds 16 elements and more otherwise than fewer.
    assume(not (kind is SGD and defaults["fused"] and whole.dtype == torch.bfloat16))
    (lr,) = {group["lr"] for group in optimizer.param_groups for p in group["params"] if p is whole}
    optimizer.state.clear()
    alone = [nn.Parameter(row) for row in rows(whole, dim)]
    settings = {key: value for key, value in defaults.items() if key not in ("lr", "decoupled_weight_decay")}
    slow = kind(alone, **{**settings, "lr": lr})
    # Adagrad has its state from the start, and below torch 2.13 needs it there.
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.update(kind(everything, **{**settings, "lr": lr}).state)

    def step() -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=now.generator).to(parameter)
        held = layer.factors[factor].grad
        assert held is not None
        for place, row in enumerate(alone):
            row.grad = held.select(dim, place).clone()
        optimizer.step()
        slow.step()

    for _ in range(data.draw(st.integers(1, 3))):
        step()
    for _ in range(data.draw(st.integers(1, 3))):
        plan = drawn_plan(data.draw, now.ranks)
        now.carry_out(plan)
        gone = plan.pruned.get(layer.name, ())
        alone[:] = [row for i, row in enumerate(alone) if i not in gone]
        for parameter in [p for group in slow.param_groups for p in group["params"]]:
            parameter.grad = None  # those that have gone no longer move
        step()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[whole.dtype]
    for row, expected in zip(rows(layer.factors[factor], dim), alone, strict=False):
        assert torch.allclose(row, expected, rtol=tolerance, atol=tolerance)
