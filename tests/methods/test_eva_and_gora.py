"""EVA and GoRA decide once, before the first step: their ranks and their start against numpy."""

from __future__ import annotations

from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import pedyra
from pedyra.allocate.contract import Training

IN, HIDDEN, OUT, ROWS = 6, 10, 4, 40


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(IN, HIDDEN, bias=False), nn.Linear(HIDDEN, OUT, bias=False)
        for layer in (self.first, self.second):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.second(self.first(x).tanh())


def model_of(r: int, **lora: Any) -> Any:
    return get_peft_model(Net(), LoraConfig(r=r, lora_alpha=3 * r, target_modules=["first", "second"], **lora))  # type: ignore[arg-type]


def loss(model: Any, x: Tensor, target: Tensor, **more: Tensor) -> Tensor:
    return (model(x, **more) - target).square().mean()


def training_of(*batches: Any) -> Training:
    def losses() -> Any:
        return cycle(batches)

    return Training(steps=lambda: 1, batches=losses, losses=lambda part: (losses(), losses()))


def batches_of(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    stretched = torch.tensor([8.0, 4.0, 1.0, 0.5, 0.2, 0.1])
    return [
        (torch.randn(ROWS, IN, generator=generator) * stretched, torch.randn(ROWS, OUT, generator=generator))
        for _ in range(count)
    ]


def factors(model: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    layer = model.base_model.model.get_submodule(name)
    return tuple(slot["default"].weight.detach().double().numpy() for slot in (layer.lora_A, layer.lora_B))  # type: ignore[return-value]


@torch.no_grad()
def mean_loss(model: Any, batches: list[tuple[Tensor, Tensor]]) -> float:
    return sum(float(loss(model, *batch)) for batch in batches) / len(batches)


@pytest.mark.parametrize("padded", [False, True])
def test_eva_takes_the_directions_that_explain_most_of_all_layers(padded: bool):
    ((x, target),) = batches_of(1)
    real, more = x, {}
    if padded:  # what stands in the padding would outweigh all else
        real, mask = x.reshape(4, 10, IN), torch.ones(4, 10)
        mask[:, 7:] = 0
        x = torch.where(mask[..., None] > 0, real, torch.full_like(real, 1e3))
        real, target, more = real[:, :7].reshape(-1, IN), target.reshape(4, 10, OUT), {"attention_mask": mask}
    model = model_of(3)
    pedyra.Eva(rho=2).install(model, training=training_of(partial(loss, x=x, target=target, **more)))

    inputs = {"first": real.double().numpy()}
    inputs["second"] = np.tanh(inputs["first"] @ Net().first.weight.detach().double().numpy().T)
    directions, shares = {}, []
    for name, seen in inputs.items():
        _, values, directions[name] = np.linalg.svd(seen - seen.mean(0), full_matrices=False)
        shares += [(share, name) for share in (values**2 / (values**2).sum())[:6]]
    best = [name for _, name in sorted(shares, reverse=True)[:6]]
    for name in inputs:
        A, B = factors(model, name)
        assert len(A) == best.count(name) and best.count("first") != 3
        assert np.abs((A * directions[name][: len(A)]).sum(1)) == pytest.approx(1, abs=1e-3)
        assert not B.any()
        layer = model.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == pytest.approx(3)
    config = model.peft_config["default"]
    assert config.init_lora_weights is True and config.eva_config is None


def test_eva_names_a_layer_that_sees_too_little():
    ((x, target),) = batches_of(1)
    with pytest.raises(ValueError, match=r"first sees 5 inputs in a batch, and EVA looks for 6 directions"):
        pedyra.Eva().install(model_of(3), training=training_of(partial(loss, x=x[:5], target=target[:5])))


def test_gora_shares_ranks_by_weight_times_gradient_and_begins_with_a_step_of_descent():
    batches = batches_of(32)
    model = model_of(3)
    method = pedyra.Gora(gamma=0.02, seed=4)
    training = training_of(*(partial(loss, x=x, target=target) for x, target in batches))
    before = mean_loss(model, batches)
    method.install(model, training=training)

    W = {name: getattr(Net(), name).weight.detach().double().numpy() for name in ("first", "second")}
    x, target = (torch.cat([each[place] for each in batches]).double().numpy() for place in (0, 1))
    hidden = np.tanh(x @ W["first"].T)
    error = 2 * (hidden @ W["second"].T - target) / target.size
    G = {"second": error.T @ hidden, "first": ((error @ W["second"]) * (1 - hidden**2)).T @ x}
    importance = {name: np.abs(W[name] * G[name]).mean() for name in W}
    sizes = {name: sum(W[name].shape) ** 0.5 for name in W}
    ranks = {}
    for name in W:
        share = importance[name] / sum(importance.values())
        ranks[name] = int(np.clip(round(3 * sum(sizes.values()) * share / sizes[name]), 2, 12))
    assert ranks["first"] != ranks["second"]
    for name in W:
        A, B = factors(model, name)
        assert len(A) == ranks[name]
        step = -0.02 * (A.shape[1] / len(A)) ** 0.5 * G[name] @ np.linalg.pinv(A) @ A
        assert 3 * B @ A == pytest.approx(step, rel=1e-3, abs=1e-6)
        layer = model.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == pytest.approx(3) and not layer.base_layer.weight.requires_grad
    assert mean_loss(model, batches) < before


def test_gora_refuses_weights_without_gradients():
    ((x, target),) = batches_of(1)
    with pytest.raises(ValueError, match=r"first is torch.float16; load the model in float32 or bfloat16"):
        pedyra.Gora().install(model_of(3).half(), training=training_of(partial(loss, x=x, target=target)))
