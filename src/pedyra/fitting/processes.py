"""The processes of one training, which share the rows of a fit and decide the same: plain data parallelism, or one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """How many there are, and which this one is. What they exchange is the same in all of them to the last bit."""

    size: int = 1
    rank: int = 0

    def joined(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, those of the first one first."""
        if self.size == 1:
            return list(items)
        found: list[list[Item]] = [[] for _ in range(self.size)]
        dist.all_gather_object(found, list(items))
        return [item for part in found for item in part]

    def mean(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The mean over all processes of tensors on one device, in one call."""
        if self.size == 1 or not values:
            return list(values)
        flat = torch.cat([value.reshape(-1) for value in values])
        dist.all_reduce(flat)
        parts = (flat / self.size).split([value.numel() for value in values])
        return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            dist.barrier()


ALONE = Processes()
