"""What one adjustment of `RankConfig()` takes on a deep model, where nothing is worth moving and where much is.

Part of `pedyra bench scale`, on its chain of linear layers, trained along gradients that are drawn anew at every step,
so that no gain is more than noise, or towards a teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.allocate.schedule import parts_of
from pedyra.bench.chain import Size, adapted_chain
from pedyra.bench.device import timed
from pedyra.config import RankConfig
from pedyra.methods.pedyra.run import Pedyra
from pedyra.methods.pedyra.settings import Settings

DEEP = Size(layers=224, rank=45, length=8, batch=2)
"""As many layers as a language model of 32 blocks has, and 10,080 triples."""

_INTERVAL = 27
_LOOKS = 4


def bench_adjustment(size: Size = DEEP, *, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """Two rows, `task` "noise" and "signal".

    `moved` triples at an adjustment, `adjustment_seconds`, and `trial_seconds`, which it takes to choose the triples
    that are tried and to switch them off (None where none ever are): medians over the adjustments after the first.
    """
    judged_from = sum(parts_of(_INTERVAL)[:2])
    for task in ("noise", "signal"):
        model = adapted_chain(size).to(device).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
        config = RankConfig(interval=_INTERVAL, moves=200)
        method = Pedyra(Settings(reassignment=0, patience=0))
        allocator = RankAllocator(model, optimizer, config, total_steps=2 * _LOOKS * _INTERVAL, method=method)
        draw = torch.Generator().manual_seed(0)
        left, right = torch.randn(2, size.width, 12, generator=draw)
        teacher = 0.3 * left @ right.T / size.width
        adjustments: list[float] = []
        trials: list[float] = []
        while len(allocator.history) < _LOOKS:
            x, noise = torch.randn(2, size.batch, size.length, size.width, generator=draw)
            y = model(x.to(device))
            if task == "noise":
                loss = (y * noise.to(device)).mean()
            else:
                loss = (y - (x @ teacher).to(device)).square().mean()
            loss.backward()
            allocator.before_step()
            optimizer.step()
            optimizer.zero_grad()
            looks = len(allocator.history)
            seconds = timed(device, allocator.after_step)
            if len(allocator.history) > max(1, looks):
                adjustments.append(seconds)
            elif allocator.step % _INTERVAL == judged_from and allocator.layers[0].a.kept_directions is not None:
                trials.append(seconds)
        moved = [sum(record["added"].values()) for record in allocator.history[1:]]
        yield {"kind": "adjustment", "task": task, "layers": size.layers, "triples": size.layers * size.rank,
               "moved": median(moved), "adjustment_seconds": median(adjustments),
               "trial_seconds": median(trials) if trials else None}  # fmt: skip
        allocator.release()
