"""RandLoRA: its r is chosen for LoRA's parameters, and what it cannot do is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.randlora.layer import RandLoraLayer
from torch import nn

from pedyra.methods.randlora import nearest_r, parameters_of
from pedyra.methods.registry import get_method


def trainable(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "randlora" in name)


def test_parameters_by_hand():
    # in 8, out 6, r 4: n = ceil(6 / 4) = 2 bases of 4 + 6 scalings; r 6: one base of 12; 3 and 10: 3 / 3 = 1 of 6.
    assert parameters_of(4, [(8, 6)]) == 20
    assert parameters_of(6, [(8, 6)]) == 12
    assert parameters_of(3, [(8, 6), (10, 3)]) == 2 * 9 + 6


def test_the_nearest_r_beats_every_other():
    shapes = [(64, 64), (64, 128), (128, 64)]
    distances = {r: abs(parameters_of(r, shapes) - 2000) for r in range(1, 65)}
    assert distances[nearest_r(shapes, 2000)] == min(distances.values())


def test_the_model_has_the_counted_parameters_near_those_of_lora(prepare: Any):
    model = prepare("randlora").model
    layers = [module for module in model.modules() if hasattr(module, "randlora_lambda")]
    shapes = [(layer.in_features, layer.out_features) for layer in layers]
    r = model.peft_config["default"].r
    assert trainable(model) == parameters_of(r, shapes)
    lora = sum(4 * sum(shape) for shape in shapes)
    assert abs(trainable(model) - lora) < 0.05 * lora


def scales(run: Any) -> dict[tuple[int, int], float]:
    layers = [module for module in run.model.modules() if hasattr(module, "randlora_lambda")]
    return {(layer.in_features, layer.out_features): layer.scaling["default"] for layer in layers}


def test_the_scale_is_the_authors(prepare: Any):
    # alpha 2 r: 2 / sqrt(n), with n = min(in, out) / 4 bases.
    for (n_in, n_out), scale in scales(prepare("randlora", settings={"r": 4})).items():
        assert scale == pytest.approx(2 / (min(n_in, n_out) / 4) ** 0.5)


def test_what_is_excluded_is_left_out():
    base = nn.ModuleDict({"q": nn.Linear(16, 16), "head": nn.ModuleDict({"q": nn.Linear(16, 16)})})
    lora = LoraConfig(r=2, target_modules=["q"], exclude_modules=["head.q"])
    model: Any = get_method("randlora").begin(base, lora, {})[0]
    assert [name for name, each in model.get_base_model().named_modules() if isinstance(each, RandLoraLayer)] == ["q"]


def test_layers_of_fewer_bases_train_at_their_own_scale_and_are_saved_at_pefts():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))  # 4 bases of rank 4, and 1
    lora = LoraConfig(r=2, target_modules=["0", "1"])
    model, method = get_method("randlora").begin(base, lora, {"r": 4})
    assert method is not None
    work = method.install(model)
    layers: list[Any] = [each for each in model.modules() if hasattr(each, "randlora_lambda")]
    assert [layer.scaling["default"] for layer in layers] == [1, 2]  # alpha / r = 2, by sqrt 4 and 1
    for layer in layers:
        nn.init.normal_(layer.randlora_lambda["default"])
    x = torch.randn(3, 16)
    expected = model(x)
    work.end()
    torch.testing.assert_close(model(x), expected)
    assert [layer.scaling["default"] for layer in layers] == [2, 2]  # PEFT's one alpha / r
