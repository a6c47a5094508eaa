"""PE-DyRA where a kernel reads a layer's weights and never calls it: exact by gradients alone, refused by inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from windows import adamw

from pedyra import PeDyra, RankAllocator

STEPS = 12
SETTINGS: dict[str, Any] = dict(interval=2, initial_warmup=2, final_warmup=3, moves=3)


def fused_kernel(model: Any, bypassed: tuple[int, ...] = (0, 1, 2)) -> Any:
    """`model`, whose forward reads the weights of these layers, as the kernels of unsloth and axolotl do."""
    net = model.get_base_model()

    def of(index: int, layer: Any, x: Tensor) -> Tensor:
        if index not in bypassed:
            return layer(x)
        hidden = F.linear(x, layer.lora_A["default"].weight)
        return layer.base_layer(x) + F.linear(hidden, layer.lora_B["default"].weight) * layer.scaling["default"]

    def forward(x: Tensor) -> Tensor:
        for index, layer in enumerate(net.layers):
            x = torch.tanh(of(index, layer, x))
        return x

    net.forward = forward
    return model


def allocate(model: Any, **settings: Any) -> RankAllocator:
    return RankAllocator(model, adamw(model), PeDyra.as_published(**{**SETTINGS, **settings}), STEPS)


def test_by_gradients_alone_it_is_exact(make_net, train_net):
    called, bypassed = make_net(), fused_kernel(make_net())
    histories = []
    for model in (called, bypassed):
        allocator = allocate(model, alpha=1.0)
        histories.append(train_net(model, allocator.optimizer, allocator, STEPS))
    assert len(histories[0]) == 3 and any(record["pruned"] for record in histories[0])
    for expected, found in zip(*histories, strict=True):
        assert found["ranks"] == expected["ranks"]
        for name, scores in expected["scores"].items():
            assert found["scores"][name] == pytest.approx(scores, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("start", ["svd", "lora"])
@pytest.mark.parametrize(("bypassed", "named"), [((0, 1, 2), "layers.0"), ((1,), "layers.1")])
def test_by_inputs_it_raises_before_the_first_step_that_it_observes(bypassed, named, start, make_net, train_net):
    model = fused_kernel(make_net(), bypassed)
    allocator = allocate(model, start=start)
    with pytest.raises(ValueError, match=f"no input of {named} was seen, although it is trained: .* alpha=1"):
        train_net(model, allocator.optimizer, allocator, STEPS)
    assert allocator.step == 0  # at once: nothing is lost


def test_a_kernel_that_takes_over_later_raises_before_the_next_adjustment(make_net, train_net):
    model = make_net()
    allocator = allocate(model)
    train_net(model, allocator.optimizer, allocator, 4)
    ranks = allocator.ranks
    fused_kernel(model, (2,))
    with pytest.raises(ValueError, match="no input of layers.2 was seen"):
        train_net(model, allocator.optimizer, allocator, 4, first=5)
    assert allocator.ranks == ranks and allocator.step == 5


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_layer_that_no_token_reached_has_no_gradient_and_raises_nothing(set_to_none, make_net, net_batch):
    """An expert, say: in the first step all layers run, in the others the second does not."""

    class Routed(nn.Module):
        def __init__(self, layers: Any) -> None:
            super().__init__()
            self.layers, self.on = layers, True

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.layers[0](x))
            return torch.tanh(self.layers[2](torch.tanh(self.layers[1](x)) if self.on else x[:, :6]))

    model = make_net().train()
    net = model.get_base_model()
    routed = Routed(net.layers)
    net.forward = routed.forward
    allocator = allocate(model)
    for step in range(1, STEPS + 1):
        routed.on = step == 1
        x, y = net_batch(step)
        (model(x) - y).square().mean().backward()
        allocator.before_step()
        allocator.optimizer.step()
        allocator.optimizer.zero_grad(set_to_none=set_to_none)
        allocator.after_step()
    assert len(allocator.history) == 3
