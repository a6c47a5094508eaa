"""The device that a benchmark runs on, and its clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def check_device(device: str) -> None:
    """Raises ValueError for a device of another kind than cpu or cuda, or one that is not here."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is unknown; choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but this machine has no CUDA device; use --device cpu")


def timed(device: str, call: Callable[[], Any]) -> float:
    """Seconds that a call takes; see `now`."""
    began = now(device)
    call()
    return now(device) - began


def now(device: str) -> float:
    """Seconds of the processor's clock, which other work does not stop; on a GPU of the wall's, once it is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
