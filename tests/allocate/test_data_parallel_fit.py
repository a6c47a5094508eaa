"""Fit in two processes, on halves of every batch: the same questions, answers and cuts as in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from together import can_fork, together
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pedyra import RankAllocator, RankConfig

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator")
STEPS = 80


def train(rank: int, size: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Two linears side by side learn an update of rank 1 and of rank 0, from a LoRA of rank 4."""
    if size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(1)
    base: Any = nn.ModuleDict({"a": nn.Linear(8, 6), "b": nn.Linear(8, 6)})
    update = torch.randn(6, 1) @ torch.randn(1, 8)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.of["a"](x), self.of["b"](x)], -1)

    with torch.no_grad():
        start = Both()
        A, B = base["a"].weight + update, base["b"].weight.clone()
        bias = [base[name].bias.detach().clone() for name in "ab"]
    model: Any = get_peft_model(start, LoraConfig(r=4, lora_alpha=8, target_modules=["of.a", "of.b"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.5)
    allocator = RankAllocator(model, optimizer, RankConfig(**{"budget": "fit", **settings}), total_steps=STEPS)
    wrapped: Any = DistributedDataParallel(model) if size > 1 else model
    for step in range(STEPS):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        y = torch.cat([x @ A.T + bias[0], x @ B.T + bias[1]], -1)
        y = (y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(9 * step))).detach()
        part_x, part_y = x.chunk(size)[rank], y.chunk(size)[rank]
        (wrapped(part_x) - part_y).square().mean().backward()
        allocator.before_step(closure=lambda x=part_x, y=part_y: (model(x) - y).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        record = allocator.after_step()
        if size > 1 and record and record["pruned"]:
            wrapped = DistributedDataParallel(model)
    updates = [(x.scaling * x.b.weight @ x.a.A).flatten().tolist() for x in allocator.layers]
    return {"ranks": allocator.ranks, "updates": updates, "history": [record["fit"] for record in allocator.history]}


@pytest.mark.parametrize("settings", [{"interval": 10}, {"interval": 10, "target_rank": 1}], ids=["fit", "target rank"])
def test_two_processes_fit_as_one_does_on_the_whole_batch(settings):
    (alone,) = together(train, 1, settings)
    first, second = together(train, 2, settings)
    assert first == second  # to the last bit
    states = [record["state"] for record in alone["history"]]
    assert "cut" in states and states == [record["state"] for record in first["history"]]
    assert first["ranks"] == alone["ranks"] and sum(alone["ranks"].values()) < 8
    for ours, theirs in zip(first["updates"], alone["updates"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    for ours, theirs in zip(first["history"], alone["history"], strict=True):
        for mine, other in zip(ours.get("points", []), theirs.get("points", []), strict=True):
            assert mine["answer"] == other["answer"]
            assert mine["measured_cost"] == pytest.approx(other["measured_cost"], rel=1e-3, abs=1e-6)
            assert mine["predicted_cost"] == pytest.approx(other["predicted_cost"], rel=1e-2, abs=1e-6)
