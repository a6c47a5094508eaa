"""Begin wide, end narrow in two processes, on halves of every batch: the same cuts as in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from together import can_fork, together
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pedyra import RankAllocator
from pedyra.methods.wide import Wide

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator")
STEPS = 80


class Both(nn.Module):
    """Two linears side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


def train(rank: int, size: int) -> dict[str, Any]:
    """They learn an update of rank 1 and of rank 0, from a LoRA of rank 4 that ends with the size of rank 1."""
    if size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(1)
    base, update = Both(), torch.randn(6, 1) @ torch.randn(1, 8)
    A, B = base.a.weight.detach() + update, base.b.weight.detach().clone()
    bias = base.a.bias.detach().clone(), base.b.bias.detach().clone()
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["a", "b"]))  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.5)
    allocator = RankAllocator(model, optimizer, Wide(rank=1, interval=10), total_steps=STEPS)
    wrapped: Any = DistributedDataParallel(model) if size > 1 else model
    for step in range(STEPS):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        y = torch.cat([x @ A.T + bias[0], x @ B.T + bias[1]], -1)
        y = y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(9 * step))
        (wrapped(x.chunk(size)[rank]) - y.chunk(size)[rank]).square().mean().backward()
        allocator.before_step()
        optimizer.step()
        optimizer.zero_grad()
        record = allocator.after_step()
        if size > 1 and record and record["pruned"]:
            wrapped = DistributedDataParallel(model)
    updates = [(x.scaling * x.b.weight @ x.a.A).flatten().tolist() for x in allocator.layers]
    history = [(record["step"], record["ranks"], record["scores"]) for record in allocator.history]
    return {"ranks": allocator.ranks, "updates": updates, "history": history}


def test_two_processes_cut_as_one_does_on_the_whole_batch():
    (alone,) = together(train, 1)
    first, second = together(train, 2)
    assert first == second  # to the last bit
    assert 0 < sum(alone["ranks"].values()) <= 2 and len(alone["history"]) == 3
    for (step, ranks, increases), (our_step, our_ranks, ours) in zip(alone["history"], first["history"], strict=True):
        assert (our_step, our_ranks) == (step, ranks)
        for name in increases:
            assert ours[name] == pytest.approx(increases[name], rel=1e-3, abs=1e-6)
    for ours, theirs in zip(first["updates"], alone["updates"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
