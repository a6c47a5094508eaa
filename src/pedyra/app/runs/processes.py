"""A run has one process, or several of a launcher: all train, and the first writes and prints."""

from __future__ import annotations

import os
from typing import Any


def is_launched() -> bool:
    """Tell whether a launcher has started this process, of one or several."""
    # A job scheduler may set WORLD_SIZE alone, and Trainer ignores that too.
    return "LOCAL_RANK" in os.environ


def count_processes() -> int:
    """Count the processes that train this run; it is 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if is_launched() else 1


def is_first() -> bool:
    """Tell whether this process writes and prints; the others only train."""
    return count_processes() == 1 or int(os.environ.get("RANK", "0")) == 0


def from_first(value: Any) -> Any:
    """Return the first process's value; all must call this."""
    if count_processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def any_of_all(here: bool) -> bool:
    """Tell whether the flag is set in any process; all must call this."""
    if count_processes() == 1:
        return here
    import torch
    import torch.distributed
    from accelerate import PartialState

    flag = torch.tensor(float(here), device=PartialState().device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)
