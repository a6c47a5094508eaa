"""A teacher of known rank, and runs of fit that learn it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pedyra import RankAllocator, RankConfig

TRUE = {"a": 2, "b": 0, "c": 3}
"""Layer -> rank of what the teacher has beyond the base."""
STEPS = 400


@dataclass
class Task:
    """A base of three linears side by side, a LoRA around it, and a teacher."""

    model: Any
    teacher: nn.Module
    noise: float

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + step)
        x = torch.randn(64, 10, generator=generator)
        with torch.no_grad():
            y = self.teacher(x)
        return x, y + self.noise * torch.randn(y.shape, generator=generator)


class Heads(nn.Module):
    """Three linears that read the same features, so that none can do another's work; a rank costs 22, 19 and 18."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 12), nn.Linear(10, 9), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x)], -1)


@pytest.fixture
def make_task() -> Callable[..., Task]:
    """make_task(r=6, noise=0.1, teaches=True, **LoraConfig settings); teaches=False: the base is the teacher."""

    def make(r: int = 6, noise: float = 0.1, teaches: bool = True, **settings: Any) -> Task:
        torch.manual_seed(3)
        base, teacher = Heads(), Heads()
        teacher.load_state_dict(base.state_dict())
        for name, rank in TRUE.items():
            weight: Any = teacher.get_submodule(name).weight
            if teaches and rank:
                update = torch.randn(weight.shape[0], rank) @ torch.randn(rank, weight.shape[1])
                weight.data += update / update.norm() * weight.norm()
        lora = LoraConfig(**{"r": r, "lora_alpha": 2 * r, "target_modules": ["a", "b", "c"], **settings})
        torch.manual_seed(4)
        return Task(get_peft_model(base, lora), teacher, noise)

    return make


@pytest.fixture
def fit() -> Callable[..., RankAllocator]:
    """fit(task, steps=..., micro=1, **RankConfig settings): train by hand, and return the allocator, not released."""

    def go(
        task: Task, *, steps: int = STEPS, stop: int | None = None, micro: int = 1, scale: float = 1.0,
        resume: Callable[[RankAllocator], int] | None = None, **settings: Any,
    ) -> RankAllocator:  # fmt: skip
        trained = [p for p in task.model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-2)
        config = RankConfig(**{"budget": "fit", **settings})
        allocator = RankAllocator(task.model, optimizer, config, total_steps=steps)
        first = 0 if resume is None else resume(allocator)
        for step in range(first, steps if stop is None else stop):
            x, y = task.batch(step)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - step / steps)
            for part_x, part_y in zip(x.chunk(micro), y.chunk(micro), strict=True):
                loss = (task.model(part_x) - part_y).square().mean() / micro
                (loss * scale).backward()
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = p.grad / scale
            closure = lambda x=x, y=y: (task.model(x) - y).square().mean()  # noqa: E731
            allocator.before_step(loss_scale=scale, closure=closure)
            optimizer.step()
            optimizer.zero_grad()
            allocator.after_step()
        return allocator

    return go
