"""LoRA+: B and A in groups whose learning rates have the given ratio."""

from __future__ import annotations

from typing import Any


def test_the_groups_have_the_ratio_and_hold_every_parameter_once(prepare: Any):
    run = prepare("lora+", settings={"ratio": 8})
    names = {id(p): name for name, p in run.model.named_parameters()}
    rates = {
        names[id(p)]: group["lr"] for group in run.trainer.create_optimizer().param_groups for p in group["params"]
    }
    assert set(rates) == {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-2}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {8e-2}
