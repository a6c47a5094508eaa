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


WIDTHS = {"layers.0": 20, "layers.1": 18, "layers.2": 12}


def check_cut(values: dict[str, torch.Tensor], ranks: dict[str, int], budget: int) -> None:
    """What is left has the largest singular values, within the budget, and with the best of the rest beyond it."""
    of_all = [(float(S[i]), i < ranks[name], WIDTHS[name]) for name, S in values.items() for i in range(len(S))]
    kept, gone = ([each for each in of_all if each[1] is which] for which in (True, False))
    assert min(kept)[0] >= max(gone)[0]
    spent = sum(width for _, _, width in kept)
    assert spent <= budget < spent + max(gone)[2]


def test_the_cut_keeps_the_largest_singular_values_of_all_layers(make_net: Any):
    model = make_net(trained=True, alpha_pattern={"layers.0": 40})  # its update counts with its own scaling
    factors = {name: torch.linalg.svd(update, full_matrices=False) for name, update in updates(model).items()}
    ranks = truncate(model, rank=2)
    check_cut({name: S[:4] for name, (_, S, _) in factors.items()}, ranks, 2 * 50)
    for name, (U, S, Vh) in factors.items():
        r = ranks[name]
        torch.testing.assert_close(updates(model)[name], (U[:, :r] * S[:r]) @ Vh[:r], rtol=1e-4, atol=1e-4)


def test_a_run_trains_the_larger_lora_at_the_same_scaling_and_ends_at_the_budget(prepare: Any):
    run = prepare("para")
    layers: list[Any] = [module for module in run.model.modules() if isinstance(module, LoraLayer)]
    assert {layer.r["default"] for layer in layers} == {16}
    assert {layer.scaling["default"] for layer in layers} == {32 / 4}
    run.train()
    ranks = [module.lora_A["default"].weight.shape[0] for module in layers]
    assert len(set(ranks)) > 1 and sum(ranks) < 16 * len(layers)
    spent = sum(rank * (layer.in_features + layer.out_features) for rank, layer in zip(ranks, layers, strict=True))
    assert spent <= 4 * sum(layer.in_features + layer.out_features for layer in layers)
    assert {layer.scaling["default"] for layer in layers} == {32 / 4}


def test_a_layer_that_cannot_be_cut_is_refused_before_the_training(prepare: Any):
    with pytest.raises(ValueError, match="word_embeddings is a LoRA layer of kind Embedding"):
        prepare("para", lora={"target_modules": ["query", "word_embeddings"]})


def test_a_start_that_takes_from_the_weight_is_refused(prepare: Any):
    with pytest.raises(ValueError, match="lora.init is 'pissa', which moves pre-trained content into the adapter"):
        prepare("para", lora={"init": "pissa"})


def test_layers_narrower_than_the_trained_rank_are_cut_too(make_net: Any):
    model = make_net(trained=True, r=9)
    before = updates(model)
    ranks = truncate(model, rank=6)
    check_cut({name: torch.linalg.svdvals(update) for name, update in before.items()}, ranks, 6 * 50)


def test_a_run_that_diverged_is_cut_to_the_budget_and_stays_no_number(make_net: Any):
    model = make_net(trained=True, r=4)
    next(parameter for parameter in model.parameters() if parameter.requires_grad).data[0, 0] = torch.nan
    assert set(truncate(model, rank=2).values()) == {2}
    assert any(update.isnan().any() for update in updates(model).values())
