"""RandLoRA: its r is chosen for LoRA's parameters, and what it cannot do is told."""

from __future__ import annotations

from typing import Any

import pytest

from pedyra.methods.randlora import nearest_r, parameters_of


def trainable(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "randlora" in name)


def test_parameters_by_hand():
    # in 8, out 6, r 4: n = ceil(6 / 4) = 2 bases of 4 + 6 scalings; r 6: one base of 12; 3 and 10: 3 / 3 = 1 of 6.
    assert parameters_of(4, [(8, 6)]) == 20
    assert parameters_of(6, [(8, 6)]) == 12
    assert parameters_of(3, [(8, 6), (10, 3)]) == 2 * 9 + 6


def test_the_nearest_r_beats_every_other():
    shapes = [(64, 64), (64, 128), (128, 64)]
    chosen = nearest_r(shapes, 2000)
    distances = {r: abs(parameters_of(r, shapes) - 2000) for r in range(1, 65)}
    assert distances[chosen] == min(distances.values())


def test_the_model_has_the_counted_parameters_near_those_of_lora(prepare: Any):
    model = prepare("randlora").model
    layers = [module for module in model.modules() if hasattr(module, "randlora_lambda")]
    shapes = [(layer.in_features, layer.out_features) for layer in layers]
    r = model.peft_config["default"].r
    assert trainable(model) == parameters_of(r, shapes)
    lora = sum(4 * sum(shape) for shape in shapes)
    assert abs(trainable(model) - lora) < 0.05 * lora


def test_more_r_is_fewer_parameters(prepare: Any):
    few, many = (trainable(prepare("randlora", method_settings={"r": r}).model) for r in (32, 4))
    assert few < many


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method_settings": {"rank_pattern": {"query": 2}}}, "shares its random bases over all layers"),
        ({"lora": {"use_dora": True}}, "lora.use_dora is True, but PEFT's RandLoRA does not have it"),
        ({"method_settings": {"r": 0}}, "method_settings.r is 0"),
    ],
)
def test_what_it_cannot_do_is_told(prepare: Any, sections: Any, message: str):
    with pytest.raises(ValueError, match=message):
        prepare("randlora", **sections)
