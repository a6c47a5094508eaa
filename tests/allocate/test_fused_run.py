"""rank.fused in a whole run: the same training, and a word where it can do nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from windows import pedyra

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.config import RankConfig
from pedyra.lora import fused
from pedyra.lora.fused import FusedLinear

SCHEDULE: dict[str, Any] = dict(
    interval=4,
    initial_warmup=4,
    final_warmup=4,
    moves=2,
    min_rank=1,
    start="svd",
    alpha=0.5,
)


EAGER: dict[str, Any] = dict(interval=8, initial_warmup=4, final_warmup=4, moves=4, certainty=0.0, margin=1e-3)
"""Sketches and trials, as by default; whatever gains anything replaces what is on trial."""


def run(make_net, train_net, on: bool, steps: int = 20, schedule: dict[str, Any] = SCHEDULE):
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given: dict[str, Any] = (
        {"config": RankConfig.scored(fused=on, **schedule)} if "alpha" in schedule else pedyra(fused=on, **schedule)
    )
    allocator = RankAllocator(model, optimizer, total_steps=steps, **given)
    train_net(model, optimizer, allocator, steps)
    return model, allocator


def test_trains_as_pefts_forward_does_through_every_resize(make_net, train_net, monkeypatch):
    monkeypatch.setattr(fused, "_LEAST_ELEMENTS", (0, 0))
    (plain, ours), (together, theirs) = (run(make_net, train_net, on) for on in (False, True))
    assert ours.ranks == theirs.ranks and len(ours.history) == 2
    x = torch.randn(5, 8)
    assert torch.allclose(together(x), plain(x), rtol=1e-4, atol=1e-5)
    assert all(type(layer.module) is FusedLinear for layer in theirs.layers)


def test_a_run_with_sketches_and_trials_takes_the_same_decisions(make_net, train_net, monkeypatch):
    monkeypatch.setattr(fused, "_LEAST_ELEMENTS", (0, 0))
    probed: list[bool] = []
    function = fused.AddedToOutput  # the batches of `train_net` are too small to add to the weight
    apply = function.apply
    monkeypatch.setattr(function, "apply", lambda *args: (probed.append(args[6] is not None), apply(*args))[1])
    (plain, ours), (together, theirs) = (run(make_net, train_net, on, 52, EAGER) for on in (False, True))
    decided = [
        [
            (record["ranks"], [triple[:2] for triple in record["pruned"]], record["added"])
            for record in allocator.history
        ]
        for allocator in (ours, theirs)
    ]
    assert decided[0] == decided[1] and sum(bool(added) for _, _, added in decided[0]) >= 2
    for one, other in zip(ours.history, theirs.history, strict=True):
        assert [trial[2:] for trial in one["trials"]] == [
            pytest.approx(trial[2:], rel=1e-2, abs=1e-5) for trial in other["trials"]
        ]
    x = torch.randn(5, 8)
    assert torch.allclose(together(x), plain(x), rtol=1e-3, atol=1e-4)
    assert sum(probed) >= 3 * 40 and not all(probed)


def test_turning_it_off_gives_pefts_layers_back(make_net):
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters())
    RankAllocator(model, optimizer, RankConfig.scored(fused=True, **SCHEDULE), total_steps=20).release()
    allocator = RankAllocator(model, optimizer, RankConfig.scored(fused=False, **SCHEDULE), total_steps=20)
    assert all(type(layer.module) is Linear for layer in allocator.layers)


def test_says_when_no_layer_can_be_fused(make_net):
    model = make_net(use_dora=True)
    with pytest.warns(UserWarning, match="no layer can be fused"):
        RankAllocator(
            model, torch.optim.AdamW(model.parameters()), RankConfig.scored(fused=True, **SCHEDULE), total_steps=20
        )


def begin(model: Any, caplog: Any) -> RankAllocator:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with caplog.at_level("INFO", "pedyra"):
        return RankAllocator(model, optimizer, RankConfig.scored(**SCHEDULE), total_steps=20)


def test_by_default_layers_are_fused_where_that_is_exact_and_a_line_says_so(make_net, caplog):
    model = make_net(lora_dropout=0.0)
    model.base_model.model.layers[1].lora_dropout["default"] = torch.nn.Dropout(0.5)
    allocator = begin(model, caplog)
    assert allocator.fused_layers == allocator.describe()["fused_layers"] == 2
    assert "the fused forward runs in 2 of 3 layers" in caplog.text


def test_by_default_a_gpu_keeps_pefts_forward(make_net, caplog, monkeypatch):
    monkeypatch.setattr("pedyra.allocate.claim.MEASURED_ON", ())
    allocator = begin(make_net(), caplog)
    assert allocator.fused_layers == 0 and all(type(layer.module) is Linear for layer in allocator.layers)
    assert "PEFT's forward runs in all 3 layers (rank.fused='auto')" in caplog.text
