"""PARA: one threshold on the singular values of all layers is the best cut of its budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from pedyra.methods.para import truncate


def updates(model: Any) -> dict[str, torch.Tensor]:
    """The dense update s B A of every layer."""
    layers: dict[str, Any] = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {
        name: layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        for name, layer in layers.items()
    }


def test_the_cut_keeps_the_largest_singular_values_of_all_layers(make_net: Any):
    model = make_net(trained=True, alpha_pattern={"layers.0": 40})  # its update counts with its own scaling
    before = updates(model)
    factors = {name: torch.linalg.svd(update, full_matrices=False) for name, update in before.items()}
    values = torch.cat([S[:4] for _, S, _ in factors.values()]).sort(descending=True).values
    threshold = values[2 * 3 - 1]  # a budget of rank 2 in three layers
    ranks = truncate(model, rank=2, budget="ranks")
    assert sum(ranks.values()) == 6
    for name, (U, S, Vh) in factors.items():
        kept = S >= threshold
        assert ranks[name] == int(kept[:4].sum())
        torch.testing.assert_close(updates(model)[name], (U[:, kept] * S[kept]) @ Vh[kept], rtol=1e-4, atol=1e-4)


def test_a_budget_of_parameters_is_never_exceeded(make_net: Any):
    model = make_net(trained=True)
    widths = {"layers.0": 20, "layers.1": 18, "layers.2": 12}
    ranks = truncate(model, rank=2, budget="parameters")
    assert sum(rank * widths[name] for name, rank in ranks.items()) <= 2 * 50


def test_a_run_trains_the_larger_lora_at_the_same_scaling_and_ends_at_the_budget(prepare: Any):
    run = prepare("para", method_settings={"budget": "ranks"})
    layers: list[Any] = [module for module in run.model.modules() if isinstance(module, LoraLayer)]
    assert {layer.r["default"] for layer in layers} == {16}
    assert {layer.scaling["default"] for layer in layers} == {32 / 4}
    run.train()
    ranks = [module.lora_A["default"].weight.shape[0] for module in layers]
    assert sum(ranks) == 4 * len(layers) and len(set(ranks)) > 1
    assert {layer.scaling["default"] for layer in layers} == {32 / 4}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"init": "pissa"}}, "lora.init is 'pissa', which moves pre-trained content into the adapter"),
        ({"method_settings": {"factor": 1}}, "method_settings.factor is 1; the trained rank must exceed lora.r"),
        ({"method_settings": {"budget": "bytes"}}, "method_settings.budget is 'bytes'"),
    ],
)
def test_what_it_cannot_do_is_told(prepare: Any, sections: Any, message: str):
    with pytest.raises(ValueError, match=message):
        prepare("para", **sections)


def test_layers_narrower_than_the_trained_rank_are_cut_too(make_net: Any):
    model = make_net(trained=True, r=9)
    before = updates(model)
    ranks = truncate(model, rank=6, budget="ranks")  # 18 of 8 + 6 + 6 singular values
    assert sum(ranks.values()) == 18
    values = {name: torch.linalg.svdvals(update) for name, update in before.items()}
    least = torch.cat([*values.values()]).sort(descending=True).values[17]
    assert ranks == {name: int((found >= least).sum()) for name, found in values.items()}


def test_a_run_that_diverged_is_cut_to_the_budget_and_stays_no_number(make_net: Any):
    model = make_net(trained=True, r=4)
    next(parameter for parameter in model.parameters() if parameter.requires_grad).data[0, 0] = torch.nan
    assert set(truncate(model, rank=2, budget="parameters").values()) == {2}
    assert any(update.isnan().any() for update in updates(model).values())
