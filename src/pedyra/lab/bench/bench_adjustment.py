"""What an adjustment of `Wide` takes on a deep model: what was measured is read, and a part is cut.

Part of `pedyra bench scale`, on its chain of linear layers, trained towards a teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.lab.bench.chain import Size, adapted_chain
from pedyra.lab.bench.device import timed
from pedyra.methods.wide import CUTS, LEAST_INTERVAL, Wide

DEEP = Size(layers=224, rank=45, length=8, batch=2)
"""As many layers as a language model of 32 blocks has, and 10,080 triples."""


def bench_adjustment(size: Size = DEEP, *, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """One row: `removed` triples at a cut, and `adjustment_seconds`, medians over the cuts."""
    model = adapted_chain(size).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    config = Wide(rank=max(1, size.rank // 4), initial_warmup=1, interval=LEAST_INTERVAL, final_warmup=1)
    allocator = RankAllocator(model, optimizer, config, total_steps=(CUTS + 1) * LEAST_INTERVAL + 2)
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, size.width, 12, generator=draw)
    teacher = 0.3 * left @ right.T / size.width
    seconds: list[float] = []
    while len(allocator.history) < CUTS:
        x = torch.randn(size.batch, size.length, size.width, generator=draw)
        (model(x.to(device)) - (x @ teacher).to(device)).square().mean().backward()
        allocator.before_step()
        optimizer.step()
        optimizer.zero_grad()
        cuts = len(allocator.history)
        took = timed(device, allocator.after_step)
        if len(allocator.history) > cuts:
            seconds.append(took)
    removed = [len(record["pruned"]) for record in allocator.history]
    allocator.release()
    yield {"kind": "adjustment", "layers": size.layers, "triples": size.layers * size.rank, "removed": median(removed),
           "adjustment_seconds": median(seconds)}  # fmt: skip
