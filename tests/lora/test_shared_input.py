"""Fused layers that share an input: PEFT's outputs and gradients, in whatever order they are used, and nothing held."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pedyra.lora import fused as fused_module
from pedyra.lora import shared_input
from pedyra.lora.attach import attach
from pedyra.lora.fused import fuse

QKV = ("q", "k", "v")


class Attention(nn.Module):
    """Three layers on one normalised input, which a residual connection uses too; `k` and `v` are narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(x)
        return {"q": self.q(x), "k": self.k(x), "v": self.v(x), "residual": x}


@pytest.fixture(autouse=True)
def _fuse_small_layers_too(monkeypatch) -> None:
    monkeypatch.setattr(fused_module, "_LEAST_ELEMENTS", (0, 0))


@pytest.fixture
def linked(monkeypatch) -> list[bool]:
    """For each fused call, whether it computed on what another layer passed on."""
    seen: list[bool] = []

    def passed_on(x: Tensor) -> Tensor:
        own = shared_input.passed_on(x)
        seen.append(own is not x)
        return own

    monkeypatch.setattr(fused_module, "passed_on", passed_on)
    return seen


def pair(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The same model as PEFT runs it, and fused; with an update in it."""
    models = []
    for fused in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(r=3, target_modules=list(QKV), init_lora_weights=False)
        model = get_peft_model(Attention().to(dtype), config)  # type: ignore[arg-type]
        for layer in attach(model):
            if fused:
                fuse(layer.module)
        models.append(model)
    return models[0], models[1]


def gradients(
    model: Any, x: Tensor, used: tuple[str, ...] = (*QKV, "residual"), autocast: bool = False
) -> list[Tensor]:
    """Of x and of every triple, for a loss over the outputs `used`; zeros where nothing arrives."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(x)
    loss(outputs, used).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in (x, *trained(model))]


def loss(outputs: dict[str, Tensor], used: tuple[str, ...]) -> Tensor:
    weighed = [
        outputs[name].float() * torch.linspace(-1, 2, outputs[name].numel()).view_as(outputs[name]) for name in used
    ]
    return torch.stack([value.square().sum() for value in weighed]).sum()


def trained(model: Any) -> list[Tensor]:
    return [tensor for tensor in model.parameters() if tensor.requires_grad]


def assert_near(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).abs().max()) <= tolerance * max(1e-3, float(other.abs().max()))


@pytest.mark.parametrize("tokens", [2, 40])  # added to the output, and to the weight
@pytest.mark.parametrize(
    "used", [(*QKV, "residual"), QKV, ("q",), ("k",), ("v",), ("q", "v"), ("residual",)], ids="-".join
)
def test_gradients_are_those_of_pefts_forward_whatever_of_the_outputs_is_used(tokens, used, linked):
    plain, fused = pair()
    x = torch.randn(tokens, 8)
    assert_near(gradients(fused, x, used), gradients(plain, x, used))
    assert linked == [False, True, True]


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(tokens, autocast, linked):
    dtype = torch.float32 if autocast else torch.bfloat16
    plain, fused = pair(dtype)
    x = torch.randn(tokens, 8, dtype=dtype)
    assert_near(gradients(fused, x, autocast=autocast), gradients(plain, x, autocast=autocast), tolerance=0.05)
    assert linked == [False, True, True]


def test_each_output_may_have_a_backward_pass_of_its_own(linked):
    plain, fused = pair()
    for model in (plain, fused):
        x = torch.ones(40, 8, requires_grad=True)
        outputs = model(x)
        for name in ("q", "v", "k"):
            loss(outputs, (name,)).backward(retain_graph=True)
        loss(outputs, QKV).backward()
        model.all = [x.grad, *(p.grad for p in trained(model))]
    assert_near(fused.all, plain.all)


def test_outputs_of_a_leaf_need_no_retained_graph(linked):
    plain, fused = pair()
    for model in (plain, fused):
        x = torch.ones(40, 8, requires_grad=True)
        layers = model.base_model.model
        outputs = [layers.q(x), layers.k(x)]
        outputs[1].sum().backward()
        outputs[0].square().sum().backward()
        model.all = [x.grad, *(p.grad for p in trained(layers.q)), *(p.grad for p in trained(layers.k))]
    assert_near(fused.all, plain.all)
    assert not any(linked)


def test_an_input_that_was_changed_is_another_input(linked):
    plain, fused = pair()
    for model in (plain, fused):
        x = torch.ones(40, 8, requires_grad=True)
        layers = model.base_model.model
        hidden = x * 2
        with torch.no_grad():
            layers.q(hidden)
        hidden.mul_(torch.linspace(0, 1, 8))
        first = layers.q(hidden)
        second = layers.k(hidden)
        (first.square().sum() + second.square().sum()).backward()
        model.all = [x.grad, *(p.grad for p in trained(layers.k))]
    assert_near(fused.all, plain.all)
    assert linked == [False, True]
    hidden = torch.ones(40, 8, requires_grad=True) * 2
    layers = fused.base_model.model
    layers.q(hidden)
    hidden.mul_(3)
    layers.k(hidden)
    assert linked[2:] == [False, False]


def test_a_layer_called_after_the_backward_pass_starts_anew(linked):
    _, fused = pair()
    layers = fused.base_model.model
    hidden = torch.ones(40, 8, requires_grad=True) + 1  # a sum saves nothing that a backward pass would free
    layers.q(hidden).sum().backward()
    layers.k(hidden).sum().backward()
    assert linked == [False, False]


def test_nothing_is_passed_on_without_gradients(linked):
    _, fused = pair()
    with torch.no_grad():
        fused(torch.randn(40, 8))
    fused.base_model.model.q(torch.randn(40, 8))
    assert linked == []


class Marked(torch.autograd.Function):
    """The identity, with an object in its graph that a test can watch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mark: Any) -> Tensor:
        ctx.mark = mark
        return x.clone()


class Mark:
    pass


def test_neither_the_input_nor_its_graph_is_held_once_the_model_lets_go():
    _, fused = pair()
    mark = Mark()
    hidden = Marked.apply(torch.ones(40, 8, requires_grad=True), mark)
    graph, alive = weakref.ref(mark), weakref.ref(hidden)
    result = fused.base_model.model.q(hidden)
    del hidden, mark
    assert alive() is None and graph() is not None  # the graph of the result goes back to it
    del result
    gc.collect()
    assert graph() is None


def test_threads_do_not_see_each_others_inputs(linked):
    _, fused = pair()
    layers = fused.base_model.model
    hidden = torch.ones(40, 8, requires_grad=True) * 2
    layers.q(hidden)
    other = threading.Thread(target=lambda: layers.k(hidden))
    other.start()
    other.join()
    assert linked == [False, False]
