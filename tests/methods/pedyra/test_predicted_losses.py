"""What pruning a triple costs, by the curvature of earlier trials, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pedyra.lora.attach import attach
from pedyra.methods.pedyra.trials import known_curvature, known_lengths, predicted_losses, scouts


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
    assert predicted_losses(known_lengths(layers), known_curvature(layers, [])) == {"0": [50.0, 8.0], "1": [50.0, 8.0]}


def test_a_layers_own_trials_tell_its_curvature(layers):
    # Layer 0 was tried at length 2: slope 8, h = 4; all layers, which are this one, say the same. The errors count.
    history = [{"added": {}, "trials": []}, {"added": {}, "trials": [["0", 1, 7.0, 1.0, 9.0, 2.0]]}]
    assert predicted_losses(known_lengths(layers), known_curvature(layers, history))["0"] == pytest.approx(
        [4 * 50, 4 * 8]
    )
    assert known_curvature(layers, history)["0"].by_reach == pytest.approx(4 / 9)
    # A second layer of h = 1: sums 16 and 4, counting half, and 4 and 4; the mean of both is one trial more.
    history.append({"added": {}, "trials": [["1", 0, 2.0, 0.0, 1.0, 2.0]]})
    mean_slope, mean_length = (0.5 * 16 + 4) / 1.5, (0.5 * 4 + 4) / 1.5
    expected = (4 + mean_slope) / (4 + mean_length) * 50
    assert predicted_losses(known_lengths(layers), known_curvature(layers, history))["1"][0] == pytest.approx(expected)


def test_a_layer_that_may_grow_is_scouted_once_by_its_lowest_old_triple():
    scores, old = {"a": [3.0, 2.0, 0.0], "b": [1.0, 5.0], "c": [1.0], "d": [2.0, 1.0]}, {"a": 2, "b": 2, "c": 1, "d": 2}
    sure, noise = [5.1, 1.0, 1.0], [5.0, 1.0, 1.0]
    seen = {"trials": [["d", 0, 1.0, 0.1, 1.0, 1.0]], "gains": {}, "chance": 0.0}
    history = [seen, {"gains": {"a": sure, "b": noise, "c": sure, "d": sure}, "chance": 5.0}]
    found: Any = lambda min_rank, past: scouts(scores, min_rank=min_rank, old=old, history=past)  # noqa: E731
    assert found(0, history) == {"a": (1,), "c": (0,)}  # b is noise, d was tried
    assert found(1, history) == {"a": (1,)}  # c keeps its one
    assert found(0, history[1:]) == {"a": (1,), "c": (0,), "d": (1,)}
