"""Data parallelism: what the processes measured on their parts of a batch is averaged, so that all decide the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed
from torch import Tensor

Average = Callable[[Tensor], Tensor]
"""Mean of a tensor over all processes, the same on each; must be called by all of them, in the same order."""


def alone(tensor: Tensor) -> Tensor:
    """The `Average` of a single process."""
    return tensor


def averaging(group: Any = None) -> Average:
    """The `Average` over a process group of torch.distributed; None: over all processes, if there are any others."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return alone
    count = torch.distributed.get_world_size(group)
    if count == 1:
        return alone

    def average(tensor: Tensor) -> Tensor:
        total = tensor.clone()  # a sum and a division: gloo has no mean
        torch.distributed.all_reduce(total, group=group)
        return total / count

    return average
