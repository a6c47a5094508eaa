"""`fused` in a whole run: the same training, and a word where it can do nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from windows import on_lora

from pedyra import PeDyra, RankAllocator, Wide
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


def run(make_net, train_net, config: PeDyra | Wide, steps: int = 20):
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    allocator = RankAllocator(model, optimizer, config, total_steps=steps)
    train_net(model, optimizer, allocator, steps)
    return model, allocator


def test_trains_as_pefts_forward_does_through_every_resize(make_net, train_net, monkeypatch):
    monkeypatch.setattr(fused, "_LEAST_ELEMENTS", (0, 0))
    (plain, ours), (together, theirs) = (
        run(make_net, train_net, on_lora(fused=on, **SCHEDULE)) for on in (False, True)
    )
    assert ours.ranks == theirs.ranks and len(ours.history) == 2
    x = torch.randn(5, 8)
    assert torch.allclose(together(x), plain(x), rtol=1e-4, atol=1e-5)
    assert all(type(layer.module) is FusedLinear for layer in theirs.layers)


def test_what_wide_measures_and_cuts_is_the_same(make_net, train_net, monkeypatch):
    monkeypatch.setattr(fused, "_LEAST_ELEMENTS", (0, 0))
    narrow: dict[str, Any] = dict(rank=1, initial_warmup=2, interval=10, final_warmup=4)
    (plain, ours), (together, theirs) = (run(make_net, train_net, Wide(fused=on, **narrow), 40) for on in (False, True))
    assert ours.ranks == theirs.ranks and sum(ours.ranks.values()) < 12
    for one, other in zip(ours.history, theirs.history, strict=True):
        assert [triple[:2] for triple in one["pruned"]] == [triple[:2] for triple in other["pruned"]]
        for name, scores in one["scores"].items():
            assert scores == pytest.approx(other["scores"][name], rel=1e-2, abs=1e-7)
    x = torch.randn(5, 8)
    assert torch.allclose(together(x), plain(x), rtol=1e-3, atol=1e-4)


def test_turning_it_off_gives_pefts_layers_back(make_net):
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters())
    RankAllocator(model, optimizer, on_lora(fused=True, **SCHEDULE), total_steps=20).release()
    allocator = RankAllocator(model, optimizer, on_lora(fused=False, **SCHEDULE), total_steps=20)
    assert all(type(layer.module) is Linear for layer in allocator.layers)


def test_says_when_no_layer_can_be_fused(make_net):
    model = make_net(use_dora=True)
    with pytest.warns(UserWarning, match="no layer can be fused"):
        RankAllocator(model, torch.optim.AdamW(model.parameters()), on_lora(fused=True, **SCHEDULE), total_steps=20)


def begin(model: Any, caplog: Any) -> RankAllocator:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with caplog.at_level("INFO", "pedyra"):
        return RankAllocator(model, optimizer, on_lora(**SCHEDULE), total_steps=20)


def test_by_default_layers_are_fused_where_that_is_exact_and_a_line_says_so(make_net, caplog):
    model = make_net(lora_dropout=0.0)
    model.base_model.model.layers[1].lora_dropout["default"] = torch.nn.Dropout(0.5)
    allocator = begin(model, caplog)
    assert allocator.fused_layers == 2
    assert "the fused forward runs in 2 of 3 layers" in caplog.text


def test_by_default_a_gpu_keeps_pefts_forward(make_net, caplog, monkeypatch):
    monkeypatch.setattr("pedyra.allocate.claim.MEASURED_ON", ())
    allocator = begin(make_net(), caplog)
    assert allocator.fused_layers == 0 and all(type(layer.module) is Linear for layer in allocator.layers)
    assert "PEFT's forward runs in all 3 layers (fused='auto')" in caplog.text
