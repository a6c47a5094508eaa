"""The clock of a benchmark, and the bytes behind tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def check_device(device: str) -> None:
    """Raises ValueError for a device that is not here."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but this machine has no CUDA device; use --device cpu")


def timed(device: str, call: Callable[[], Any]) -> float:
    """Seconds that a call takes; see `now`."""
    began = now(device)
    call()
    return now(device) - began


def now(device: str, *, cpu_time: bool = True) -> float:
    """Seconds of the processor's clock, which other work does not stop, or of the wall's; the latter on a GPU, once
    that is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if cpu_time and device != "cuda" else time.perf_counter()


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the distinct storages behind these tensors."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
