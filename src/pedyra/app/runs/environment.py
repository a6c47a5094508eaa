"""environment.json records versions and machine of a run; peak memory is measured here too."""

from __future__ import annotations

import platform
import re
import resource
import shlex
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("pedyra", "torch", "transformers", "peft", "accelerate", "datasets", "trl", "safetensors", "numpy")
PACKAGES += ("bitsandbytes",)


def describe_environment(seed: int, device: torch.device) -> dict[str, Any]:
    packages = {each.name: each.version for each in distributions() if each.name in PACKAGES}
    return {
        "seed": seed,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **packages},
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory: on a GPU that of torch's allocator, on a CPU the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux ru_maxrss begins at the peak of the parent process, and VmHWM does not.
    status = Path("/proc/self/status")
    if status.is_file() and (peak := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(peak[1]) * 1024
    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maxrss if sys.platform == "darwin" else maxrss * 1024  # other systems than macOS count kibibytes


def memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
