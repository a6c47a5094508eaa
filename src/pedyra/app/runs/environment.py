"""Where and how a run was made: environment.json, and peak memory."""

from __future__ import annotations

import platform
import resource
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = (
    "pedyra",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "trl",
    "safetensors",
    "numpy",
    "bitsandbytes",
)


def describe_environment(seed: int, device: torch.device) -> dict[str, Any]:
    """Versions, seed, device, threads, the git commit of the working directory (None outside git) and the command."""
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "seed": seed,
        "command": shlex.join(command),
        "commit": _git_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **_package_versions()},
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: on a GPU that of torch's allocator, on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes


def memory_bytes(device: torch.device) -> int:
    """Memory held now, told as `peak_memory_bytes` tells its peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _package_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """The commit checked out here, with "+" if tracked files differ from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit
