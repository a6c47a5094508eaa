"""TriAdaptLoRA: a triangular core that grows by appending, scores from its norm, and gradients from the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import same_bits
from torch import nn
from windows import inside

from pedyra.methods.triadaptlora import CoreFactor, TriAdaptLora, gaussian_core, growing_layers


def test_the_core_is_the_sum_of_two_triangles():
    """Rank n gives a row of n entries to C_low and a column of n to C_up: the authors' two parameters, concatenated."""
    rows = [torch.tensor([1.0]), torch.tensor([2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])]
    columns = [torch.tensor([10.0]), torch.tensor([20.0, 30.0]), torch.tensor([40.0, 50.0, 60.0])]
    packed = torch.cat([part for pair in zip(rows, columns, strict=True) for part in pair])
    factor = CoreFactor(nn.Parameter(torch.randn(3, 5)), nn.Parameter(packed))
    low, up = torch.zeros(3, 3), torch.zeros(3, 3)
    for n in range(3):
        low[n, : n + 1] = rows[n]
        up[: n + 1, n] = columns[n]
    assert same_bits(factor.core, low + up)
    torch.testing.assert_close(factor.weight, (low + up) @ factor.A)


def test_growing_appends_to_the_core_and_moves_nothing():
    generator = torch.Generator().manual_seed(0)
    packed = gaussian_core(0, 2, generator)
    before = CoreFactor(nn.Parameter(torch.zeros(2, 5)), nn.Parameter(packed)).core
    grown = torch.cat([packed, gaussian_core(2, 1, generator)])
    after = CoreFactor(nn.Parameter(torch.zeros(3, 5)), nn.Parameter(grown)).core
    assert len(grown) == 3 * 4 and same_bits(after[:2, :2], before)


def test_with_identity_e_the_core_is_the_identity():
    factor = CoreFactor(nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.zeros(20)))
    factor.E.data = factor.identity_e(4)
    assert same_bits(factor.core, torch.eye(4))


def test_a_model_without_numbers_leaves_none_to_the_next():
    with torch.device("meta"):
        CoreFactor(nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.zeros(56))).core  # noqa: B018
    factor = CoreFactor(nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.ones(56)))
    assert factor.core.sum() == 56


def test_how_many_layers_grow_by_hand():
    assert growing_layers(missing=28, part=0.25, layers=10) == 7
    assert growing_layers(missing=28, part=0.01, layers=10) == 1
    assert growing_layers(missing=28, part=0.9, layers=10) == 10


def test_the_highest_increase_grows_and_the_scaling_follows(situation: Any):
    method = TriAdaptLora(final_rank=3)
    # Step 4: c = 2 / 18; 6 - 2 = 4 ranks are missing, so m = max(1, int(4 / 9)) = 1. Scores may be negative.
    plan = method.plan({"a": [-0.2], "b": [-0.1]}, situation({"a": 1, "b": 1}))
    assert plan.added == {"b": 1} and plan.rescale == {"b": 1 / 2}
    # The last adjustment gives out what is missing, down the ranking.
    last = method.plan({"a": [0.2], "b": [0.1, 0.1]}, situation({"a": 1, "b": 2}, step=14))
    assert last.added == {"a": 2, "b": 1} and sum(last.ranks.values()) == 6


def test_the_score_is_the_increase_of_the_norm_since_the_last_check(prepare: Any):
    run = prepare("triadaptlora").train()
    scores = inside(run.allocator).scores
    before = scores.norms()
    layer: Any = run.allocator.layers[0]
    scores.layer_scores()
    scores.resize({})  # a check
    with torch.no_grad():
        layer.a.E.mul_(3)
    increase = scores.triple_scores()
    assert increase[layer.name] == pytest.approx([2 * float(before[0])] * layer.rank, rel=1e-5)
    assert increase[run.allocator.layers[1].name] == [0.0] * run.allocator.layers[1].rank


def test_the_start_learns_where_two_published_variants_do_not(prepare: Any):
    """B = 0 leaves B's gradient alive; B = 0 and C = 0 together, as in `abc0` and `cb0`, leave none."""
    run = prepare("triadaptlora")
    gradients = run.gradients()
    assert all(bool(g.any()) == ("lora_B" in name) for name, g in gradients.items())
    for name, parameter in run.model.named_parameters():
        if name.endswith(".E"):
            nn.init.zeros_(parameter)
    assert not any(g.any() for g in run.gradients().values())


def test_a_run_meets_the_budget_and_counts_its_core(prepare: Any):
    run = prepare("triadaptlora").train()
    layers = run.allocator.layers
    assert sum(layer.rank for layer in layers) == 4 * len(layers)
    for layer in layers:
        r = layer.rank
        assert layer.parameters == r * (layer.a.in_features + layer.b.out_features) + r * (r + 1)
        assert layer.scaling == pytest.approx(32 / r)
