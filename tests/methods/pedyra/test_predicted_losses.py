"""What pruning a triple costs, by the curvature of earlier trials, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pedyra.lora.attach import attach
from pedyra.methods.pedyra.swaps import Gain, curvatures
from pedyra.methods.pedyra.trials import choose, known_lengths, predicted_losses


@pytest.fixture
def layers() -> list[Any]:
    base = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["0", "1"]))  # type: ignore[arg-type]
    found = attach(model)
    with torch.no_grad():
        for layer in found:
            layer.a.A.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
            layer.b.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    return found


def test_without_trials_all_curve_alike(layers):
    # ||s b a||: 2 * 1 * 5 and 2 * 2 * 1.
    assert predicted_losses(known_lengths(layers), curvatures(["0", "1"], [])) == {"0": [50.0, 8.0], "1": [50.0, 8.0]}


def test_a_layers_own_trials_tell_its_curvature(layers):
    # Layer 0 was tried at length 2: slope 8, h = 4; all layers, which are this one, say the same. The errors count.
    looks: list[Any] = [{}, {"0": {1: Gain(7.0, 1.0, 9.0, 2.0)}}]
    assert predicted_losses(known_lengths(layers), curvatures(["0", "1"], looks))["0"] == pytest.approx([4 * 50, 4 * 8])
    assert curvatures(["0", "1"], looks)["0"].by_energy == pytest.approx(4 / 9)
    # A second layer of h = 1: sums 16 and 4, counting half, and 4 and 4; the mean of both is one trial more.
    looks.append({"1": {0: Gain(2.0, 0.0, 1.0, 2.0)}})
    mean_slope, mean_length = (0.5 * 16 + 4) / 1.5, (0.5 * 4 + 4) / 1.5
    expected = (4 + mean_slope) / (4 + mean_length) * 50
    assert predicted_losses(known_lengths(layers), curvatures(["0", "1"], looks))["1"][0] == pytest.approx(expected)


def test_a_layer_whose_curvature_is_unknown_is_tried_by_its_lowest_old_triple(layers):
    known: Any = dict(curvature=curvatures(["0", "1"], []), prices={"0": 1, "1": 1}, moves=0)
    assert choose(layers, born={}, unknown={"1"}, min_rank=0, **known)[0] == {"1": (1,)}  # the longest first
    assert choose(layers, born={"1": 1}, unknown={"1"}, min_rank=0, **known)[0] == {"1": (0,)}
    assert choose(layers, born={}, unknown={"1"}, min_rank=2, **known)[0] == {}
